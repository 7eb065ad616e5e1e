"""Edits of one part of the batch: the others pass by, and what all parts share cannot be changed for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor

from cenote.core import InputError
from cenote.models.live import (
    AblatedHeads,
    AddedStates,
    AttentionCall,
    AttentionEdit,
    BlockEdit,
    Place,
    RowRecorder,
    Shorten,
    edited,
    of_part,
)

WORDS = zoo.ids(4, 6)


def logits(model: Any, *edits: Any, words: Tensor = WORDS, **spans: Tensor) -> Tensor:
    with torch.no_grad():
        if not edits:
            return model(words).logits
        with edited(model, *edits, spans=spans):
            return model(words).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("edit", [AblatedHeads([(0, 1), (2, 3)]), AddedStates({1: torch.ones(32)})])
def test_the_others_pass_by(edit: Any, attention: str) -> None:
    model = zoo.MODELS["llama"](attention).model
    plain, whole = logits(model), logits(model, edit)
    for number in range(2):
        mine, others = slice(2 * number, 2 * number + 2), slice(2 - 2 * number, 4 - 2 * number)
        ours = logits(model, of_part(edit, number, 2))
        assert torch.equal(ours[others], plain[others])
        assert torch.allclose(ours[mine], whole[mine], atol=1e-6)
        assert not torch.allclose(ours[mine], plain[mine], atol=1e-3)


def test_spans_are_the_parts_own_or_those_of_all() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    span = torch.zeros(4, 6, dtype=torch.bool)
    span[:2, 1] = span[2:, 4] = True
    everywhere = RowRecorder("named")
    logits(model, everywhere, named=span)
    own, of_all = RowRecorder("named"), RowRecorder("named")
    logits(model, of_part(own, 1, 2, {"named": span[2:]}))
    logits(model, of_part(of_all, 1, 2), named=span)
    assert torch.equal(own.found.stack(), everywhere.found.stack()[:, 2:])
    assert torch.equal(of_all.found.stack(), own.found.stack())


class Capped(AttentionEdit):
    def inputs(self, call: AttentionCall) -> AttentionCall:
        return call.replace(softcap=2.0)


class Shorter(BlockEdit):
    def leaves(self, place: Place, h: Tensor) -> Tensor:
        return h[:, 1:]


def test_what_cannot_be() -> None:
    model = zoo.MODELS["llama"]("eager").model
    with pytest.raises(InputError, match="number: 2 of 2 parts"):
        of_part(AblatedHeads([(0, 1)]), 2, 2)
    with pytest.raises(InputError, match="needs 'named', and there are: none"):
        of_part(RowRecorder("named"), 0, 2, {})
    with pytest.raises(InputError, match="expected AttentionEdit or BlockEdit, got str"):
        of_part("none", 0, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"acts on part 0 of 3, and .* computes 4 items"):
        logits(model, of_part(AblatedHeads([(0, 1)]), 0, 3))
    with pytest.raises(InputError, match="the soft cap or the sinks"):
        logits(model, of_part(Capped(), 0, 2))
    with pytest.raises(InputError, match=r"became \(2, 5, 32\) from \(2, 6, 32\)"):
        logits(model, of_part(Shorter(), 0, 2))


def test_what_acts_on_the_whole_batch_is_no_edit_of_a_part() -> None:
    with pytest.raises(InputError, match="Shorten acts on a batch as a whole"):
        of_part(Shorten(lambda x, sizes=None, mask=None: None, block=0), 0, 2)
