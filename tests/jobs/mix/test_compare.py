"""Policies compared: what is always there, what is kept, what is refused, and what is said of known answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.jobs.mix import decoders
from tests.jobs.mix.planted import Last, Made, compared, first

from cenote.core import InputError
from cenote.jobs.mix import PolicyFrontier, benched, compare_policies, measure
from cenote.jobs.mix.arms import Read, arms, count, named
from cenote.jobs.mix.plan import planned

ASKED: dict[str, Any] = {"facts": 3, "length": 60}
FEW, MANY = 24, 160


@pytest.fixture(scope="module", autouse=True)
def one_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PASSAGES", 1)
        patch.setattr(measure, "TRIES", 2)
        patch.setattr(measure, "STRETCH", 8)
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mix") / "out"


@pytest.fixture(scope="module")
def found(kept: Path) -> PolicyFrontier:
    return run(kept)


def run(out: Path | None = None, policies: Any = ("quest-small-pages", "h2o"), **more: Any) -> PolicyFrontier:
    asked = {**ASKED, "budgets": (12,), **more}
    return compare_policies(decoders.model(), decoders.tokenizer(), decoders.texts(), policies, out=out, **asked)


def test_controls_and_the_model_as_it_is_are_always_there(found: PolicyFrontier) -> None:
    assert {r.method: r.role for r in found.results} == {
        "dense": "dense", "sink-window 12": "window", "random-keys 12": "random", "oracle-top-k 12": "oracle",
        "quest-small-pages 12": "policy", "h2o 12": "policy",
    }  # fmt: skip
    assert set(found.controls) == {"sink-window 12", "random-keys 12"}
    assert found.references == ("oracle-top-k 12",)
    assert found.baseline == "dense"
    whole = found["dense"]
    assert (whole.share, whole.agreement, whole.over_dense, whole.over_window) == (1.0, 1.0, (0.0, 0.0, 0.0), ())
    for r in found.results:
        if r.role != "dense":
            assert r.most == 12
            assert r.over_dense[1] < r.over_dense[0] < r.over_dense[2]
            assert r.over_dense[0] == pytest.approx(r.log_loss - whole.log_loss, abs=1e-9)
            assert 0 < r.agreement <= 1
        assert min(r.ms, r.loaded_ms, r.exact_ms, r.prefill_s) > 0
        assert (len(r.over_window) == 3) == (r.role not in ("dense", "window"))


def test_what_forgets_is_said_to(found: PolicyFrontier) -> None:
    assert {row["method"]: row["memory"] for row in found.table} == {
        r.method: "forgets" if r.policy == "h2o" else "keeps all" for r in found.results
    }
    assert found.best(loss=1.0, forgets=True) == "h2o 12"
    assert found.best(loss=1.0, forgets=False) in ("sink-window 12", "quest-small-pages 12")


def test_a_model_that_tells_nothing_gives_no_verdict(found: PolicyFrontier) -> None:
    assert found.verdict.startswith("No verdict: with all keys the model tells 0 of 3 facts")
    assert found.recommended == "dense"


def test_finished_cells_are_found_again(found: PolicyFrontier, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a finished cell is measured again")

    monkeypatch.setattr(Read, "run", never)
    again = run(kept)
    # facts at some depth there may be none
    assert repr(again.results) == repr(found.results) == repr(PolicyFrontier.load(kept).results)
    assert PolicyFrontier.load(kept).sentence == found.sentence
    with pytest.raises(AssertionError):
        run(kept, seed=1)


def test_an_interrupted_run_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, done = Read.run, []

    def interrupted(arm: Read, *given: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(arm.name)
        return whole(arm, *given)

    monkeypatch.setattr(Read, "run", interrupted)
    part = run(tmp_path, "h2o")
    assert (part.complete, [r.method for r in part.results]) == (False, ["dense"])
    assert part.verdict.startswith("No verdict: no policy was measured")


def test_frames_have_a_row_per_arm(found: PolicyFrontier) -> None:
    pytest.importorskip("pandas")
    frame = found.to_frame()
    assert set(frame.index) == {r.method for r in found.results}
    assert frame.loc["dense", "share"] == 1.0


def test_a_plan_is_of_the_arms_that_would_be_measured() -> None:
    bench = benched(decoders.model(), decoders.tokenizer(), decoders.texts(), **ASKED)
    made, skipped = arms(bench, "fast", (16, 32))
    assert "quest 16" in skipped
    plan = planned(bench, made, skipped)
    assert plan.skipped == skipped
    assert [arm.name for arm in plan.arms] == [arm.name for arm in made]
    assert plan.seconds == pytest.approx(sum(arm.seconds for arm in plan.arms))
    assert min(arm.seconds for arm in plan.arms) > 0


def test_a_policy_of_layers_that_a_model_lacks_is_left_out_and_said() -> None:
    bench = benched(decoders.model(num_hidden_layers=3), decoders.tokenizer(), decoders.texts(), **ASKED)
    made, skipped = arms(bench, "tidaldecode,tidaldecode-once", (12,))
    plan = planned(bench, made, skipped)
    assert list(plan.skipped) == ["tidaldecode 12"]
    assert plan.skipped["tidaldecode 12"].startswith("correction: layer 9 of a model of 3 layers")
    assert plan.arms[-1].name == "tidaldecode-once 12"
    assert {"tidaldecode", "tidaldecode-once"} <= set(named("all")[0]) - set(named("fast")[0])


def test_a_policy_that_reads_more_than_its_budget_stands_beside_a_window_that_reads_as_much() -> None:
    found = compare_policies(
        decoders.model(num_hidden_layers=3),
        decoders.tokenizer(),
        decoders.texts(),
        "tidaldecode-once",
        (8, 24),
        **ASKED,
    )
    for name in ("tidaldecode-once 8", "tidaldecode-once 24"):
        result = found[name]
        assert result.most > 24
        beside = found.window_of(result)
        assert beside is not None
        assert beside.method == "sink-window 24"
        assert beside.keys <= result.keys


def test_names_are_of_policies() -> None:
    names, _ = named("fast")
    assert names[:3] == ["sink-window", "random-keys", "oracle-top-k"]
    assert {"quest", "h2o"} <= set(names)
    assert set(names) <= set(named("all")[0])
    assert named("SinkWindow, h2o")[0] == ["sink-window", "random-keys", "oracle-top-k", "h2o"]
    assert count("h2o", (8, 8, 16)) == 9
    own = f"{Last.__module__}.Last"
    bench = benched(decoders.model(), decoders.tokenizer(), decoders.texts(), **ASKED)
    made = arms(bench, own, (12,))[0][-1]
    assert (made.name, made.summary) == (f"{own} 12", "Somebody's own policy: the last keys.")
    assert isinstance(made.made(), Last)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"policies": "nearest"}, "methods: there is no policy 'nearest'; there are sink-window"),
        ({"policies": "simpool"}, "methods: simpool does not say which keys"),
        ({"policies": "dense"}, "methods: dense is no policy"),
        ({"budgets": (0,)}, "budget: expected at least 1, got 0"),
        ({"budgets": ()}, "budgets: expected numbers of keys"),
        ({"budgets": (60,)}, "budget: 60 keys of a context of 60 tokens are all of them"),
        ({"budgets": (3,)}, "sink-window 3: budget: 3 keys leave no room"),
        (
            {"budgets": (6,)},
            "random-keys 6: budget: 6 keys leave no room .* sinks 4 and recent 3; take 7 or more, which every",
        ),
        ({"policies": "quest", "budgets": (12,)}, "quest 12: budget: expected a multiple of the 16 tokens of a page"),
        ({"loss": -1}, "loss"),
        ({"texts": "one text"}, "texts"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_run(
    given: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something is measured")

    monkeypatch.setattr(Read, "run", never)
    asked = {"policies": "h2o", "budgets": (12,), "texts": decoders.texts(), **ASKED, **given}
    with pytest.raises(InputError, match=told) as error:
        compare_policies(
            decoders.model(), decoders.tokenizer(), asked.pop("texts"), asked.pop("policies"), asked.pop("budgets"),
            out=tmp_path / "out", **asked,
        )  # fmt: skip
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("BertModel", tiny.TEXT, "no causal attention"),
        ("LlamaModel", {**decoders.SIZES, "vocab_size": 120}, "cannot decode token by token"),
        ("MistralForCausalLM", {**decoders.SIZES, "vocab_size": 120, "sliding_window": 8}, "a sliding window"),
    ],
)
def test_a_model_that_policies_cannot_act_in_is_refused(kind: str, settings: dict[str, Any], told: str) -> None:
    cls = getattr(tiny.transformers(), kind)
    model = cls(cls.config_class(**settings)).eval()
    with pytest.raises(InputError, match=told) as error:
        compare_policies(model, decoders.tokenizer(), decoders.texts(), "h2o", (12,), **ASKED)
    assert "\n" not in str(error.value)


def test_a_model_in_training_or_with_broken_weights_is_refused() -> None:
    model = decoders.model()
    with pytest.raises(InputError, match=r"model: is in training mode"):
        compare_policies(model.train(), decoders.tokenizer(), decoders.texts(), "h2o", (12,), **ASKED)
    with torch.no_grad():
        model.eval().lm_head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="tells NaN or infinity"):
        compare_policies(model, decoders.tokenizer(), decoders.texts(), "h2o", (12,), **ASKED)


def test_enough_facts_tell_which_policy_loses_nothing() -> None:
    made = {
        "dense": Made(first(130, MANY)),
        "quest-small-pages 16": Made(first(60, MANY), 0.1),
        "quest-small-pages 32": Made(first(130, MANY), 0.0, 1.3),
        "oracle-top-k 32": Made(first(130, MANY)),
        "h2o 32": Made(first(1, MANY), 0.05, forgets=True),
    }
    found = compared(made, ["quest-small-pages", "h2o"], (16, 32), MANY)
    assert found.recommended == found.best() == "quest-small-pages 32"
    assert found.best(loss=0.9) == "quest-small-pages 16"
    assert found.best(forgets=True) is None
    text = found.verdict
    assert text.startswith(
        "quest-small-pages 32 is enough: it tells 130 of 160 facts against 130 with all keys (0.0 points (0.0 to 0.0)), "
        "reading 64 % of the keys; all memory is kept."
    )
    assert "Of those that forget for ever, h2o 32 tells most: 1 of 160 facts" in text
    assert "at 32 keys the best choice 130, sink + window 0, random keys 0." in text
    assert "Perplexity hides it: h2o 32 tells 1 of 160 facts" in text
    assert "quest-small-pages 32 is 1.30 times as fast as the exact path (1 ms per token; as loaded 1.1)" in text
    assert "standard error" not in text


def test_few_facts_say_so_and_a_window_is_not_beaten_by_name() -> None:
    made = {
        "dense": Made(first(19, FEW)),
        "sink-window 32": Made(first(10, FEW), 0.05),
        "quest-small-pages 32": Made(first(12, FEW), 0.05),
        "h2o 32": Made(first(0, FEW), 0.4, forgets=True),
    }
    found = compared(made, ["quest-small-pages", "h2o"], (32,), FEW)
    assert found.recommended == "dense"
    text = found.verdict
    assert text.startswith(
        "Read all keys: of no policy can it be said that it loses at most 2.0 % of the facts; 24 facts cannot show so little, "
        "150 could."
    )
    assert "Of those that keep all memory, quest-small-pages 32 tells most: 12 of 24 facts" in text
    assert "h2o 32 loses to sink + window of as many keys." in text
    assert "quest-small-pages 32 was not shown to be better than it." in text
    assert "nothing is faster than the exact path (1 ms per token; as loaded 1.1): no gain." in text
    assert "These are 24 facts: the standard error of a share is up to 10 points." in text
    assert 0.1 < found.detectable < 0.6


def test_too_few_facts_carry_no_verdict_and_what_was_seen_is_told() -> None:
    found = compared({"dense": Made(first(4, 5)), "h2o 32": Made(first(3, 5), 0.1, forgets=True)}, ["h2o"], (32,), 5)
    assert found.recommended == "dense"
    assert found.verdict.startswith("No verdict: 5 test units cannot carry one")
    assert "Of those that forget for ever, h2o 32 tells most: 3 of 5 facts" in found.verdict
    assert "By log-loss" in found.verdict


def test_a_window_may_be_enough() -> None:
    made = {name: Made(first(150, MANY)) for name in ("dense", "sink-window 16", "oracle-top-k 16")}
    found = compared(made, ["h2o"], (16,), MANY)
    assert found.recommended == "sink-window 16"
    assert "sink-window 16 is enough" in found.verdict


def test_what_forgets_is_recommended_only_where_nothing_that_keeps_is() -> None:
    made = {name: Made(first(150, MANY)) for name in ("dense", "quest-small-pages 32")}
    made["h2o 16"] = Made(first(150, MANY), forgets=True)
    assert compared(made, ["quest-small-pages", "h2o"], (16, 32), MANY).recommended == "quest-small-pages 32"
    del made["quest-small-pages 32"]
    found = compared(made, ["quest-small-pages", "h2o"], (16, 32), MANY)
    assert found.recommended == "h2o 16"
    assert "it forgets, and what it forgets is lost for ever" in found.verdict
