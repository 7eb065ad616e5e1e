"""Audits of models whose true explanation is known."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from tests.jobs.explain.subjects import Additive, ByChance, Deceptive, Hidden, IgnoresTheModel, Truth, vectors

import cenote
from cenote.compare.statistics import SIGNIFICANT
from cenote.core import InputError
from cenote.explain import ClassifierAttention, Occlusion, deceptive_bench, finds, metrics
from cenote.explain.base import Attribution
from cenote.jobs.explain import Audit, Vectors, arms, audit, digits
from cenote.jobs.explain.arms import chosen, controls
from cenote.jobs.explain.measure import METRIC, POINTS, Bench, measured


def finds_a_winner(found: Audit) -> bool:
    test = next((t for t in found.against_baseline if t.first == found.winner), None)
    return test is not None and test.p_adjusted <= SIGNIFICANT and test.difference > 0


def false_alarms(audits: int) -> int:
    alarms = 0
    for number in range(audits):
        subject = vectors(Additive(number), seed=number)
        found = audit(subject, methods=(), explainers={f"chance-{i}": ByChance(100 * number + i) for i in range(3)})
        assert not found.struck
        alarms += finds_a_winner(found)
    return alarms


def test_the_true_explanation_wins_and_random_ones_do_not() -> None:
    given = {"truth": Truth(), "chance": ByChance()}
    found = audit(vectors(Additive()), methods=(), explainers=given)
    assert found.winner == found.recommended == "truth"
    assert finds_a_winner(found)
    assert found.sentence.startswith("truth beats random by ")
    assert found["truth"].deletion > 0.05
    assert found["truth"].insertion > 0.05
    assert found["truth"].infidelity < 0.6 * found["chance"].infidelity
    assert found["truth"].unchanged is not None
    assert found["truth"].unchanged < 0.9
    assert {c: found[c].control for c in found.controls} == dict.fromkeys(("random", "position", "vector-norm"), True)
    assert found["random"].deletion == 0.0
    assert not {"random", "position"} & set(found.pareto)
    chance = next(t for t in found.against_baseline if t.first == "chance")
    assert chance.p_adjusted > SIGNIFICANT


def test_random_explanations_raise_few_false_alarms() -> None:
    assert false_alarms(8) <= 2


@pytest.mark.slow("a hundred audits")
def test_of_a_hundred_audits_of_random_explanations_at_most_eight_report_a_winner() -> None:
    assert false_alarms(100) <= 8


def test_an_explanation_that_ignores_the_model_is_struck_out_every_time() -> None:
    for number in range(20):
        subject = vectors(Additive(number), items=12, seed=number)
        given = {"truth": Truth(), "ignores": IgnoresTheModel(number)}
        found = audit(subject, methods=(), explainers=given)
        assert found.struck == ("ignores",)
        assert found["ignores"].unchanged == 1.0
        assert found.winner == found.recommended == "truth"
        assert "ignores said the same when the weights were randomised, and was struck out." in found.sentence
        assert "ignores" not in found.pareto


def test_an_explanation_that_loses_to_a_control_is_named() -> None:
    class Reversed(Truth):
        def explain(self, model, inputs, target=None):  # type: ignore[no-untyped-def]
            found = super().explain(model, inputs, target)
            return Attribution(-found.scores, found.mask, signed=True)

    found = audit(vectors(Additive()), methods=(), explainers={"truth": Truth(), "reversed": Reversed()})
    best = max(("position", "vector-norm"), key=lambda name: found[name].metric)
    assert f"reversed is less faithful than the control {best}." in found.sentence


def test_where_all_are_struck_out_none_is_recommended() -> None:
    found = audit(vectors(Additive()), methods=(), explainers={"ignores": IgnoresTheModel(0)})
    assert found.recommended == ""
    assert found.sentence == "No explanation is left: all of them said the same of random weights (ignores)."


def test_that_attention_deceives_is_said_in_words() -> None:
    methods = ["last-layer-attention", "mean-attention", "attention-rollout"]
    found = audit(vectors(Deceptive(), items=40), methods=methods, explainers={"truth": Truth()})
    assert found.winner == "truth"
    assert found.attention.startswith("Attention does not show what this model uses: ")
    assert all(name in found.attention for name in methods)
    assert found.attention.endswith("are no better than random scores, while truth can be told from them.")
    assert found.attention in found.sentence


def test_of_a_trained_model_what_asks_it_finds_the_hidden_word_and_attention_does_not() -> None:
    bench = deceptive_bench()
    asks = ["left-out-tokens", "input-gradients"]
    if importlib.util.find_spec("captum"):
        asks.append("occlusion")
    found = audit(Hidden(bench, 40), methods=["classifier-attention", *asks])
    assert not found.skipped
    assert found["classifier-attention"].pointing is not None
    assert found["classifier-attention"].pointing <= 0.5
    assert all(found[name].pointing >= 0.9 for name in asks)  # type: ignore[operator]
    shown = finds(ClassifierAttention().explain(bench.model, bench.inputs), bench.truth)
    asked = finds(Occlusion().explain(bench.model, bench.inputs), bench.truth)
    assert float(shown.mean()) <= 0.6
    assert float(asked.mean()) >= 0.9
    assert found.winner in asks
    assert found.attention.startswith(
        "Attention does not show what this model uses: classifier-attention is no better than random scores, while "
    )
    assert found.attention in found.sentence


def test_of_a_model_without_attention_its_explanations_are_left_out_and_that_is_said() -> None:
    found = audit(vectors(Additive()), methods=["attention-rollout"], explainers={"truth": Truth()})
    assert list(found.skipped) == ["attention-rollout"]
    assert "found no attention in Additive" in found.skipped["attention-rollout"]
    with pytest.raises(InputError, match="no explanation is left"):
        audit(vectors(Additive()), methods=["attention-rollout"])


def test_classics_of_captum_find_it_too() -> None:
    pytest.importorskip("captum", reason="cenote[explain] is not installed")
    found = audit(vectors(Deceptive()), methods=["occlusion", "gradient-x-input", "kernel-shap"], seeds=2)
    assert {found[n].family for n in ("occlusion", "kernel-shap")} == {"perturbation"}
    assert finds_a_winner(found)
    assert found["kernel-shap"].stability is not None
    assert found["occlusion"].stability is None
    assert found["kernel-shap"].completeness_error is not None
    assert found["kernel-shap"].completeness_error < 1e-3
    assert all(found[n].ms > 0 for n in ("occlusion", "kernel-shap"))  # type: ignore[operator]
    assert all(found[n].megabytes > 0 for n in ("occlusion", "kernel-shap"))  # type: ignore[operator]


def test_faithfulness_is_what_it_says() -> None:
    subject = vectors(Additive(), items=3)
    bench = Bench(subject)
    scores = torch.rand(3, subject.tokens, generator=torch.Generator().manual_seed(0)) * subject.mask
    setting = bench.settings[0]
    found = measured(bench, scores, setting)
    for item in range(3):
        own, real = scores[item], subject.mask[item]
        order = [i for i in own.argsort(descending=True, stable=True).tolist() if real[i]]

        def probability(kept: list[int], item: int = item) -> float:
            keep = torch.zeros(1, subject.tokens, dtype=torch.bool)
            keep[0, kept] = True
            logits = subject.outputs(torch.tensor([item]), keep, "mean")
            return float(logits.softmax(1)[0, bench.target[item]])

        whole = probability(order)
        top = [order[: max(1, math.ceil(share * len(order) - 1e-9))] for share in metrics.SHARES]
        rest = [[i for i in order if i not in t] for t in top]
        compr = sum(whole - probability(r) for r in rest) / len(rest)
        suff = sum(whole - probability(t) for t in top) / len(top)
        assert float(found[METRIC][item]) == pytest.approx(compr - suff, abs=1e-6)
        assert float(found["deletion"][item, 0]) == pytest.approx(whole, abs=1e-6)
        assert float(found["deletion"][item, -1]) == pytest.approx(probability([]), abs=1e-6)
    assert found["deletion"].shape == (3, len(POINTS))


def test_two_fills_and_two_sizes_are_told_and_where_they_disagree() -> None:
    found = audit(vectors(Additive()), methods=(), explainers={"truth": Truth(), "chance": ByChance()})
    assert list(found.orders) == ["tokens, mean", "tokens, zero", "pairs, mean"]
    assert found.orders["tokens, mean"]["truth"] == pytest.approx(found["truth"].metric)
    assert found.order == (
        "tokens, zero agrees on the order of tokens, mean (tau 1.00); "
        "pairs, mean agrees on the order of tokens, mean (tau 1.00)."
    )


def test_agreement_and_gallery_hold_every_explanation() -> None:
    found = audit(vectors(Additive()), methods=(), explainers={"truth": Truth(), "again": Truth()})
    names = [r.method for r in found.results]
    a, b = names.index("truth"), names.index("again")
    assert found.agreement[a][b] == found.agreement[b][a] == 1.0
    assert all(found.agreement[i][i] == 1.0 for i in range(len(names)))
    assert len(found.disputed) == 3
    items = found.gallery["items"]
    assert [i["place"] for i in items] == ["best", "upper quarter", "median", "lower quarter", "worst"]
    assert all(set(i["scores"]) == set(names) for i in items)
    assert all(len(i["words"]) == len(i["scores"]["truth"]) for i in items)
    assert items[0]["faithfulness"] >= items[2]["faithfulness"] >= items[4]["faithfulness"]


def test_running_again_resumes_and_a_result_reads_back(tmp_path: Path) -> None:
    given = {"truth": Truth(), "chance": ByChance()}
    first = audit(vectors(Additive()), methods=(), explainers=given, out=tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    again = audit(vectors(Additive()), methods=(), explainers=given, out=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == stamps
    assert len(stamps) == 5
    assert dataclasses.replace(again, provenance={}) == dataclasses.replace(first, provenance={})
    assert Audit.load(tmp_path) == again
    # other weights are another question
    audit(vectors(Additive(1)), methods=(), explainers=given, out=tmp_path)
    assert not any(p.stat().st_mtime_ns == stamps[p] for p in stamps)


def test_functions_have_no_weights_and_are_told_apart_by_what_they_give(tmp_path: Path) -> None:
    x = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))

    def chance(factor: float) -> Audit:
        subject = Vectors(lambda x, attention_mask: factor * (x.sum(1) @ weight), x)
        return audit(subject, methods=(), explainers={"chance": ByChance()}, out=tmp_path)

    first, other = chance(1.0), chance(0.1)
    assert first["chance"].metric != other["chance"].metric
    assert chance(0.1)["chance"] == other["chance"]
    assert first["chance"].unchanged is None


def test_the_class_that_is_explained_can_be_named() -> None:
    one, two = (audit(vectors(Additive()), methods=(), explainers={"truth": Truth()}, target=t) for t in "01")
    assert one["truth"].metric != two["truth"].metric
    assert {i["target"] for i in one.gallery["items"]} == {"0"}


def test_labels_tell_how_often_the_model_is_right() -> None:
    subject = vectors(Additive())
    right = [subject.labels[i] for i in Bench(subject).chosen.tolist()]
    given = {"truth": Truth()}
    assert audit(subject, methods=(), explainers=given, labels=right).dataset["accuracy"] == 1.0
    assert audit(subject, methods=(), explainers=given).dataset["accuracy"] is None


def test_the_embedded_digits_are_a_classifier_that_can_tell_them() -> None:
    subject = digits(items=100)
    bench = Bench(subject)
    assert float(bench.whole.mean()) > 0.7
    assert list(subject.sizes) == ["patches", "2 x 2 patches"]
    assert [c.name for c in controls(bench, "")] == ["random", "position", "contrast", "pixel-norm"]
    everything = bench.probability(torch.ones(100, 1, 16, dtype=torch.bool), bench.settings[1])
    torch.testing.assert_close(everything[:, 0], bench.whole)


def test_every_explainer_of_the_catalog_is_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {m.name for m in cenote.methods(room="explain")} == set(chosen("all"))
    assert len(chosen("fast")) >= 9
    assert "globenc" in chosen("fast")
    # gradient times input stands there once, also without captum
    for installed, taken in (("0.9", False), (None, True)):
        monkeypatch.setattr(arms, "_version", lambda _, known=installed: known)
        assert ("input-gradients" in chosen("fast")) == taken
    with pytest.raises(InputError, match="simpool explains nothing"):
        chosen("simpool")
    with pytest.raises(InputError, match="has no name in it"):
        chosen("occlusion,")
