from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_positive
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens, as_tokens
from cenote.pool.base import Pool, Pooled


class Grouped(NamedTuple):
    """Slots `[batch, slots, dim]` and the cosine maps `dots [batch, slots, height, width]` that made them."""

    slots: Float[Tensor, "batch slots dim"]
    dots: Float[Tensor, "batch slots height width"]


class SemanticGrouping(Pool):
    """Prototypes share out the tokens among themselves; each pools those that fall to it into a slot.

    `d_kn = cos(c_k, x_n)`, `A_kn = exp(d_kn / temp) / sum_j exp(d_jn / temp) + eps`, `slot_k = sum_n A_kn x_n / sum_n A_kn`.

    The softmax runs over the prototypes, the normalisation over the tokens, as one step of slot attention without its
    update network. The weights are `A_kn / sum_m A_km`.

    Args:
        dim: width of a token.
        slots: number `K` of prototypes and of output vectors.
        temp: temperature of the softmax.
        eps: least share of every prototype in every token, so that no slot is empty.

    Raises:
        InputError: where a number is not positive.

    Example:
        >>> grouping = SemanticGrouping(8, slots=3)
        >>> grouping(torch.randn(2, 50, 8)).shape
        torch.Size([2, 3, 8])
        >>> slots, dots = grouping.group(torch.randn(2, 8, 7, 7))  # a map
        >>> dots.argmax(1).shape  # which group each pixel belongs to
        torch.Size([2, 7, 7])

    Source: Wen et al., "Self-Supervised Visual Representation Learning with Semantic Grouping", NeurIPS 2022.

    Note:
        The paper takes 256 prototypes for the whole of COCO and 2048 for ImageNet.
    """

    def __init__(self, dim: int, slots: int = 256, temp: float = 0.07, eps: float = 1e-6) -> None:
        super().__init__(dim)
        require_positive(slots=slots, temp=temp, eps=eps)
        self.vectors = slots
        self.temp = temp
        self.eps = eps
        self.slot_embed = nn.Parameter(torch.randn(slots, dim))
        self.inert_parameters = ("slot_embed",) if slots == 1 else ()

    def pool(self, tokens: Tokens) -> Pooled:
        weights = self._weights(tokens, self._dots(tokens))
        slots = tokens.weighted_sum(weights)
        return Pooled(slots.squeeze(1) if self.vectors == 1 else slots, weights)

    def dots(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "*rows slots"]:
        """Cosine of each token with each prototype, `[batch, tokens, slots]` (`[total, slots]` for `Bags`)."""
        tokens = as_tokens(x, mask, self.dim)
        return self._dots(tokens).to(tokens.values.dtype)

    def group(self, x: Float[Tensor, "batch dim height width"]) -> Grouped:
        """The slots of feature maps, and the cosine of each place with each prototype."""
        tokens = as_tokens(x, None, self.dim)
        dots = self._dots(tokens)
        slots = tokens.weighted_sum(self._weights(tokens, dots))
        return Grouped(slots, dots.to(x.dtype).transpose(1, 2).unflatten(2, x.shape[2:]))

    def _dots(self, tokens: Tokens) -> Float[Tensor, "*rows slots"]:
        wide = accumulation_dtype(tokens.values.dtype)
        scores = tokens.scores(F.normalize(self.slot_embed.to(wide), dim=-1).to(tokens.values.dtype)).to(wide)
        # the prototypes are few, so that this reads the tokens once more but never copies them
        return scores / tokens.values.to(wide).norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def _weights(self, tokens: Tokens, dots: Float[Tensor, "*rows slots"]) -> Float[Tensor, "*rows slots"]:
        share = tokens.replace((dots / self.temp).softmax(-1) + self.eps)
        total = share.sum().clamp(min=torch.finfo(dots.dtype).tiny)
        return (share.values / share.spread(total)).to(tokens.values.dtype)
