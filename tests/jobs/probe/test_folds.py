import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.jobs.probe.conftest import make_dataset, make_ragged

from cenote.compare.metrics import METRICS
from cenote.core import InputError
from cenote.features.dataset import TokenDataset
from cenote.features.splits import folds
from cenote.jobs.probe import Comparison, Recipe, compare, load
from cenote.jobs.probe.arms import columns_of, remembered
from cenote.jobs.probe.folds import FEW, planned
from cenote.jobs.probe.training import predict
from cenote.report import write

QUICK = Recipe(learning_rates=(1e-2,), epochs=2, least_steps=2)


@pytest.fixture
def made(toy: TokenDataset) -> TokenDataset:
    """Few items, whose split was made here."""
    return dataclasses.replace(toy, split_seed=0)


def stamps(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}


def test_folds_end_in_the_same_table_page_and_folder(made: TokenDataset, tmp_path: Path) -> None:
    c = compare(made, ["mean", "max"], seeds=2, recipe=QUICK, folds=3, repeats=2, out=tmp_path)
    assert {r.method for r in c.results} == {"mean", "max", *c.references}
    assert len(c.references) == 2
    for r in c.results:
        if r.reference:
            continue
        assert len(r.metric_per_fold) == 6
        assert r.metric == pytest.approx(np.mean(r.metric_per_fold))
        assert r.metric == pytest.approx(np.mean(r.metric_per_seed))
        assert len(r.metric_per_seed) == len(r.validation_curve) == 2
    assert {k: c.provenance[k] for k in ("folds", "repeats", "split_seed", "significance")} == {
        "folds": 3, "repeats": 2, "split_seed": 0, "significance": "corrected t",
    }  # fmt: skip
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert len(stored["results"][0]["metric_per_fold"]) == 6
    assert Comparison.load(tmp_path) == c
    page = write(tmp_path).read_text()
    assert "accuracy on 90 items in 2 times 3 folds" in page
    assert "the corrected resampled t test" in page
    assert "3, in 2 rounds; the items above are those of the first" in page

    # what is saved is what the first fold trained: its test items are scored as the table says
    split = folds(made, 3, 2)[0]
    items = (split == 2).nonzero().squeeze(1)
    best = load(tmp_path / "best")
    found = predict(best.probe, made, items, 10**6).double().numpy()
    first = METRICS["accuracy"](found, made.y[items].numpy(), np.ones((1, len(items))))[0]
    per_seed = _first_fold(made, c.winner, items, split)
    assert first in per_seed
    card = json.loads((tmp_path / "attention.json").read_text())
    assert {item["id"] for item in card["items"]} <= {made.ids[i] for i in items.tolist()}


def _first_fold(data: TokenDataset, method: str, items: torch.Tensor, split: torch.Tensor) -> list[float]:
    alone = compare(data.with_split(split), [method], seeds=2, recipe=QUICK)
    return list(alone[method].metric_per_seed)


def test_a_fold_is_what_a_comparison_under_its_split_alone_is(made: TokenDataset) -> None:
    c = compare(made, ["mean"], seeds=2, recipe=QUICK, folds=3)
    for number, split in enumerate(folds(made, 3)):
        alone = compare(made.with_split(split), ["mean"], seeds=2, recipe=QUICK)
        assert c["mean"].metric_per_fold[number] == pytest.approx(alone["mean"].metric)


def test_cells_of_folds_resume(made: TokenDataset, tmp_path: Path) -> None:
    heard: list[tuple[str, float]] = []

    def interrupt(name: str, share: float) -> None:
        heard.append((name, share))
        if name == "max" and share > 0.5:
            raise KeyboardInterrupt

    first = compare(made, ["mean", "max"], seeds=1, recipe=QUICK, folds=3, out=tmp_path, on_method=interrupt)
    assert not first.complete
    assert [r.method for r in first.results] == ["mean"]
    kept = stamps(tmp_path)
    assert {"mean, fold 1 of 3.safetensors", "max, fold 1 of 3.safetensors"} <= set(kept)
    assert "max, fold 3 of 3.safetensors" not in kept
    assert max(share for name, share in heard if name == "mean") == pytest.approx(1.0)

    second = compare(made, ["mean", "max"], seeds=1, recipe=QUICK, folds=3, out=tmp_path)
    assert second.complete
    assert {name: when for name, when in stamps(tmp_path).items() if name in kept} == kept
    assert second["mean"] == first["mean"]
    compare(dataclasses.replace(made, split_seed=1), ["mean"], seeds=1, recipe=QUICK, folds=3, out=tmp_path)
    assert stamps(tmp_path)["mean, fold 1 of 3.safetensors"] != kept["mean, fold 1 of 3.safetensors"]


def test_the_baseline_comes_first_in_all_folds(made: TokenDataset) -> None:
    begun: list[str] = []

    def interrupt(name: str, share: float) -> None:
        begun.append(name)
        if begun[-1] == "mean" and share > 0.9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(made, ["max", "mean"], seeds=1, recipe=QUICK, folds=3, workers=2, on_method=interrupt)
    assert set(begun) == {"mean"}


def test_processes_give_the_same(made: TokenDataset) -> None:
    alone = compare(made, ["mean", "max"], seeds=1, recipe=QUICK, folds=2, workers=1)
    together = compare(made, ["mean", "max"], seeds=1, recipe=QUICK, folds=2, workers=2)
    assert [r.metric_per_fold for r in alone.results] == [r.metric_per_fold for r in together.results]


def test_small_data_are_folded_unless_one_split_is_asked_for(made: TokenDataset) -> None:
    plan = planned(made)
    assert (len(plan), plan.folds, plan.repeats) == (5, 5, 1)
    assert (
        plan.told()
        == "5 folds of about 18 test items: a single split would test 30 items, fewer than 200 (--folds 1 forces it)"
    )
    assert plan.provenance()["folds_because"] == plan.why
    assert planned(made, 1).splits == ()
    assert planned(made, repeats=2).told() == "2 times 5 folds of about 18 test items"
    # a given split, a test of a single split, and enough test items
    assert planned(make_dataset()).splits == ()
    assert planned(made, significance="wilcoxon").splits == ()
    large = dataclasses.replace(make_dataset(items=3 * FEW).with_split([0, 1, 2] * FEW), split_seed=0)
    assert len(large.indices("test")) == FEW
    assert planned(large).told() == ""


def test_where_folds_cannot_be_made_one_split_decides_and_says_so(made: TokenDataset) -> None:
    groups = tuple(f"g{i % 4}" for i in range(len(made)))
    told = planned(dataclasses.replace(made, groups=groups)).told()
    assert told.startswith("one split: a single split would test 30 items, fewer than 200, but there can be no 5 folds")
    assert "has 4" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"folds": 0}, "folds: expected at least 1, got 0"),
        ({"folds": 1, "repeats": 2}, "repeats: 2 rounds need folds"),
        ({"folds": 3, "significance": "wilcoxon"}, "significance: wilcoxon is a test of a single split"),
        ({"folds": 31}, "each of 31 tests items that the others do not, but class 'a' has 30; give at most 30"),
    ],
)
def test_what_does_not_go_together_is_told(made: TokenDataset, arguments: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        compare(made, ["mean"], seeds=1, recipe=QUICK, **arguments)  # type: ignore[arg-type]


def test_a_given_split_cannot_be_folded(toy: TokenDataset) -> None:
    with pytest.raises(InputError, match="folds: the data come with a split of their own"):
        compare(toy, ["mean"], seeds=1, recipe=QUICK, folds=5)


def test_groups_stay_whole_in_ragged_data() -> None:
    data = dataclasses.replace(make_ragged(), groups=tuple(f"p{i // 4}" for i in range(60)), split_seed=0)
    c = compare(data, ["mean", "max"], seeds=1, recipe=QUICK, folds=3)
    assert c.metric_name == "AUROC"
    assert c.provenance["groups"] == 15
    assert len(c["max"].metric_per_fold) == 3


def test_features_are_read_once_for_the_keys_of_all_folds(made: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = TokenDataset.fingerprint
    monkeypatch.setattr(TokenDataset, "fingerprint", lambda data: (read.append(id(data)), whole(data))[1])
    plan, fingerprint = planned(made, 3), remembered()
    (column,), _, _ = columns_of(made, ["mean"])
    keys = {plan.fingerprinted(fingerprint, column, fold)(plan.seen(column, fold).data) for fold in range(3)}
    assert len(keys) == 3
    assert len(read) == 1
    # the split alone decides, whoever asks
    again = planned(made, 3)
    assert {again.fingerprinted(fingerprint, column, fold)(made) for fold in range(3)} == keys
