"""A vision transformer whose blocks may reduce their tokens between attention and MLP, where the papers do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.reduced import Reduced
from cenote.core.requirements import require_at_least

EPS = 1e-6


@runtime_checkable
class ReducesTokens(Protocol):
    """What may stand in a block: a reducer, or anything that is called like one.

    Where it has an attribute `rows`, that says whose attention it is given: of the `"first"` token ([CLS]) or the mean of
    `"all"`.
    """

    needs: Any

    def __call__(
        self,
        x: Tensor,
        sizes: Tensor | None = None,
        mask: Tensor | None = None,
        protect: Any = None,
        **signals: Tensor,
    ) -> Reduced:
        """Fewer tokens."""


class SizedAttention(nn.Module):
    """Self-attention in which a token weighs as much as the originals that it stands for: `softmax(q k^T / sqrt d + log size)`.

    Args:
        dim: width of a token.
        heads: divides `dim`.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        require_at_least(1, heads=heads)
        if dim % heads:
            raise InputError(f"heads: {heads} do not divide a width of {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "batch 1 1 tokens"] | None = None,
        needs: frozenset[str] = frozenset(),
        rows: str = "first",
    ) -> tuple[Float[Tensor, "batch tokens dim"], dict[str, Tensor]]:
        """The output, and those of the signals `"attention"` (of the first row or the mean of all), `"keys"`, `"values"` that
        are needed."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, bias)
        signals = {name: signal for name, signal in (("keys", k), ("values", v)) if name in needs}
        if "attention" in needs:
            asking = q[:, :, :1] if rows == "first" else q
            scores = asking @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            signals["attention"] = (scores if bias is None else scores + bias).softmax(-1).mean(2)
        return self.proj(attended.transpose(1, 2).flatten(2)), signals


class Perceptron(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbedding(nn.Module):
    """One linear map of the numbers of each patch."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class ReducingBlock(nn.Module):
    """`x + attention(LN(x))`, then fewer tokens, then `x + MLP(LN(x))` of these. Names of parameters are those of timm.

    Args:
        dim: width of a token.
        heads: divides `dim`.
        hidden: width of the MLP.
        qkv_bias: whether queries, keys and values have a bias.

    Example:
        >>> from cenote.reduce import FirstTokens
        >>> ReducingBlock(8, 2, 16)(torch.rand(1, 7, 8), FirstTokens(tokens=2), protect=1).tokens.shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = SizedAttention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Perceptron(dim, hidden)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        reducer: ReducesTokens | None = None,
        sizes: Float[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        protect: int = 0,
        proportional: bool = True,
    ) -> Reduced:
        """What the block writes, and of it which original went where.

        Args:
            x: the tokens.
            reducer: None to leave all.
            sizes: how many originals each stands for, None for 1.
            mask: True = a real token, None for all.
            protect: the first so many tokens stay ([CLS]).
            proportional: whether attention weighs tokens by their sizes.
        """
        needs = frozenset() if reducer is None else frozenset(reducer.needs)
        bias = _bias(x, sizes if proportional else None, mask)
        attended, signals = self.attn(self.norm1(x), bias, needs, getattr(reducer, "rows", "first"))
        x = x + attended
        if reducer is None:
            known = x.new_ones(x.shape[:2]) if sizes is None else sizes
            own = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            found = Reduced(x, known, own if mask is None else own.masked_fill(~mask, -1), mask)
        else:
            found = reducer(x, sizes, mask, protect=protect, **signals)
        return found._replace(tokens=found.tokens + self.mlp(self.norm2(found.tokens)))


class VisionRun(NamedTuple):
    """What a vision transformer made of images.

    `logits` `[batch, classes]`; `counts`, per block how many tokens it wrote, the protected ones included, of the fullest
    image; `reduced`, the last states and what became of the tokens that the first block read.
    """

    logits: Float[Tensor, "batch classes"]
    counts: tuple[int, ...]
    reduced: Reduced


class ReducibleViT(nn.Module):
    """A vision transformer (ViT, DeiT) that can be run with fewer tokens behind the attention of any of its blocks.

    What reduces is given with the images, block by block, and nothing of it stays: without it this is the plain network.
    Names of parameters are timm's, so that a checkpoint of timm's ViT and DeiT can be loaded.

    Args:
        image: side of the images in pixels.
        patch: side of a patch.
        dim: width of a token.
        depth: number of blocks.
        heads: divides `dim`.
        classes: number of logits.
        hidden: width of the MLPs, None for `4 dim`.
        channels: of the images.
        distilled: whether there is a second token with a head of its own; logits are the mean of both then.
        qkv_bias: whether queries, keys and values have a bias.

    Example:
        >>> from cenote.reduce import EvenlySpacedTokens
        >>> vit = ReducibleViT(8, 2, 16, depth=3, heads=2, classes=10, channels=1)
        >>> vit.run(torch.rand(1, 1, 8, 8), {1: EvenlySpacedTokens(factor=4)}).counts
        (17, 5, 5)

    Source:
        Dosovitskiy et al. 2021, arXiv 2010.11929; Touvron et al. 2021, arXiv 2012.12877.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        dim: int,
        *,
        depth: int,
        heads: int,
        classes: int,
        hidden: int | None = None,
        channels: int = 3,
        distilled: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, image=image, patch=patch, dim=dim, depth=depth, classes=classes, channels=channels)
        if image % patch:
            raise InputError(f"patch: {patch} pixels do not divide an image of {image}")
        self.patches, self.prefix, self.patch = (image // patch) ** 2, 2 if distilled else 1, patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if distilled else None
        self.pos_embed = nn.Parameter(torch.randn(1, self.patches + self.prefix, dim) * 0.02)
        self.hidden, self.numbers = 4 * dim if hidden is None else hidden, channels * patch**2
        self.patch_embed = PatchEmbedding(channels, dim, patch)
        self.blocks = nn.ModuleList(ReducingBlock(dim, heads, self.hidden, qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, classes)
        self.head_dist = nn.Linear(dim, classes) if distilled else None

    @classmethod
    def of_timm(cls, state: Mapping[str, Tensor], heads: int) -> ReducibleViT:
        """The network of a checkpoint of timm's ViT or DeiT, whatever its size.

        Args:
            state: its `state_dict()`.
            heads: which a checkpoint does not say: 3, 6, 12 of DeiT-T, -S, -B.

        Raises:
            InputError: for a checkpoint of something else.
        """
        try:
            dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
            distilled = "dist_token" in state
            side = round((state["pos_embed"].shape[1] - 1 - distilled) ** 0.5)
            depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
            model = cls(
                side * patch,
                patch,
                dim,
                depth=depth,
                heads=heads,
                classes=len(state["head.weight"]),
                hidden=len(state["blocks.0.mlp.fc1.weight"]),
                channels=channels,
                distilled=distilled,
                qkv_bias="blocks.0.attn.qkv.bias" in state,
            )
            model.load_state_dict(dict(state))
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"state: expected that of a ViT or DeiT of timm with a class token: {error}") from error
        return model

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        at: Mapping[int, ReducesTokens] | None = None,
        *,
        proportional: bool = True,
    ) -> Float[Tensor, "batch classes"]:
        """The logits; of the arguments see `run`."""
        return self.run(images, at, proportional=proportional).logits

    def run(
        self,
        images: Float[Tensor, "batch channels height width"],
        at: Mapping[int, ReducesTokens] | None = None,
        *,
        proportional: bool = True,
    ) -> VisionRun:
        """Run the network with fewer tokens.

        Args:
            images: of the size that it was built for.
            at: what reduces, by the number of its block, from 0; the class token and that of distillation stay.
            proportional: whether attention weighs merged tokens by how many originals they stand for.
        """
        at = at or {}
        if unknown := sorted(set(at) - set(range(len(self.blocks)))):
            raise InputError(f"at: there is no block {unknown[0]}; blocks are 0 to {len(self.blocks) - 1}")
        x = self._embedded(images)
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        whole = Reduced(x, x.new_ones(x.shape[:2]), own, None)
        sized, counts = False, []
        for number, block in enumerate(self.blocks):
            found = block(
                whole.tokens,
                at.get(number),
                whole.sizes if sized or number in at else None,
                whole.mask,
                protect=self.prefix,
                proportional=proportional and sized,
            )
            if number in at:
                sized = True
                mask = None if found.mask is None or bool(found.mask.all()) else found.mask
                whole = whole.then(found._replace(mask=mask))
            else:
                whole = whole._replace(tokens=found.tokens)
            counts.append(whole.tokens.shape[1])
        return VisionRun(self._classified(self.norm(whole.tokens[:, : self.prefix])), tuple(counts), whole)

    def _embedded(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        if x.shape[1] != self.patches:
            raise InputError(f"images: expected {self.patches} patches of {self.patch} pixels, got {x.shape[1]}")
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        return torch.cat([*(p.expand(len(x), -1, -1) for p in prefix), x], 1) + self.pos_embed

    def _classified(self, x: Float[Tensor, "batch prefix dim"]) -> Float[Tensor, "batch classes"]:
        logits = self.head(x[:, 0])
        return logits if self.head_dist is None else (logits + self.head_dist(x[:, 1])) / 2


def _bias(x: Tensor, sizes: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What is added to the scores of each key, `[batch, 1, 1, tokens]`."""
    bias = None if sizes is None else sizes.to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny).log()
    if mask is not None:
        bias = torch.zeros_like(x[..., 0]) if bias is None else bias
        bias = bias.masked_fill(~mask, -torch.inf)
    return None if bias is None else bias[:, None, None]
