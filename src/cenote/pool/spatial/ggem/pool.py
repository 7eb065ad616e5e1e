from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.powermean import power_mean
from cenote.core.requirements import require_one_of
from cenote.core.sets import Tokens, as_tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.base import Pool, Pooled

Negatives = Literal["clamp", "shift", "abs_sign"]


class GGeM(Pool):
    """Power mean of the tokens with one learnable exponent per group of channels.

    `y_c = ((1/N) sum_n max(x_nc, eps)^p_g)^(1/p_g)` for channel `c` of group `g`; `p = 1` is the mean, large `p` tends to
    the maximum. The weight of a token is `x_nc^p / sum_m x_mc^p`, averaged over the channels of a group.

    Args:
        dim: width of a token.
        groups: number of contiguous channel groups; divides `dim`. Default 12, or the largest divisor below it.
        p: initial exponent.
        learnable: whether the exponents are trained.
        negatives: what happens to negative features: `"clamp"` to `eps`, `"shift"` each set by its minimum per channel,
            `"abs_sign"` the power mean of magnitudes with the sign of the mean.
        eps: smallest value that enters the logarithm.

    Example:
        >>> GGeM(24, groups=4)(torch.rand(2, 9, 24)).shape
        torch.Size([2, 24])

    Source: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022.

    Note:
        The paper's abstract does not state the number of groups nor the first exponent: groups as attention heads of a ViT-B
        and `p = 3`, the convention of GeM, are taken here.
    """

    def __init__(
        self,
        dim: int,
        groups: int | None = None,
        p: float = 3.0,
        learnable: bool = True,
        negatives: Negatives = "clamp",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim)
        self.groups = largest_divisor(dim, 12) if groups is None else groups
        require_divides("groups", self.groups, dim)
        require_one_of(("clamp", "shift", "abs_sign"), negatives=negatives)
        self.negatives = negatives
        self.eps = eps
        self.p = nn.Parameter(torch.full((self.groups,), float(p)), requires_grad=learnable)

    def channel_weights(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "*rows dim"]:
        """`x_nc^p / sum_m x_mc^p`, `[batch, tokens, dim]` (`[total, dim]` for `Bags`); sums to 1 over each set."""
        return self._weights(as_tokens(x, mask, self.dim))

    def pool(self, tokens: Tokens) -> Pooled:
        weights = self._weights(tokens)
        by_group = weights.unflatten(-1, (self.groups, -1)).mean(-1)
        return Pooled(self.pool_only(tokens), by_group)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        by_set = self.negatives == "shift"
        y = power_mean(tokens, self._positive(tokens) if by_set else self._magnitude, self._exponent())
        return y * tokens.mean().sign() if self.negatives == "abs_sign" else y

    def _weights(self, tokens: Tokens) -> Float[Tensor, "*rows dim"]:
        return tokens.softmax(self._exponent() * self._positive(tokens).log())

    def _exponent(self) -> Float[Tensor, "dim"]:
        return self.p.repeat_interleave(self.dim // self.groups)

    def _positive(self, tokens: Tokens) -> Float[Tensor, "*rows dim"]:
        x = tokens.values
        return self._magnitude(x - tokens.spread(tokens.min()) if self.negatives == "shift" else x)

    def _magnitude(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        x = x.abs() if self.negatives == "abs_sign" else x
        # in half precision 1e-6 would be a denormal number
        return x.clamp(min=max(self.eps, torch.finfo(x.dtype).tiny))


class GeM(GGeM):
    """Power mean of the tokens with one learnable exponent for all channels.

    `y_c = ((1/N) sum_n max(x_nc, eps)^p)^(1/p)`

    Args:
        dim: width of a token.
        p: initial exponent.
        learnable: whether the exponent is trained.
        negatives, eps: as in `GGeM`.

    Example:
        >>> GeM(2, p=1.0)(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).round(decimals=4).tolist()
        [[2.0, 3.0]]

    Source: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018.
    """

    def __init__(
        self,
        dim: int,
        p: float = 3.0,
        learnable: bool = True,
        negatives: Negatives = "clamp",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, 1, p, learnable, negatives, eps)
