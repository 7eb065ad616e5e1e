"""Blocks and whole networks in which token-aware pooling stands before attention.

Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_heads
from cenote.mix.base import GridMixer
from cenote.mix.image_training import Loss, Recipe
from cenote.mix.maps import DropPath, drop_rates, on_map
from cenote.mix.tap_adl.diversification import attention_diversification
from cenote.mix.tap_adl.pooling import DilatedMean, TokenAwarePooling
from cenote.mix.vision import MixedViT, Seen


class _SplitAttention(nn.Module):
    """Self-attention with a map for queries and one for keys and values; gives its weights too."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class _SeparableConv(nn.Module):
    """Two depthwise convolutions of 3 x 3, an activation and a normalisation between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(F.gelu(self.conv1(x))))


class _ConvMLP(nn.Module):
    """`W_2 (g D(W_1 x) + W_1 x)` with `D` convolutions over the grid."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = _SeparableConv(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        h = self.fc1(x)
        mixed = self.dwconv(h.transpose(1, 2).unflatten(-1, grid)).flatten(2).transpose(1, 2)
        return self.fc2(self.gamma * mixed + h)


class _ChannelProcessing(nn.Module):
    """FAN's channel attention: each channel of a perceptron's output times a gate that a pooled correlation gives."""

    def __init__(self, dim: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v = _ConvMLP(dim, hidden)
        self.norm_v = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).softmax(-2) for t in (self.q(x), x))
        gate = (q.mT @ k.mean(-1, keepdim=True)).sigmoid() * self.temperature
        v = self.norm_v(self.mlp_v(x, grid)).unflatten(-1, (self.heads, -1))
        return (v * gate.squeeze(-1).unsqueeze(1)).flatten(2)


class FANBlock(nn.Module):
    """A block of a fully attentional network: attention over tokens, then over channels; with pooling before the first.

        x = x + g_1 A(LN(TAP(x))),   x = x + g_2 C(LN(x))

    Args:
        dim: width of a token.
        heads: number of heads, of tokens and of channels.
        ratio: of the perceptron's hidden width to the outer.
        bias: whether queries, keys and values have one.
        scale: first value of the factors `g_1`, `g_2`.
        scales: of token-aware pooling; 1 for none.
        drop_path: share of images that go without a branch, in training.

    Note:
        `C`, the channel processing, is of the host (Zhou et al. 2022, "Understanding the Robustness in Vision Transformers"),
        not of the paper on token-aware pooling.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        ratio: float = 4.0,
        bias: bool = True,
        scale: float = 1.0,
        scales: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_heads(dim, heads)
        self.pooling = TokenAwarePooling(dim, scales)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _SplitAttention(dim, heads, bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _ChannelProcessing(dim, heads, int(dim * ratio), bias)
        self.gamma1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma2 = nn.Parameter(torch.full((dim,), scale))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"]
    ) -> tuple[Float[Tensor, "batch dim rows columns"], Float[Tensor, "batch heads tokens tokens"]]:
        """The next feature map, and the weights of attention over tokens."""
        grid = (x.shape[2], x.shape[3])
        pooled, x = (t.flatten(2).transpose(1, 2) for t in (on_map(self.pooling, x), x))
        read, weights = self.attn(self.norm1(pooled))
        x = x + self.drop_path(self.gamma1 * read)
        x = x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), grid))
        return x.transpose(1, 2).unflatten(-1, grid), weights


class FANLike(nn.Module):
    """Images to logits through `FANBlock`s of one width, on a grid of any size: the mean of the cells is read.

    Args:
        dim, depth, heads, classes: of the network.
        patch: side of a patch.
        scales: of the poolings; 1 for none.
        ratio: of the perceptrons' hidden width to the outer.
        drop_path: of the last block; rates grow evenly.
        channels: of images.

    Note:
        The published FAN has convolutions before its blocks and attention of a class token behind, which were not at hand.
        Of RVT, the paper's other host, nothing was, so that it is not built.
    """

    def __init__(
        self,
        dim: int = 448,
        depth: int = 16,
        heads: int = 8,
        classes: int = 1000,
        *,
        patch: int = 16,
        scales: int = 4,
        ratio: float = 4.0,
        drop_path: float = 0.0,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.blocks = nn.ModuleList(
            FANBlock(dim, heads, ratio=ratio, scales=scales, drop_path=rate) for rate in drop_rates(drop_path, depth)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of the images."""
        return self.see(images).logits

    def see(self, images: Float[Tensor, "batch channels height width"]) -> Seen:
        """Logits, and the weights of attention over tokens in each block."""
        x, attentions = self.embed(images), []
        for block in self.blocks:
            x, weights = block(x)
            attentions.append(weights)
        return Seen(self.head(self.norm(x.mean((2, 3)))), attentions)


class RobustViT(MixedViT):
    """A vision transformer with token-aware pooling before each attention; `see` gives the attentions for the loss.

    Args:
        image: height and width of images.
        patch: of patches.
        scales: of the poolings; 1 for none.
        fixed: another mixer in its place: `"mean"`, the mean of nine cells, or a number, nine cells at that distance.
        settings: of `MixedViT`.

    Example:
        >>> vit = RobustViT((8, 8), (2, 2), dim=12, depth=2, heads=3, classes=5).eval()
        >>> attention_diversification(vit.see(torch.rand(2, 3, 8, 8)).attentions) >= 0
        tensor(True)

    Source:
        Guo et al. 2023, arXiv 2303.11126, figure 2, with a plain ViT as host; `FANBlock` is the block of its other host.
    """

    def __init__(
        self,
        image: tuple[int, int],
        patch: tuple[int, int] = (16, 16),
        *,
        scales: int = 4,
        fixed: Literal["mean"] | int | None = None,
        **settings: Any,
    ) -> None:
        def pooling(dim: int, grid: tuple[int, int], prefix: int) -> GridMixer:
            if fixed is None:
                return TokenAwarePooling(dim, scales, grid=grid, prefix=prefix)
            return DilatedMean(1 if fixed == "mean" else fixed, grid=grid, prefix=prefix)

        super().__init__(image, patch, **{"pooling": pooling if scales > 1 or fixed is not None else None, **settings})


FAN_RECIPE = Recipe(epochs=300, learning_rate=4e-3, per=4096, warm_up=10, magnitude=9, erasing=0.3, averaged=0.9999)
"""Published for FAN-B-Hybrid, whose stochastic depth is .35; the weight of the running mean is inferred."""


def diversified_loss(weight: float = 1.0, threshold: float = 2.0) -> Loss:
    """Cross-entropy and the attention diversification loss of all blocks, for `train_images` on a network with `see`.

    Args:
        weight: of the diversification loss.
        threshold: as of `attention_diversification`.
    """

    def loss(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(net, MixedViT | FANLike)
        seen = net.see(images)
        return F.cross_entropy(seen.logits, targets) + weight * attention_diversification(seen.attentions, threshold)

    return loss
