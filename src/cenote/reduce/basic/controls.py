"""What every reducer is compared with."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.reduced import Reduced, selected
from cenote.reduce.base import BudgetReducer


class FirstTokens(BudgetReducer):
    """The first tokens of a set; all others are dropped.

    Args:
        factor, tokens, fraction, rounding: how many are left, as `cenote.reduce.Budget`.

    Example:
        >>> FirstTokens(factor=2)(torch.arange(4.0).view(1, 4, 1)).tokens.flatten().tolist()
        [0.0, 1.0]
    """

    keeps = "members"
    order_matters = True

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        return selected(x, mask & (mask.cumsum(1) <= self.budget.of(mask.sum(1))[:, None]), sizes)


class RandomTokens(BudgetReducer):
    """Tokens drawn at random, for each set anew; all others are dropped.

    Args:
        factor, tokens, fraction, rounding: how many are left.
        seed: of the draw, which hangs on it and on the set's own tokens alone.

    Example:
        >>> RandomTokens(factor=2)(torch.rand(1, 8, 3)).tokens.shape
        torch.Size([1, 4, 3])
    """

    keeps = "members"
    order_matters = True

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        seed: int = 0,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        self.seed = seed

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        lengths = mask.sum(1)
        kept = torch.zeros_like(mask)
        for item, (n, count) in enumerate(zip(lengths.tolist(), self.budget.of(lengths).tolist(), strict=True)):
            own = mask[item].nonzero().squeeze(1)
            content = zlib.crc32(x[item, own].detach().cpu().contiguous().numpy().tobytes())
            generator = torch.Generator().manual_seed(self.seed * 2**32 + content)
            kept[item, own[torch.randperm(n, generator=generator)[:count].to(x.device)]] = True
        return selected(x, kept, sizes)


class EvenlySpacedTokens(BudgetReducer):
    """Tokens at even distances, as a strided grid takes them; all others are dropped.

    Args:
        factor, tokens, fraction, rounding: how many are left.

    Example:
        >>> EvenlySpacedTokens(tokens=3)(torch.arange(9.0).view(1, 9, 1)).tokens.flatten().tolist()
        [1.0, 4.0, 7.0]
    """

    keeps = "members"
    order_matters = True

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        lengths = mask.sum(1, keepdim=True)
        counts = self.budget.of(lengths.squeeze(1))[:, None]
        own = mask.cumsum(1) - 1
        # token n is the middle of the group that it falls into
        group = (own * counts).div(lengths.clamp(min=1), rounding_mode="floor")
        middle = ((2 * group + 1) * lengths).div(2 * counts.clamp(min=1), rounding_mode="floor")
        return selected(x, mask & (own == middle), sizes)


class TopTokens(BudgetReducer):
    """The tokens with the largest scores, the first ones among equals; all others are dropped.

    With scores that are what [CLS] attends to it is EViT's selection, with inverse document frequencies static pruning.

    Args:
        factor, tokens, fraction, rounding: how many are left.

    Example:
        >>> scores = torch.tensor([[0.1, 0.7, 0.2]])
        >>> TopTokens(tokens=2)(torch.arange(3.0).view(1, 3, 1), saliency=scores).tokens.flatten().tolist()
        [1.0, 2.0]
    """

    keeps = "members"
    needs = frozenset({"saliency"})

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        saliency: Float[Tensor, "batch tokens"],
    ) -> Reduced:
        return selected(x, largest(saliency, self.budget.of(mask.sum(1)), mask), sizes)


class TopAttentionTokens(TopTokens):
    """The tokens that are attended to most, means over the heads; all others are dropped.

    Args:
        factor, tokens, fraction, rounding: how many are left.

    Example:
        >>> attention = torch.tensor([[[0.1, 0.7, 0.2]]])
        >>> TopAttentionTokens(tokens=1)(torch.arange(3.0).view(1, 3, 1), attention=attention).assignment.tolist()
        [[-1, 0, -1]]

    Source:
        Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        arXiv 2202.07800, without its fused token.
    """

    needs = frozenset({"attention"})

    def reduce(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        attention: Float[Tensor, "batch heads tokens"],
    ) -> Reduced:
        return super().reduce(x, sizes, mask, saliency=attention.mean(1))


def largest(scores: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
    """True on the `counts` largest scores of each set, the first ones among equals."""
    order = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return mask & (rank < counts[:, None])
