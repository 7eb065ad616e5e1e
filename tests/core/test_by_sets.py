"""A few sets at a time give what all together give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from cenote.core import Bags, PaddedTokens, Tokens
from cenote.core.by_sets import by_sets
from tests.core.batches import Batch, batches, make_batch


@given(batches())
def test_parts_give_what_the_whole_gives(batch: Batch) -> None:
    for tokens in (batch.padded(), batch.bags()):
        for numbers in (1, 7, 20):
            torch.testing.assert_close(by_sets(lambda t: t.sum(), tokens, numbers), tokens.sum())


@pytest.mark.parametrize("form", ["padded", "masked", "ragged"])
def test_gradients_are_those_of_the_whole(form: str) -> None:
    batch = make_batch([3, 0, 5, 1], 4, seed=0, fill=0.0)

    def gradient(numbers: int) -> Tensor:
        leaf = (batch.bags().values if form == "ragged" else batch.x).clone().requires_grad_()
        tokens: Tokens = (
            Bags(leaf, batch.bags().offsets)
            if form == "ragged"
            else PaddedTokens(leaf, batch.mask if form == "masked" else None)
        )
        return torch.autograd.grad(by_sets(lambda t: t.std(), tokens, numbers).square().sum(), leaf)[0]

    torch.testing.assert_close(gradient(10), gradient(10_000))


def test_no_part_holds_more_than_was_asked_for_unless_a_set_does() -> None:
    seen: list[int] = []

    def look(tokens: Tokens) -> Tensor:
        seen.append(tokens.values.numel())
        return tokens.sum()

    lengths = torch.tensor([3, 4, 0, 50, 1, 2])
    bags = Bags(torch.randn(60, 2), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    by_sets(look, bags, 14)
    assert seen == [14, 100, 6]
    seen.clear()
    by_sets(look, PaddedTokens(torch.randn(7, 5, 2)), 25)
    assert seen == [20, 20, 20, 10]
