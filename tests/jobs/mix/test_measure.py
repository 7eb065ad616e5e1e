"""What is measured of a decoder is what a plain loop finds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.jobs.mix import decoders
from torch import Tensor

from cenote.core import InputError
from cenote.jobs.mix import measure
from cenote.jobs.mix.measure import Bench, by_depth
from cenote.mix import H2O, Dense, Quest, SinkWindow

LENGTH, FACTS = 60, 3


@pytest.fixture(scope="module", autouse=True)
def one_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PASSAGES", 1)
        patch.setattr(measure, "TRIES", 3)
        yield


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(decoders.model(), decoders.tokenizer(), decoders.texts(), FACTS, LENGTH)


def whole(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return found


def test_contexts_hold_facts_and_have_the_length_that_was_asked_for(bench: Bench) -> None:
    words = decoders.tokenizer()
    assert len(bench.facts) == len(set(bench.facts)) == FACTS
    assert sum(bench.per_depth) == FACTS
    assert all(0 <= depth <= 1 for depth in bench.depths)
    for made in bench.contexts:
        assert LENGTH - 20 < made.asked.context.shape[1] <= LENGTH
        text = words.decode(made.asked.context[0])
        for row in made.asked.prompt:
            assert words.decode(row[row != 0])[1:].strip() in text.replace("  ", " ")
    assert [passage.shape for passage in bench.passages] == [(1, LENGTH)]


def test_dense_is_the_model_as_it_is(bench: Bench) -> None:
    seen = bench.read(Dense())
    losses, said = [], []
    for passage in bench.passages:
        logits = whole(bench.model, passage[0].tolist())
        for at in range(LENGTH // 2, LENGTH - 1):
            losses.append(-logits[at, passage[0, at + 1]])
            said.append(logits[at].argmax())
    torch.testing.assert_close(seen.loss, torch.stack(losses), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen.said, torch.stack(said))
    facts = []
    for made in bench.contexts:
        for row, mask, labels in zip(made.asked.prompt, made.asked.mask, made.asked.labels, strict=True):
            ids = made.asked.context[0].tolist() + row[mask].tolist()
            asked = [at for at, label in enumerate(labels[mask].tolist()) if label >= 0]
            logits, first = whole(bench.model, ids), made.asked.context.shape[1]
            facts.append(-sum(float(logits[first + at - 1, row[mask][at]]) for at in asked))
    torch.testing.assert_close(seen.fact_loss, torch.tensor(facts, dtype=torch.double), rtol=1e-4, atol=1e-4)
    assert (seen.share, len(bench.stretches)) == (1.0, len(seen.loss))
    assert seen.most == max(
        LENGTH - 1, *(m.asked.context.shape[1] + m.asked.prompt.shape[1] - 1 for m in bench.contexts)
    )


def test_questions_together_are_those_by_themselves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    together = bench.read(Quest(8, page=4))
    monkeypatch.setattr(measure, "ROOM", 1)
    alone = bench.read(Quest(8, page=4))
    torch.testing.assert_close(alone.fact_loss, together.fact_loss, rtol=1e-4, atol=1e-4)
    assert (alone.share, alone.keys, alone.most) == (together.share, together.keys, together.most)


def test_keys_are_counted_in_the_store(bench: Bench) -> None:
    seen = bench.read(SinkWindow(12))
    assert (seen.most, seen.keys) == (12, pytest.approx(12))
    assert 0.2 < seen.share < 0.4
    whole, forgetful = bench.read(Dense()), bench.read(H2O(12))
    assert forgetful.most == 12
    # of a layer, two key heads of 4 channels, keys and values, with room for 64 tokens at least
    assert whole.bytes == forgetful.bytes == 64 * 2 * 2 * 4 * 4


def test_time_is_taken_in_turn_with_the_model_as_it_is(bench: Bench) -> None:
    times = bench.speed(SinkWindow(12))
    assert [len(t) for t in (times.own, times.loaded, times.exact)] == [3, 3, 3]
    assert min(times.prefill, times.prefill_loaded, *times.own, *times.loaded, *times.exact) > 0
    dense = bench.speed(None)
    assert (dense.own, dense.prefill) == (dense.loaded, dense.prefill_loaded)


def test_facts_are_counted_by_depth() -> None:
    assert by_depth([1, 0, 1, 1], [0.0, 0.3, 0.9, 1.0])[1:2] == (0.0,)
    assert by_depth([1, 0, 1, 1], [0.0, 0.3, 0.9, 1.0])[3] == 1.0


def test_the_digest_is_of_all_that_is_measured(bench: Bench) -> None:
    def of(model: Any = None, **settings: Any) -> str:
        asked = {"facts": FACTS, "length": LENGTH, **settings}
        return Bench.of(model or decoders.model(), decoders.tokenizer(), decoders.texts(), **asked).fingerprint()

    assert of() == bench.fingerprint()
    others = {of(decoders.model(rms_norm_eps=1e-3)), of(seed=1), of(facts=2), of(length=70), bench.fingerprint()}
    assert len(others) == 5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"length": 159}, "length: a context and a question are 1.."),
        ({"length": 500}, "length: a context and a question are 500 tokens, and the model has 160 positions"),
        ({"length": 17}, "length: 17 tokens do not hold a fact"),
        ({"length": 3}, "length"),
        ({"facts": 0}, "facts"),
        ({"facts": 61}, "texts: 61 facts in contexts of 60 tokens take about"),
        ({"texts": []}, "texts: hold no sentence"),
        ({"texts": ["The flow separates."]}, "texts: 3 facts in contexts of 60 tokens take about"),
        ({"texts": [" ".join(["flow"] * 200) + "."]}, "texts: sentence 1 alone has 60 tokens"),
    ],
)
def test_wrong_input_is_one_line(given: dict[str, Any], told: str) -> None:
    asked = {"facts": FACTS, "length": LENGTH, "texts": decoders.texts(), **given}
    with pytest.raises(InputError, match=told) as error:
        Bench.of(decoders.model(), decoders.tokenizer(), asked.pop("texts"), **asked)
    assert "\n" not in str(error.value)
