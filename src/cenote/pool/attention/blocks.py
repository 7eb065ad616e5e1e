"""Small parts that several attention pools are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.attention import Projection
from cenote.core.dense import dense_attention
from cenote.core.errors import InputError
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens
from cenote.core.widths import require_divides


def quick_gelu(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`x sigmoid(1.702 x)`, CLIP's approximation of the GELU.

    >>> quick_gelu(torch.tensor([0.0, 10.0])).round().tolist()
    [0.0, 10.0]
    """
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """`fc2(activation(fc1(x)))`, as in a vision transformer.

    Args:
        dim, hidden: widths outside and inside.
        bias: whether both maps have biases.
        activation: between them.
        dropout: of the result.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        bias: bool = True,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.fc2 = nn.Linear(hidden, dim, bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # pickled by a version that knew neither
        vars(self).setdefault("activation", F.gelu)
        self._modules.setdefault("dropout", nn.Dropout(0.0))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return self.dropout(self.fc2(self.activation(self.fc1(x))))


class SelfAttention(nn.Module):
    """Multi-head self-attention over padded sets; padded slots are never attended to.

    Args:
        dim: width of a token.
        heads: divides `dim`.
        qkv_bias, out_bias: whether the maps to queries, keys and values, and the map of the result, have biases.
        scale: factor on the scores; default `(dim / heads) ** -0.5`.
        dropout: of the weights.
        out_dropout: of the result.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = False,
        out_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_divides("heads", heads, dim)
        self.heads = heads
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias)
        self.dropout = dropout
        self.out_dropout = nn.Dropout(out_dropout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # pickled by a version that knew none of these
        vars(self).setdefault("scale", (self.qkv.in_features // self.heads) ** -0.5)
        vars(self).setdefault("dropout", 0.0)
        self._modules.setdefault("out_dropout", nn.Dropout(0.0))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.qkv(x).chunk(3, -1)
        dropout = self.dropout if self.training else 0.0
        return self.out_dropout(self.proj(dense_attention(q, k, v, self.heads, self.scale, mask, dropout)))

    def maps(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        asking: slice = slice(None),
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """What each token takes from each other, or what the tokens `asking` do."""
        query, key, _ = split_projection(self.qkv, 3)
        q, k = (
            project(rows, part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for rows, part in ((x[:, asking], query), (x, key))
        )
        scores = q @ k.transpose(-1, -2) * self.scale
        if mask is not None:
            # a set without tokens attends to its zeroed slots: all False would make NaN
            scores = scores.masked_fill(~(mask | ~mask.any(1, keepdim=True))[:, None, None], -math.inf)
        return scores.softmax(-1)


class TransformerBlock(nn.Module):
    """Pre-norm block: `x + attention(LN(x))`, then `x + MLP(LN(x))`.

    Args:
        dim: width of a token.
        attention: `SelfAttention(dim, ...)`.
        mlp: `MLP(dim, ...)`.
    """

    def __init__(self, dim: int, attention: SelfAttention, mlp: MLP) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp

    @classmethod
    def of_vit(cls, dim: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False) -> TransformerBlock:
        """That of a vision transformer."""
        return cls(dim, SelfAttention(dim, heads, qkv_bias), MLP(dim, int(dim * mlp_ratio)))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens after the block; what padded slots hold is of no meaning."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

    def maps(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        asking: slice = slice(None),
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """What each token takes from each other in this block, or what the tokens `asking` do."""
        return self.attn.maps(self.norm1(x), mask, asking)


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the real tokens of a batch; padding takes no part in the statistics.

    While training, a set's result depends on its batch mates: that is what BatchNorm is. In eval mode it does not.
    """

    def moments(
        self, tokens: Tokens, v: Float[Tensor, "*rows channels"]
    ) -> tuple[Float[Tensor, "channels"], Float[Tensor, "channels"]]:
        """`(mean, 1 / std)` of each channel of `v`: of this batch while training, else the running ones."""
        wide = accumulation_dtype(v.dtype)
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training:
            return self.running_mean.to(wide), (self.running_var.to(wide) + self.eps).rsqrt()
        v = v.to(wide)
        count = tokens.lengths().sum().clamp(min=1)
        mean = tokens.sum(v).sum(0) / count
        variance = tokens.sum((v - mean).square()).sum(0) / count
        momentum = 0.1 if self.momentum is None else self.momentum
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.mul_(1 - momentum).add_(now.to(running.dtype) * momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return mean, (variance + self.eps).rsqrt()

    def normalised(self, tokens: Tokens, v: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """`v` normalised per channel, with the affine part where there is one."""
        mean, inverse_std = self.moments(tokens, v)
        scale = inverse_std if self.weight is None else inverse_std * self.weight
        y = (v.to(scale.dtype) - mean) * scale
        return (y if self.bias is None else y + self.bias).to(v.dtype)


def require_tokens(tokens: PaddedTokens, expected: int) -> None:
    """Raise `InputError` unless every set has that number of slots."""
    if tokens.values.shape[1] != expected:
        raise InputError(
            f"x: this pool was built for sets of {expected} tokens, got {tokens.values.shape[1]}; "
            f"build it with tokens={tokens.values.shape[1]}"
        )


def require_square(tokens: int) -> int:
    """The side of a square grid of that many tokens; `InputError` where there is none."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise InputError(f"tokens: expected a square number, the patches of a square grid, got {tokens}")
    return side


def split_projection(fused: nn.Linear, parts: int) -> list[Projection]:
    """The equal slices of one Linear that maps to several things at once (`qkv`, `kv`)."""
    biases: list[Tensor | None] = [None] * parts if fused.bias is None else list(fused.bias.chunk(parts))
    return [Projection(w, b) for w, b in zip(fused.weight.chunk(parts), biases, strict=True)]


def project(x: Float[Tensor, "*rows in"], projection: Projection) -> Float[Tensor, "*rows out"]:
    """`W x + b`."""
    return F.linear(x, projection.weight, projection.bias)
