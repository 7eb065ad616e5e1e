"""A vision transformer in which mixers stand before attention, inside of its branches, and behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_heads, require_one_of
from cenote.mix.base import GridMixer, Mixer
from cenote.mix.maps import DropPath, drop_rates, start_narrow

Spot = Literal["attention front", "attention middle", "attention end", "mlp front", "mlp middle", "mlp end"]
SPOTS: tuple[Spot, ...] = (
    "attention front",
    "attention middle",
    "attention end",
    "mlp front",
    "mlp middle",
    "mlp end",
)
Uniform = Literal["added", "replacing"]
EPS = 1e-6


class Seen(NamedTuple):
    """What a network made of images.

    Attributes:
        logits: of the classes.
        attentions: weights of each block, behind dropout.
    """

    logits: Float[Tensor, "batch classes"]
    attentions: list[Float[Tensor, "batch heads tokens tokens"]]


class MixedAttention(nn.Module):
    """Self-attention that gives its weights; one head may be a plain mean.

    Args:
        dim: width of a token.
        heads: number of heads.
        bias: whether queries, keys and values have one.
        dropout: on weights, in training.
        uniform: `"added"`: one more head, whose weights are all equal; `"replacing"`: the last head is such.
        middle: what stands before the output's map.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        uniform: Uniform | None = None,
        middle: Mixer | None = None,
    ) -> None:
        super().__init__()
        require_heads(dim, heads)
        if uniform is not None:
            require_one_of(("added", "replacing"), uniform=uniform)
        self.heads, self.uniform = heads, uniform
        width = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.mean_value = nn.Linear(dim, width, bias=bias) if uniform == "added" else None
        self.proj = nn.Linear(dim + width if uniform == "added" else dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.middle = middle

    def forward(
        self, x: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads tokens tokens"]]:
        """The output, and the weights."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)
        if self.uniform is not None:
            same = torch.full_like(weights[:, :1], 1 / weights.shape[-1])
            learned = weights if self.mean_value is not None else weights[:, :-1]
            weights = torch.cat([learned, same], 1)
        if self.mean_value is not None:
            v = torch.cat([v, self.mean_value(x).unsqueeze(1)], 1)
        weights = self.dropout(weights)
        read = (weights @ v).transpose(1, 2).flatten(2)
        return self.proj(read if self.middle is None else self.middle(read)), weights


class MixedMLP(nn.Module):
    """`W_2 gelu(W_1 x)`, with a mixer before the last map where there is one."""

    def __init__(self, dim: int, hidden: int, middle: Mixer | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.middle = middle

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        h = self.act(self.fc1(x))
        return self.fc2(h if self.middle is None else self.middle(h))


class MixedBlock(nn.Module):
    """`x = x + s_1 A(LN(P x))`, `x = x + s_2 M(LN(x))`: `P` stands before the norm, and what is added to is not pooled.

    Args:
        dim, heads: of attention.
        hidden: inner width of the perceptron.
        pooling: `P`; None for none.
        spots: mixers at places of the branches.
        uniform: as of `MixedAttention`.
        bias, dropout: of attention.
        drop_path: share of images that go without a branch, in training.
        layer_scale: first value of the factors; None for none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        pooling: GridMixer | None = None,
        spots: Mapping[Spot, Mixer] | None = None,
        uniform: Uniform | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        spots = {} if spots is None else spots
        for spot in spots:
            require_one_of(SPOTS, spots=spot)
        self.pooling = pooling
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attn = MixedAttention(
            dim, heads, bias=bias, dropout=dropout, uniform=uniform, middle=spots.get("attention middle")
        )
        self.mlp = MixedMLP(dim, hidden, spots.get("mlp middle"))
        ends = {"attention front", "attention end", "mlp front", "mlp end"}
        self.spots = nn.ModuleDict({spot: mixer for spot, mixer in spots.items() if spot in ends})
        self.drop_path = DropPath(drop_path)
        scales = [None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2)]
        self.ls1, self.ls2 = scales

    def forward(
        self, x: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads tokens tokens"]]:
        """The next stream, and the weights of attention."""
        pooled = x if self.pooling is None else self.pooling(x)
        read, weights = self.attn(self._at("attention front", self.norm1(pooled)))
        x = self._joined(x, self._at("attention end", read), self.ls1)
        made = self.mlp(self._at("mlp front", self.norm2(x)))
        return self._joined(x, self._at("mlp end", made), self.ls2), weights

    def _at(self, spot: Spot, x: Tensor) -> Tensor:
        return self.spots[spot](x) if spot in self.spots else x

    def _joined(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        return x + self.drop_path(branch if scale is None else scale * branch)


class MixedViT(nn.Module):
    """A vision transformer with a class token; parameters carry timm's names.

    Args:
        image: height and width of images.
        patch: of patches.
        dim, depth, heads, classes: of the network.
        ratio: of the perceptron's inner width to the outer.
        pooling: builds what stands before each attention from a width and the grid, class token aside; None for nothing.
        spots: builds mixers at places of the branches from the width there.
        uniform: as of `MixedAttention`.
        class_token: whether there is one; without it the mean of the tokens is read.
        bias, dropout, layer_scale: as of `MixedBlock`.
        drop_path: of the last block; rates grow evenly.
        channels: of images.

    Raises:
        InputError: where images are no whole number of patches.

    Example:
        >>> vit = MixedViT((8, 12), (2, 2), dim=12, depth=2, heads=3, classes=5)
        >>> seen = vit.see(torch.zeros(1, 3, 8, 12))
        >>> seen.logits.shape, len(seen.attentions), seen.attentions[0].shape
        (torch.Size([1, 5]), 2, torch.Size([1, 3, 25, 25]))
    """

    def __init__(
        self,
        image: tuple[int, int],
        patch: tuple[int, int] = (16, 16),
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        classes: int = 1000,
        ratio: float = 4.0,
        pooling: Callable[[int, tuple[int, int], int], GridMixer] | None = None,
        spots: Mapping[Spot, Callable[[int], Mixer]] | None = None,
        uniform: Uniform | None = None,
        class_token: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, depth=depth, heads=heads, classes=classes)
        if image[0] % patch[0] or image[1] % patch[1]:
            raise InputError(f"image: expected whole patches of {patch}, got {image}")
        self.grid = (image[0] // patch[0], image[1] // patch[1])
        self.image, prefix = image, int(class_token)
        hidden = int(dim * ratio)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + prefix, dim))
        rates = drop_rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            MixedBlock(
                dim,
                heads,
                hidden,
                pooling=None if pooling is None else pooling(dim, self.grid, prefix),
                spots={s: make(hidden if s == "mlp middle" else dim) for s, make in (spots or {}).items()},
                uniform=uniform,
                bias=bias,
                dropout=dropout,
                drop_path=rate,
                layer_scale=layer_scale,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, EPS)
        self.head = nn.Linear(dim, classes)
        start_narrow(self)
        for p in (self.cls_token, self.pos_embed):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of the images."""
        return self.see(images).logits

    def see(self, images: Float[Tensor, "batch channels height width"]) -> Seen:
        """Logits, and the weights of attention in each block."""
        if tuple(images.shape[2:]) != self.image:
            raise InputError(f"images: expected {self.image} pixels, got {tuple(images.shape[2:])}")
        x = self.patch_embed.proj(images).flatten(2).mT  # type: ignore[operator]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x, attentions = x + self.pos_embed, []
        for block in self.blocks:
            x, weights = block(x)
            attentions.append(weights)
        x = self.norm(x)
        return Seen(self.head(x[:, 0] if self.cls_token is not None else x.mean(1)), attentions)
