"""What is said to be within reach is, with as many heads as are said; what is not, is refused for that reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.models.live import zoo

from cenote.core import InputError
from cenote.models.live import HeadRecorder, InputsRecorder, Where, edited, reach


@pytest.fixture
def in_pieces() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize(("name", "attention"), zoo.REACHED)
def test_heads_are_those_of_the_calls(name: str, attention: str) -> None:
    case = zoo.MODELS[name](attention)
    within = {
        (found.stack, found.kind, block): (found.heads, found.kv_heads)
        for found in reach(case.model)
        if found.why_not is None
        for block in found.blocks
    }
    recorder = InputsRecorder()
    with torch.no_grad(), edited(case.model, recorder):
        case.model(**case.inputs)
    for place, calls in recorder.found.items():
        assert within[place.stack, place.kind, place.block] == (calls[0].heads, calls[0].k.shape[1])


@pytest.mark.parametrize("name", ["bloom", "torch"])
def test_what_is_out_of_reach_says_why(name: str) -> None:
    case = zoo.MODELS[name]("eager")
    (found,) = reach(case.model)
    assert found.why_not is not None
    assert found.edits == ()
    with pytest.raises(InputError) as raised, edited(case.model, HeadRecorder(at=Where(stack=found.stack))):
        pytest.fail("entered")
    assert found.why_not in str(raised.value)


def test_attention_outside_of_blocks_is_named() -> None:
    *towers, head = reach(zoo.MODELS["siglip"]("sdpa").model)
    assert [tower.why_not for tower in towers] == [None, None]
    assert (head.stack, head.why_not) == ("", "it stands outside of the model's blocks")


def test_masks_are_edited_only_where_they_are_tensors() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    assert "allowed" in reach(model)[0].edits
    model.config._attn_implementation = "flash_attention_2"
    (found,) = reach(model)
    assert (found.attention, found.why_not) == ("flash_attention_2", None)
    assert "allowed" not in found.edits
    assert "rows" in found.edits
