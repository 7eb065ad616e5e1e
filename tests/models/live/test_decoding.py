"""Decoders: padding on the left, a cache, beams, spans at later steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor

from cenote.models.live import AttentionCall, RowEdit, RowRecorder, Where, edited, recorded

DECODERS = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "mixtral",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "phi",
    "bert_decoder",
]
LENGTHS = (9, 7, 4, 6)
ATTENTIONS = [(name, a) for name in DECODERS for a in ("sdpa", "eager") if (name, a) in zoo.REACHED]


class Towards(RowEdit):
    """The last row of each step gives the span's keys three times the weight."""

    asks = ("named",)

    def queries(self, call: AttentionCall) -> Tensor:
        return call.last()

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        new = torch.where(call.keys_in("named")[:, None, None], 3.0 * weights, weights)
        return new / new.sum(-1, keepdim=True).clamp(min=1e-9) * weights.sum(-1, keepdim=True)


class TowardsBehind(Towards):
    """As `Towards`, for all rows from a token on: what its last rows were at earlier steps."""

    def __init__(self, first: int) -> None:
        self.first = first

    def queries(self, call: AttentionCall) -> Tensor:
        return call.numbers() + call.query_start >= self.first


def padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch padded on the left, and a span: the second and third word of each item."""
    words = zoo.ids(len(lengths), max(lengths))
    mask = torch.zeros_like(words)
    span = torch.zeros_like(words, dtype=torch.bool)
    for item, length in enumerate(lengths):
        start = words.shape[1] - length
        words[item, :start] = 0
        mask[item, start:] = 1
        span[item, start + 1 : start + 3] = True
    return {"input_ids": words, "attention_mask": mask}, {"named": span}


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    return model.generate(**inputs, **{**settings, **options}, return_dict_in_generate=True)


@pytest.mark.parametrize(("name", "attention"), zoo.one_by_one(ATTENTIONS))
def test_a_padded_batch_is_its_items(name: str, attention: str) -> None:
    model = zoo.MODELS[name](attention).model
    inputs, spans = padded()
    plain = generated(model, inputs)
    recorder = RowRecorder()
    with edited(model, Towards(), recorder, spans=spans) as run:
        batch = generated(model, inputs)
    steps = {step for _, step in run.effect}
    assert steps == set(range(5))
    # both edits chose one row of each item
    assert set(run.effect.values()) == {2 * len(LENGTHS)}
    assert not torch.equal(batch.logits[0], plain.logits[0])
    for item, length in enumerate(LENGTHS):
        alone = {key: value[item : item + 1, -length:] for key, value in inputs.items()}
        place_rows = RowRecorder()
        with edited(model, Towards(), place_rows, spans={"named": spans["named"][item : item + 1, -length:]}):
            single = generated(model, alone)
        for ours, theirs in zip(batch.logits, single.logits, strict=True):
            assert torch.allclose(ours[item], theirs[0], atol=2e-5)
        for place, rows in place_rows.found.items():
            assert torch.allclose(recorder.found[place][0][item, ..., -length:], rows[0][0], atol=1e-5)


@pytest.mark.parametrize(("name", "attention"), zoo.one_by_one(ATTENTIONS))
def test_a_cache_changes_nothing(name: str, attention: str) -> None:
    model = zoo.MODELS[name](attention).model
    inputs, spans = padded()
    with edited(model, Towards(), spans=spans):
        cached = generated(model, inputs)
    words = cached.sequences[:, :-1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    behind = {name: torch.nn.functional.pad(span, (0, 4)) for name, span in spans.items()}
    with torch.no_grad(), edited(model, TowardsBehind(8), spans=behind):
        once = model(input_ids=words, attention_mask=mask, **positions).logits[:, 8:]
    for step, logits in enumerate(cached.logits):
        assert torch.allclose(logits, once[:, step], atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_beams_repeat_the_spans(name: str) -> None:
    model = zoo.MODELS[name]("sdpa").model
    inputs, spans = padded()
    with edited(model, Towards(), spans=spans) as run:
        ours = generated(model, inputs, num_beams=3)
    assert set(run.effect.values()) == {3 * len(LENGTHS)}
    for item, length in enumerate(LENGTHS):
        alone = {key: value[item : item + 1, -length:] for key, value in inputs.items()}
        with edited(model, Towards(), spans={"named": spans["named"][item : item + 1, -length:]}):
            single = generated(model, alone, num_beams=3)
        assert torch.equal(ours.sequences[item, 9:], single.sequences[0, length:])


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_a_cache_with_room_for_more_is_the_same(name: str) -> None:
    model = zoo.MODELS[name]("sdpa").model
    inputs, spans = padded()
    with edited(model, Towards(), spans=spans):
        growing = generated(model, inputs)
    with edited(model, Towards(), spans=spans):
        static = generated(model, inputs, cache_implementation="static", disable_compile=True)
    for a, b in zip(growing.logits, static.logits, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_a_recorder_under_generate_keeps_every_step() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    inputs, _ = padded()
    with recorded(model, "rows", "states", at=Where(blocks=[0, 2])) as found:
        generated(model, inputs)
    assert [row.shape[-1] for row in next(iter(found["rows"].values()))] == [9, 10, 11, 12, 13]
    assert found["rows"].stack(2).shape == (2, 4, 4, 1, 11)
    assert [state.shape[1] for state in next(iter(found["states"].values()))] == [9, 1, 1, 1, 1]
