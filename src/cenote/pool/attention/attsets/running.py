from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.segments import accumulation_dtype
from cenote.core.sets import as_tokens
from cenote.pool.attention.attsets.pool import AttSets


class RunningAttSets:
    """`AttSets` of views that come one by one: after each, the output is that of all so far at once.

    Kept are, per channel, the largest score `m`, `sum_n exp(c_n - m)` and `sum_n exp(c_n - m) x_n`, and no view.

    Args:
        pool: whose weights are used.

    Example:
        >>> pool, views = AttSets(8), torch.randn(2, 5, 8)
        >>> running = RunningAttSets(pool)
        >>> for view in views.split(1, 1):
        ...     y = running.add(view)
        >>> torch.allclose(y, pool(views), atol=1e-6)
        True

    Source: as `AttSets`; the running form is ours.
    """

    def __init__(self, pool: AttSets) -> None:
        self.pool = pool
        self._state: tuple[Tensor, Tensor, Tensor] | None = None

    def add(
        self, x: Float[Tensor, "batch views dim"], mask: Bool[Tensor, "batch views"] | None = None
    ) -> Float[Tensor, "batch outputs_dim"]:
        """Take in further views of each set, one or several; `mask` is True on real ones.

        Raises:
            InputError: where the views have another width.
        """
        tokens = as_tokens(x, mask, self.pool.dim)
        wide = accumulation_dtype(tokens.values.dtype)
        scores = self.pool._scores(tokens).to(wide)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        if self._state is None:
            nothing = scores.new_zeros(len(x), self.pool.out_dim)
            self._state = torch.full_like(nothing, torch.finfo(wide).min), nothing, nothing
        top, total, taken = self._state
        highest = torch.maximum(top, scores.detach().amax(1)) if scores.shape[1] else top
        shares = (scores - highest.unsqueeze(1)).exp()
        kept = (top - highest).exp()
        values = tokens.values.to(wide).repeat(1, 1, self.pool.outputs)
        total = kept * total + shares.sum(1)
        taken = kept * taken + (shares * values).sum(1)
        self._state = highest, total, taken
        return (taken / total.clamp(min=torch.finfo(wide).tiny)).to(tokens.values.dtype)
