"""Fewer vectors per document: what is compared, what is found, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.jobs.reduce.collections import duplicates, half_noise, themes

from cenote.catalog import create
from cenote.compare.result import FILE
from cenote.core import Bags, InputError
from cenote.core.maxsim import maxsim
from cenote.jobs.reduce import Frontier, compare
from cenote.jobs.reduce.arms import families
from cenote.jobs.reduce.indexes import FOLDER, Indexes
from cenote.jobs.reduce.pooling import Family, in_batches, reduced, unit_norm

QUICK: dict[str, Any] = {"methods": ["sequential"], "factors": (2,), "seeds": 2}


@pytest.fixture(scope="module")
def found() -> Frontier:
    return compare(*themes(), methods="fast", factors=(2, 4), seeds=2)


def test_controls_are_always_there_and_means_in_both_norms(found: Frontier) -> None:
    assert found.baseline == "unreduced"
    named = {r.method for r in compare(*themes(12, 12), **QUICK).results}
    assert named == {
        *("unreduced", "one-mean", "one-mean-raw", "sequential x2", "sequential-raw x2", "first-k x2", "random-drop x2")
    }
    assert {r.method for r in found.results} - named >= {"hierarchical x4", "hierarchical-raw x4", "first-k x4"}
    assert set(found.controls) == {
        *("one-mean", "one-mean-raw", "first-k x2", "first-k x4", "random-drop x2", "random-drop x4")
    }


def test_what_is_measured(found: Frontier) -> None:
    whole, half = found["unreduced"], found["sequential x2"]
    assert (whole.vectors, half.vectors, found["one-mean"].vectors) == (320, 160, 40)
    assert whole.bytes > half.bytes > found["one-mean"].bytes > 0
    assert (whole.alike, whole.pool_ms) == (1.0, None)
    assert 0 < half.alike < 1
    assert half.pool_ms > 0 < half.search_ms  # type: ignore[operator]
    assert len(found["random-drop x2"].metric_per_seed) == 2
    assert len(found["sequential x2"].metric_per_seed) == 1
    documents, queries, qrels = themes()
    scores = maxsim(queries, documents)
    own = torch.tensor([scores[q, d] for q, of in qrels.items() for d in of])
    ranks = (scores > own[:, None]).sum(1) + 1
    expected = torch.where(ranks <= 10, 1 / (ranks + 1).log2(), torch.zeros(())).mean()
    assert whole.metric == pytest.approx(float(expected), abs=2e-3)
    assert whole.mrr == pytest.approx(float(torch.where(ranks <= 10, 1 / ranks, torch.zeros(())).mean()), abs=2e-3)
    assert whole.recall == 1.0


def test_the_verdict_says_what_to_take(found: Frontier) -> None:
    # each token stands beside its like, so that half of the vectors lose nothing
    assert found.recommended in ("sequential x2", "hierarchical x2", "sequential-raw x2", "hierarchical-raw x2")
    for part in (
        "Half of the vectors is enough",
        f"{found.recommended}, {found[found.recommended].metric:.3f} nDCG@10 against {found['unreduced'].metric:.3f}",
        "Means left as they are, against those of unit norm: ",
        "As many vectors without pooling: the first of each document (-0.",
        "One mean vector per document (1/8 of the vectors)",
        "With 40 queries a difference under ",
    ):
        assert part in found.verdict, found.verdict
    assert found.smallest(loss=1.0) in {r.method for r in found.candidates if r.factor == 4}
    assert found.smallest(loss=0.0) in (None, *(r.method for r in found.candidates))
    assert found.best_within(found["sequential x2"].bytes) is not None
    assert found.best_within(1) is None
    share, (low, high) = found.kept(found.recommended)
    assert low <= share <= high
    assert share == pytest.approx(found[found.recommended].metric / found["unreduced"].metric)
    assert found.kept("unreduced") == (1.0, (1.0, 1.0))
    assert 0 < found.detectable < 0.5
    assert [row["method"] for row in found.table] == [r.method for r in found.results]


def test_an_index_that_finds_nothing_carries_no_verdict() -> None:
    documents, queries, qrels = themes()
    # the judgements are those of other queries
    shifted = {q: {(d + 7) % 40: g for d, g in of.items()} for q, of in qrels.items()}
    found = compare(documents, queries, shifted, **QUICK)
    assert found.recommended == "unreduced"
    assert "do documents, queries and judgements fit together" in found.verdict
    # one answer among forty, found at each of the first ten places as often
    expected = sum(1 / math.log2(r + 1) for r in range(1, 11)) / 40
    assert found.dataset["chance"] == pytest.approx(expected)
    loose = compare(documents, queries, qrels, **QUICK, loss=0.9)
    assert "and 0.9 of it may be lost: ask for a smaller loss" in loose.verdict


def test_bytes_in_place_of_a_loss() -> None:
    documents, queries, qrels = themes(12, 12)
    all_fit = compare(documents, queries, qrels, **QUICK, most_bytes=10**9)
    # that of all vectors is among what fits
    assert all_fit[all_fit.recommended].metric >= all_fit["unreduced"].metric
    half = all_fit["sequential x2"].bytes
    small = compare(documents, queries, qrels, **QUICK, most_bytes=half)
    assert "fits: " in small.verdict
    assert small.recommended in ("sequential x2", "sequential-raw x2")
    none = compare(documents, queries, qrels, **QUICK, most_bytes=1)
    assert (none.recommended, none.reason) == ("unreduced", "no index that may be recommended takes at most 1 bytes")
    assert none.verdict.startswith("No verdict" if none.no_verdict else "Keep all vectors: no index")


def test_the_first_half_is_noise() -> None:
    """Keeping it must lose, and the verdict must say so."""
    for seed in range(2):
        found = compare(*half_noise(seed=seed), methods=["sequential"], factors=(2,), seeds=1)
        lost = next(t for t in found.against_baseline if t.first == "first-k x2")
        assert lost.p_adjusted < 0.05
        assert lost.difference < -0.2
        assert found.recommended in ("sequential x2", "sequential-raw x2")


def test_duplicates_lose_nothing() -> None:
    for seed in range(2):
        found = compare(*duplicates(seed=seed), methods=["hierarchical"], factors=(4,), seeds=1)
        assert found["hierarchical x4"].vectors == found["unreduced"].vectors // 4
        assert found["hierarchical x4"].metric == pytest.approx(found["unreduced"].metric, abs=1e-3)
        assert found["hierarchical x4"].alike > 0.99
        assert found["sequential x4"].alike < 0.9
        lost = next(t for t in found.against_baseline if t.first == "hierarchical x4")
        assert lost.interval == pytest.approx((0.0, 0.0), abs=1e-3)
        assert found.smallest(loss=0.001) is not None


def test_the_same_folder_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, queries, qrels = themes(12, 12)
    out = tmp_path / "out"
    first = compare(documents, queries, qrels, **QUICK, out=out)
    assert not (out / FOLDER).exists()
    assert Frontier.load(out).to_json() == first.to_json()
    made: list[Any] = []
    of = Indexes.of

    def counted(self: Indexes, wanted: Any) -> Any:
        made.append(wanted)
        return of(self, wanted)

    monkeypatch.setattr(Indexes, "of", counted)
    again = compare(documents, queries, qrels, **QUICK, out=out)
    assert (made, again.sentence, again.results) == ([], first.sentence, first.results)
    (out / "cells" / "sequential x2.safetensors").unlink()
    compare(documents, queries, qrels, **QUICK, out=out)
    assert {(w.family.built, w.norm) for w in made} == {("sequential-raw", "unit")}
    # other queries are another question
    compare(documents, queries, {**qrels, 0: {1: 1.0}}, **QUICK, out=out)
    assert len(made) > 5


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(tmp_path: Path) -> None:
    documents, queries, qrels = themes(12, 12)

    def interrupt(name: str, share: float) -> None:
        if name == "sequential-raw x2" and share < 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    half = compare(documents, queries, qrels, **QUICK, out=out, on_method=interrupt)
    assert not half.complete
    assert {r.method for r in half.results} >= {"unreduced", "sequential x2"}
    assert (out / FOLDER).exists()
    whole = compare(documents, queries, qrels, **QUICK, out=out)
    fresh = compare(documents, queries, qrels, **QUICK)
    assert whole.complete
    assert whole.sentence == fresh.sentence
    assert (out / FILE).is_file()


def test_what_a_reducer_refuses_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Indexes._made

    def refusing(self: Indexes, family: Family | None, *rest: Any) -> Any:
        if family is not None and family.built == "evenly-spaced":
            raise InputError("documents: not these")
        return made(self, family, *rest)

    monkeypatch.setattr(Indexes, "_made", refusing)
    found = compare(*themes(12, 12), methods=["evenly-spaced"], factors=(2,), seeds=1)
    assert found.skipped == {"evenly-spaced x2": "documents: not these"}
    assert "sequential x2" in {r.method for r in found.results}


def test_two_norms_of_one_pass_are_those_of_two_reducers() -> None:
    documents, _, _ = themes(9, 9)
    for name in ("hierarchical", "sequential"):
        family = Family.of(name, 3.0)
        assert (family.unit, family.raw) == (name, f"{name}-raw")
        raw = reduced(family, [3.0], documents, protect=1)[3.0]
        expected = in_batches(create(f"{name}-raw", factor=3.0), documents, 1)
        torch.testing.assert_close(raw.values, expected.values)
        assert torch.equal(raw.offsets, expected.offsets)
        unit = in_batches(create(name, factor=3.0), documents, 1)
        torch.testing.assert_close(unit_norm(raw).values, torch.nn.functional.normalize(unit.values, dim=1))


def test_methods_by_name() -> None:
    # asked by either name, both norms are tried, once
    built = [f.built for f in families("hierarchical, hierarchical-raw", (2.0,))]
    assert built == ["hierarchical-raw", "sequential-raw", "first-k", "random-drop"]
    everything = {f.built for f in families("all", (2.0,))}
    assert everything >= {"hierarchical-raw", "sequential-raw", "kmeans-tokens-raw", "evenly-spaced"}
    rows = Family.of("hierarchical-rows", 2.0)
    assert (rows.unit, rows.raw) == ("hierarchical-rows-unit", "hierarchical-rows")
    for wanted, told in (
        ("mean", "methods: mean does not reduce documents by their vectors alone"),
        ("hierarchical,", "the list has no name in it"),
        ("top-attention", "does not reduce documents by their vectors alone"),
    ):
        with pytest.raises(InputError, match=told):
            families(wanted, (2.0,))
    for factors, told in (((), "got none"), ((1.0,), "1 leaves all vectors"), ((0.0,), "above 1")):
        with pytest.raises(InputError, match=told):
            families("fast", factors)


def test_what_cannot_be_compared_is_refused_before_any_work() -> None:
    documents, queries, qrels = themes(6, 6)
    bad = documents.values.clone()
    bad[9] = 0
    cases: list[tuple[dict[str, Any], str]] = [
        ({"documents": Bags(bad, documents.offsets)}, r"documents: 1 of 48 vectors are zero, NaN or infinite, in 1"),
        ({"queries": Bags.from_list([torch.full((1, 16), torch.nan)] * 6)}, r"queries: 6 of 6 vectors are zero, NaN"),
        ({"documents": documents.select(torch.tensor([0]))}, r"holds 1 document; there is nothing to rank"),
        ({"qrels": {**qrels, 0: {77: 1}}}, r"1 of the judged documents is not in the corpus \(77\)"),
        ({"qrels": {**qrels, 0: {0: 0}}}, r"1 of 6 queries has no relevant document \(0\)"),
        (
            {"documents": Bags.from_list([d[:1] for d in documents])},
            r"none has two vectors; there is nothing to reduce",
        ),
        (
            {"documents": Bags.from_list([d[:2] for d in documents]), "protect": 1},
            r"beyond the 1 that are never reduced",
        ),
        ({"ids": ["a"]}, r"ids: expected one for each of 6, got 1"),
        ({"loss": -0.1}, r"loss: expected at least 0"),
        ({"seeds": 0}, r"seeds: expected at least 1"),
        ({"queries": Bags.from_list([torch.ones(1, 4)] * 6)}, r"vectors are 4 wide, and those of the index 16"),
    ]
    for change, told in cases:
        given = {"documents": documents, "queries": queries, "qrels": qrels, **QUICK, **change}
        with pytest.raises(InputError, match=told):
            compare(**given)
    told = compare(documents, queries, {**qrels, 0: {77: 1, 0: 1}}, **QUICK, skip_bad=True).notes
    assert told == ("1 of the judged documents is not in the corpus (77): left out",)
