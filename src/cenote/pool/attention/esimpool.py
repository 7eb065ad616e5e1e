import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.attention import Plan, cross_attention
from cenote.core.errors import InputError
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import shifted_power_mean
from cenote.pool.base import Pooled, QueryPool


class ESimPool(QueryPool):
    """SimPool without linear maps, on several heads: normalised mean against normalised tokens, raw tokens as values.

    `q = LN(mean_n x_n)`, `k_n = LN(x_n)`, `a = softmax_n(q . k_n * scale)` on the slice of each head, `y = sum_n a_n x_n`; or
    with `gamma` the power mean of shifted values `v+ = x - min(x) + 1e-6`: `y = (sum_n a_n (v+_n)^gamma)^(1/gamma) + beta`.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 12, or the largest divisor below it.
        gamma: exponent of the power mean; `None`: a weighted mean.
        beta: whether a learned scalar is added to the power mean.
        scale: of the scores; default `(dim / heads) ** -0.5`.
        plan: see `cenote.core.cross_attention`.

    Example:
        >>> ESimPool(24)(torch.randn(2, 9, 24)).shape
        torch.Size([2, 24])

    Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling", 2025.

    Note:
        As in `SimPool`, the minimum that shifts the values is taken over each set, not over the batch.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        gamma: float | None = None,
        beta: bool = False,
        scale: float | None = None,
        plan: Plan = "auto",
    ) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 12) if heads is None else heads
        require_divides("heads", self.heads, dim)
        if gamma is not None and gamma <= 0:
            raise InputError(f"gamma: expected a positive exponent or None, got {gamma}")
        if beta and gamma is None:
            raise InputError("beta: is added to the power mean, so it needs gamma; give gamma or leave beta out")
        self.gamma = gamma
        self.scale = (dim // self.heads) ** -0.5 if scale is None else scale
        self.plan = plan
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.beta = nn.Parameter(torch.zeros(1)) if beta else None

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.norm_patches(tokens.mean()).unflatten(-1, (self.heads, -1))
        # head h asks every channel, with zeros outside of its own slice
        own = torch.eye(self.heads, dtype=query.dtype, device=query.device).unsqueeze(-1)
        query = (query.unsqueeze(2) * own).flatten(1).unsqueeze(1)
        output, weights = cross_attention(
            tokens,
            query,
            heads=self.heads,
            scale=self.scale,
            key_norm=self.norm_patches,
            plan=self.plan,
            need_weights=need_weights or self.gamma is not None,
        )
        if self.gamma is None:
            return Pooled(output.squeeze(1), weights)
        y = shifted_power_mean(tokens, tokens.values, self.value_minimum(tokens), self.gamma, weights)
        return Pooled(y if self.beta is None else y + self.beta, weights)

    def value_minimum(self, tokens: Tokens) -> Float[Tensor, "batch 1"]:
        """The number that shifts each set's values to be positive."""
        return tokens.min().amin(-1, keepdim=True)
