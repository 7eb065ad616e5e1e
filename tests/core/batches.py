"""Random batches of sets for property tests: the same sets ragged, padded, and one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from cenote.core import Bags, PaddedTokens


@dataclass(frozen=True)
class Batch:
    """The same sets three times; padded slots may stand anywhere and hold NaN."""

    sets: tuple[Tensor, ...]
    x: Tensor
    mask: Tensor

    @property
    def dim(self) -> int:
        return self.x.shape[-1]

    def bags(self) -> Bags:
        return Bags.from_list(self.sets)

    def padded(self) -> PaddedTokens:
        return PaddedTokens(self.x, self.mask)

    def pad(self, ragged: Tensor) -> Tensor:
        """Rows of the ragged form in the slots of the padded form, NaN in the others."""
        out = ragged.new_full((*self.mask.shape, ragged.shape[-1]), float("nan"))
        return out.masked_scatter(self.mask.unsqueeze(-1), ragged)


def make_batch(lengths: list[int], dim: int, seed: int, slots: int | None = None, fill: float = float("nan")) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sets = tuple(torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in lengths)
    slots = max(lengths) if slots is None else slots
    mask = torch.zeros(len(lengths), slots, dtype=torch.bool)
    for b, n in enumerate(lengths):
        mask[b, torch.randperm(slots, generator=generator)[:n]] = True
    x = torch.full((len(lengths), slots, dim), fill, dtype=torch.float64)
    x[mask] = torch.cat(sets)
    return Batch(sets, x, mask)


@st.composite
def batches(draw: st.DrawFn, max_sets: int = 5, max_tokens: int = 6, max_dim: int = 4) -> Batch:
    lengths = draw(st.lists(st.integers(0, max_tokens), min_size=1, max_size=max_sets))
    return make_batch(
        lengths,
        draw(st.integers(1, max_dim)),
        draw(st.integers(0, 2**16)),
        max(lengths) + draw(st.integers(0, 2)),
        draw(st.sampled_from([float("nan"), float("inf"), 1e30])),
    )
