"""What is left of tokens after a reduction, and the way back."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.core.segments import accumulation_dtype


class Reduced(NamedTuple):
    """Fewer tokens.

    `tokens` `[batch, left, dim]`; `sizes` `[batch, left]`, how many originals each stands for; `assignment`
    `[batch, tokens]`, the reduced token that an original went to, -1 where it was dropped; `mask` `[batch, left]`, True = a
    real token, None for all.
    """

    tokens: Float[Tensor, "batch left dim"]
    sizes: Float[Tensor, "batch left"]
    assignment: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch left"] | None = None

    @property
    def real(self) -> Bool[Tensor, "batch left"]:
        """The mask, also where it is None."""
        return torch.ones_like(self.sizes, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def counts(self) -> Int[Tensor, "batch"]:
        """How many tokens are left of each set."""
        return self.real.sum(1)

    def expand(self, scores: Float[Tensor, "batch left *channels"]) -> Float[Tensor, "batch tokens *channels"]:
        """Scores or states of the reduced tokens, on the originals; zeros where these were dropped."""
        return expanded(scores, self.assignment)

    def then(self, after: Reduced) -> Reduced:
        """Both reductions as one: `after` is what became of this one's tokens.

        >>> two = Reduced(torch.zeros(1, 2, 1), torch.full((1, 2), 2.0), torch.tensor([[0, 0, 1, 1]]))
        >>> one = Reduced(torch.zeros(1, 1, 1), torch.full((1, 1), 2.0), torch.tensor([[-1, 0]]))
        >>> two.then(one).assignment.tolist()
        [[-1, -1, 0, 0]]
        """
        if after.assignment.shape != self.sizes.shape:
            raise InputError(
                f"after: expected what became of {list(self.sizes.shape)} tokens, got an assignment of "
                f"{list(after.assignment.shape)}"
            )
        onto = after.assignment.gather(1, self.assignment.clamp(min=0)) if self.sizes.shape[1] else self.assignment
        return after._replace(assignment=torch.where(self.assignment < 0, self.assignment, onto))

    def positions(
        self,
        original: Shaped[Tensor, "batch tokens"] | None = None,
        rule: Literal["first", "mean", "heaviest"] = "first",
        sizes: Float[Tensor, "batch tokens"] | None = None,
    ) -> Shaped[Tensor, "batch left"]:
        """Positions of what is left; 0 where there is none.

        Args:
            original: positions of the originals; None for 0, 1, 2, ...
            rule: the position of a token's first original, of its largest one by `sizes` (the first among equals), or their
                mean.
            sizes: of the originals, None for all alike.
        """
        require_one_of(("first", "mean", "heaviest"), rule=rule)
        batch, tokens = self.assignment.shape
        left = self.sizes.shape[1]
        if original is None:
            original = torch.arange(tokens, device=self.assignment.device).expand(batch, -1)
        weights = torch.ones_like(original, dtype=torch.float32) if sizes is None else sizes.float()
        if rule == "mean":
            total = _into(weights * original, self.assignment, left)
            return total / _into(weights, self.assignment, left).clamp(min=torch.finfo(torch.float32).tiny)
        if rule == "first":
            weights = torch.zeros_like(weights)
        heaviest = weights.new_full((batch, left + 1), -torch.inf)
        slot = self.assignment.remainder(left + 1)  # -1 goes to the last, which is nobody's
        heaviest = heaviest.scatter_reduce(1, slot, weights, "amax")
        at = torch.arange(tokens, device=slot.device).expand(batch, -1)
        at = at.masked_fill(weights < heaviest.gather(1, slot), tokens)
        first = torch.full((batch, left + 1), tokens, device=slot.device).scatter_reduce(1, slot, at, "amin")[:, :left]
        return original.gather(1, first.clamp(max=tokens - 1)).masked_fill(first == tokens, 0)

    def dropped(self, mask: Bool[Tensor, "batch tokens"] | None = None) -> Int[Tensor, "batch"]:
        """How many real originals of each set went nowhere.

        Args:
            mask: of the originals, None for all.
        """
        gone = self.assignment < 0
        return (gone if mask is None else gone & mask).sum(1)


def expanded(
    scores: Float[Tensor, "batch left *channels"], assignment: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens *channels"]:
    """For each original what its reduced token has; zeros for -1."""
    item = torch.arange(len(assignment), device=assignment.device)[:, None]
    found = scores[item, assignment.clamp(min=0)]
    kept = (assignment >= 0).view(*assignment.shape, *[1] * (scores.dim() - 2))
    return torch.where(kept, found, torch.zeros_like(found))


def merged(
    x: Float[Tensor, "batch tokens dim"],
    assignment: Int[Tensor, "batch tokens"],
    left: int,
    sizes: Float[Tensor, "batch tokens"] | None = None,
    weights: Float[Tensor, "batch tokens"] | None = None,
) -> Reduced:
    """Weighted means of what went to the same token: `y_k = sum_n w_n x_n / sum_n w_n`, over the `n` assigned to `k`.

    What one original alone went to is this original, bit for bit.

    Args:
        x: the originals.
        assignment: the reduced token of each, -1 for none.
        left: number of reduced tokens; one that got no original is padding.
        sizes: how many originals each stands for already, None for 1.
        weights: `w`, at least zero; None for the sizes. Where those of a token sum to zero, its originals count alike.
    """
    wide = accumulation_dtype(x.dtype)
    sizes = x.new_ones(x.shape[:2], dtype=wide) if sizes is None else sizes.to(wide)
    if not left:
        return Reduced(x[:, :0], sizes[:, :0], assignment, assignment[:, :0] >= 0)
    members = _into(torch.ones_like(sizes), assignment, left)
    weights = sizes if weights is None else weights.to(wide)
    total = _into(weights, assignment, left)
    if bool(((total <= 0) & (members > 0)).any()):
        weights = torch.where((total <= 0).gather(1, assignment.clamp(min=0)), torch.ones_like(weights), weights)
        total = _into(weights, assignment, left)
    share = weights / total.gather(1, assignment.clamp(min=0)).masked_fill(assignment < 0, 1.0)
    # a share of exactly 1 keeps the bits of a token that went alone
    alone = members.gather(1, assignment.clamp(min=0)) == 1
    share = torch.where(alone, torch.ones_like(share), share)
    tokens = _into(share.unsqueeze(-1) * x.to(wide), assignment, left).to(x.dtype)
    return Reduced(tokens, _into(sizes, assignment, left), assignment, members > 0)


def selected(
    x: Float[Tensor, "batch tokens dim"],
    kept: Bool[Tensor, "batch tokens"],
    sizes: Float[Tensor, "batch tokens"] | None = None,
) -> Reduced:
    """Some of the tokens, in their order; the others are dropped.

    Args:
        x: the originals.
        kept: which stay; False in padding.
        sizes: how many originals each stands for already, None for 1.
    """
    counts = kept.sum(1, keepdim=True)
    left = int(counts.max()) if counts.numel() else 0
    at = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :left]
    mask = torch.arange(left, device=x.device) < counts
    sizes = torch.ones_like(x[..., 0], dtype=accumulation_dtype(x.dtype)) if sizes is None else sizes
    assignment = torch.where(kept, kept.cumsum(1) - 1, -1)
    item = torch.arange(len(x), device=x.device)[:, None]
    tokens = x[item, at].masked_fill(~mask.unsqueeze(-1), 0.0)
    return Reduced(tokens, sizes.gather(1, at).masked_fill(~mask, 0.0), assignment, mask)


def in_order(reduced: Reduced) -> Reduced:
    """The same with its tokens in the order of their first originals, padding last and cut off where no set needs it."""
    batch, left = reduced.sizes.shape
    real, tokens = reduced.real, reduced.assignment.shape[1]
    # one for which nobody came is last
    first = torch.full((batch, left + 1), tokens, device=real.device)
    at = torch.arange(tokens, device=real.device).expand(batch, -1)
    first = first.scatter_reduce(1, reduced.assignment.remainder(left + 1), at, "amin")[:, :left]
    order = first.masked_fill(~real, tokens + 1).argsort(dim=1, stable=True)
    most = int(real.sum(1).max()) if real.numel() else 0
    place = torch.empty_like(order).scatter(1, order, torch.arange(left, device=order.device).expand(batch, -1))
    order = order[:, :most]
    item = torch.arange(batch, device=order.device)[:, None]
    assignment = reduced.assignment
    if left:
        assignment = torch.where(assignment < 0, assignment, place.gather(1, assignment.clamp(min=0)))
    return Reduced(reduced.tokens[item, order], reduced.sizes[item, order], assignment, real[item, order])


def _into(
    values: Float[Tensor, "batch tokens *channels"], assignment: Int[Tensor, "batch tokens"], left: int
) -> Float[Tensor, "batch left *channels"]:
    """Sums of what went to each token."""
    out = values.new_zeros(values.shape[0], left + 1, *values.shape[2:])
    slot = assignment.remainder(left + 1).view(*assignment.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return out.scatter_add(1, slot, values)[:, :left]
