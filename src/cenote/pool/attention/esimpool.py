import torch

from cenote.core.attention import Plan, cross_attention
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor
from cenote.pool.attention.shifted_power import ShiftedPowerPool
from cenote.pool.base import Pooled


class ESimPool(ShiftedPowerPool):
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
        super().__init__(dim, largest_divisor(dim, 12) if heads is None else heads, gamma, beta, plan)
        self.scale = (dim // self.heads) ** -0.5 if scale is None else scale

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
        return self.power_mean(tokens, tokens.values, weights)
