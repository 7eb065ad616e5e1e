"""What SimPool and its form without linear maps share: attention whose values are averaged by a shifted power mean."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.attention import Plan
from cenote.core.errors import InputError
from cenote.core.powermean import power_mean
from cenote.core.sets import Tokens
from cenote.core.widths import require_divides
from cenote.pool.base import Pooled, QueryPool

SHIFT_EPS = 1e-6


class ShiftedPowerPool(QueryPool):
    """Base of the pools `y = (sum_n a_n (v+_n)^gamma)^(1/gamma) + beta` with shifted values `v+ = v - min(v) + 1e-6`.

    Args:
        dim: width of a token.
        heads: each owns a slice of the channels; divides `dim`.
        gamma: exponent of the power mean; `None`: a weighted mean.
        beta: whether a learned scalar is added to the power mean.
        plan: see `cenote.core.cross_attention`.
    """

    def __init__(self, dim: int, heads: int, gamma: float | None, beta: bool, plan: Plan) -> None:
        super().__init__(dim)
        require_divides("heads", heads, dim)
        if gamma is not None and gamma <= 0:
            raise InputError(f"gamma: expected a positive exponent or None, got {gamma}")
        if beta and gamma is None:
            raise InputError("beta: is added to the power mean, so it needs gamma; give gamma or leave beta out")
        self.heads = heads
        self.gamma = gamma
        self.plan: Plan = plan
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.beta = nn.Parameter(torch.zeros(1)) if beta else None

    def power_mean(self, tokens: Tokens, values: Float[Tensor, "*rows dim"], weights: Tensor) -> Pooled:
        """`y` of these values, each head's weights on its own slice of the channels; `gamma` is given."""
        assert self.gamma is not None
        shifted = values - tokens.spread(self.value_minimum(tokens, values)) + SHIFT_EPS
        y = power_mean(
            tokens,
            # padded slots hold a constant that may lie below the minimum of the real tokens
            shifted.clamp(min=SHIFT_EPS),
            values.new_tensor([self.gamma]),
            weights.repeat_interleave(values.shape[-1] // weights.shape[-1], -1),
        )
        return Pooled(y if self.beta is None else y + self.beta, weights)

    def value_minimum(self, tokens: Tokens, values: Float[Tensor, "*rows dim"]) -> Float[Tensor, "batch 1"]:
        """The number that shifts each set's values to be positive."""
        return tokens.min(values).amin(-1, keepdim=True)
