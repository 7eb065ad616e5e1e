"""Masked inputs: every mask gives what the model gives alone, equal masks run once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.perturb import dropped, of_tokens, perturbed

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
KEEP = torch.rand(4, 9, 6, generator=torch.Generator().manual_seed(1)) > 0.4


class Counting:
    def __init__(self) -> None:
        self.rows: list[tuple[int, tuple[bool, ...]]] = []
        self.kept: list[int] = []

    def __call__(self, items: Tensor, keep: Tensor) -> Tensor:
        self.rows += [(int(i), tuple(k.tolist())) for i, k in zip(items, keep, strict=True)]
        self.kept += keep.sum(1).tolist()
        return torch.stack([(X[items] * keep).sum(1), (X[items].exp() * keep).sum(1)], 1)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_every_mask_gives_what_it_gives_alone(batch: int) -> None:
    found = perturbed(Counting(), KEEP, batch=batch)
    assert found.shape == (4, 9, 2)
    torch.testing.assert_close(found[..., 0], (X[:, None] * KEEP).sum(2))
    torch.testing.assert_close(found[..., 1], (X.exp()[:, None] * KEEP).sum(2))


def test_equal_masks_of_an_item_run_once_and_the_longest_first() -> None:
    counting = Counting()
    keep = torch.cat([KEEP, KEEP.flip(1), torch.ones(4, 2, 6, dtype=torch.bool)], 1)
    perturbed(counting, keep, batch=7)
    assert len(counting.rows) == len(set(counting.rows))
    assert counting.kept == sorted(counting.kept, reverse=True)


def test_what_masks_say_of_padding_makes_no_difference() -> None:
    counting = Counting()
    real = torch.ones(4, 6, dtype=torch.bool)
    real[:, 4:] = False
    keep = torch.stack([KEEP[:, 0], KEEP[:, 0]], 1)
    keep[:, 1, 4:] = ~keep[:, 1, 4:]
    found = perturbed(counting, keep, real)
    assert len(counting.rows) == 4
    assert torch.equal(found[:, 0], found[:, 1])


def test_tokens_of_no_unit_stay() -> None:
    unit = torch.tensor([[-1, 0, 0, 1, -1]])
    assert of_tokens(torch.tensor([[False, True]]), unit).tolist() == [[True, False, False, True, True]]


def test_dropped_keeps_the_order_and_pads_on_the_right() -> None:
    x = torch.arange(12).view(2, 3, 2)
    keep = torch.tensor([[False, True, True], [True, False, False]])
    found, real = dropped(x, keep)
    assert found.tolist() == [[[2, 3], [4, 5]], [[6, 7], [0, 0]]]
    assert real.tolist() == [[True, True], [True, False]]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InputError, match="keep: expected"):
        perturbed(Counting(), torch.ones(4, 0, 6, dtype=torch.bool))
    with pytest.raises(InputError, match=r"real: expected \[4, 6\]"):
        perturbed(Counting(), KEEP, torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="batch"):
        perturbed(Counting(), KEEP, batch=0)
