"""Counting tokens by a mask alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.core import PaddedTokens
from cenote.core.masks import positions, real_tokens, without_first

MASKS = st.integers(0, 6).flatmap(
    lambda tokens: st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=1, max_size=4)
)


@given(MASKS)
def test_positions_number_the_real_tokens_wherever_padding_stands(rows: list[list[bool]]) -> None:
    expected = [[sum(row[:i]) if real else -1 for i, real in enumerate(row)] for row in rows]
    assert positions(torch.tensor(rows, dtype=torch.bool)).tolist() == expected


@given(MASKS, st.integers(0, 4))
def test_a_stack_of_layers_loses_the_tokens_that_a_set_loses(rows: list[list[bool]], count: int) -> None:
    mask = torch.tensor(rows, dtype=torch.bool)
    kept = without_first(torch.zeros(len(mask), 3, mask.shape[1], 2), mask, count)
    assert kept is not None
    dropped = PaddedTokens(torch.zeros(*mask.shape, 2), mask).drop_first(count)
    assert dropped.mask is not None
    assert kept.equal(dropped.mask)


def test_without_a_mask_every_token_is_real() -> None:
    assert real_tokens(torch.zeros(2, 3, 4, 5), None, tokens=2).equal(torch.ones(2, 4, dtype=torch.bool))
    assert without_first(torch.zeros(2, 3, 4, 5), None, 1).tolist() == [[False, True, True, True]] * 2


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False]])])
def test_nothing_dropped_leaves_the_mask_as_it_came(mask: torch.Tensor | None) -> None:
    assert without_first(torch.zeros(1, 1, 2, 1), mask, 0) is mask
