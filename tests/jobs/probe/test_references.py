"""What a colleague would try first stands in the table, and the probes are not below it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from cenote.compare import verdict
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe import Comparison, Recipe, compare
from cenote.jobs.probe.references import INVERSE_PENALTIES, NEIGHBOURS, RIDGE_PENALTIES, reference_names

QUICK = Recipe(learning_rates=(1e-2,), epochs=4)


def linear(
    targets: int = 1, items: int = 400, middle: float = 50.0, scale: float = 10.0, seed: int = 0
) -> TokenDataset:
    """`y = middle + scale * (x.mean(1) @ w) + noise`, the part before the noise of deviation `scale`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(items, 5, 12, generator=g)
    w = torch.randn(12, targets, generator=g)
    signal = x.mean(1) @ w
    y = middle + scale * (signal / signal.std(0) + 0.3 * torch.randn(items, targets, generator=g))
    split = torch.arange(items) % 4 % 3
    return TokenDataset(
        "linear", x, y, "regression", tuple(f"y{i}" for i in range(targets)), tuple(map(str, range(items))), split
    )


def several_classes(items: int = 400, classes: int = 5, seed: int = 0) -> TokenDataset:
    data = linear(classes, items, 0.0, 1.0, seed)
    return dataclasses.replace(data, y=data.y.argmax(1), task="multiclass", classes=data.classes)


@pytest.mark.parametrize(("middle", "scale"), [(50.0, 10.0), (1e4, 1.0)])
def test_no_linear_probe_is_far_below_ridge(middle: float, scale: float) -> None:
    c = compare(linear(middle=middle, scale=scale), "mean,mean-all", seeds=1)
    assert c["ridge"].metric > 0.8
    for name in ("mean", "mean-all"):
        assert c[name].metric >= c["ridge"].metric - 0.05, name


def test_no_linear_probe_is_far_below_a_logistic_regression() -> None:
    c = compare(several_classes(), "mean,mean-all", seeds=1)
    assert c["logistic-regression"].metric > 0.7
    for name in ("mean", "mean-all"):
        assert c[name].metric >= c["logistic-regression"].metric - 0.05, name


def _standardised(data: TokenDataset) -> tuple[np.ndarray, ...]:
    x = data.x.mean(1).double().numpy()
    train, val, test = (data.indices(s) for s in ("train", "val", "test"))
    x = (x - x[train].mean(0)) / x[train].std(0)
    return x[train], x[val], x[test], data.y[train].numpy(), data.y[val].numpy(), data.y[test].numpy()


def test_they_are_what_scikit_learn_computes_with_the_setting_that_validation_chose() -> None:
    data = several_classes(120)
    c = compare(data, ["mean"], seeds=2, recipe=QUICK)
    train, val, test, y_train, y_val, y_test = _standardised(data)
    tried = {k: KNeighborsClassifier(k).fit(train, y_train) for k in NEIGHBOURS if k <= len(train)}
    on_val = {k: model.score(val, y_val) for k, model in tried.items()}
    k = c["knn"].settings["k"]
    assert c["knn"].validation_per_seed == (pytest.approx(max(on_val.values())),) * 2
    assert on_val[k] == max(on_val.values())
    assert c["knn"].metric == pytest.approx(tried[k].score(test, y_test))
    chosen = c["logistic-regression"].settings["C"]
    assert chosen in INVERSE_PENALTIES
    model = LogisticRegression(C=chosen, max_iter=1000).fit(train, y_train)
    assert c["logistic-regression"].metric == pytest.approx(model.score(test, y_test), abs=0.02)
    assert len(set(c["logistic-regression"].metric_per_seed)) == 1


def test_several_targets_are_told_in_their_own_units() -> None:
    data = linear(3, 120)
    c = compare(data, ["mean"], seeds=1, recipe=QUICK)
    assert c.references == ("ridge", "knn")
    alpha = c["ridge"].settings["alpha"]
    assert alpha in RIDGE_PENALTIES
    train, _, test, y_train, _, y_test = _standardised(data)
    assert c["ridge"].metric == pytest.approx(Ridge(alpha=alpha).fit(train, y_train).score(test, y_test), abs=1e-5)


def test_a_class_that_training_never_saw_is_never_said() -> None:
    data = several_classes(200, 4)
    split = torch.where((data.y == 2) & (data.split == 0), 2, data.split)
    c = compare(data.with_split(split), ["mean"], seeds=1, recipe=QUICK)
    right = float((data.y[split == 2] != 2).double().mean())
    assert all(0.3 < c[name].metric <= right for name in c.references)
    two = torch.where((data.y >= 2) & (data.split == 0), 2, data.split)
    right = float((data.y[two == 2] < 2).double().mean())
    c = compare(data.with_split(two), ["mean"], seeds=1, recipe=QUICK)
    assert all(0.6 * right < c[name].metric <= right for name in c.references)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_labels_of_yes_and_no(task: Any) -> None:
    data = linear(3, 200, 0.0, 1.0)
    y = (data.y > 0.3).long()[:, 0] if task == "binary" else (data.y > 0.3).float()
    data = dataclasses.replace(data, y=y, task=task, classes=("no", "yes") if task == "binary" else data.classes)
    c = compare(data, ["mean"], seeds=1, recipe=QUICK)
    assert set(c.references) == {"knn", "logistic-regression"}
    assert all(c[name].metric > 0.7 for name in c.references)
    if task == "binary":
        c = compare(data, ["mean"], seeds=1, recipe=QUICK, metric="accuracy")
        assert all(c[name].metric > 0.7 for name in c.references)
    else:
        never = dataclasses.replace(data, y=data.y * torch.where(data.split == 0, torch.tensor([[0.0], [1], [1]]), 1).T)
        assert "logistic-regression" in compare(never, ["mean"], seeds=1, recipe=QUICK).references


def test_a_reference_never_wins_and_changes_no_other_number(toy: TokenDataset, tmp_path: Path) -> None:
    with_them = compare(toy, ["max"], seeds=2, recipe=QUICK, out=tmp_path)
    alone = compare(toy, ["max"], seeds=2, recipe=QUICK, references=False)
    assert set(with_them.references) == {"knn", "logistic-regression"}
    assert alone.references == ()
    for c in (with_them, alone):
        assert {c.winner, c.baseline, c.recommended, *c.pareto} <= {"mean", "max"}
    kept = [t for t in with_them.pairs if not {t.first, t.second} & set(with_them.references)]
    assert kept == list(alone.pairs)
    against = {t.first for t in with_them.against_baseline}
    assert against == {"max", "knn", "logistic-regression"}
    stored = json.loads((tmp_path / "comparison.json").read_text())
    row = next(r for r in stored["results"] if r["method"] == "knn")
    assert row["reference"]
    assert all(row[name] is None for name in ("latency_ms", "parameters", "multiply_adds", "learning_rate"))
    assert Comparison.load(tmp_path) == with_them
    assert json.loads((tmp_path / "attention.json").read_text())["methods"] == [
        r.method for r in with_them.results if not r.reference
    ]


def test_the_sentence_tells_of_a_reference_that_is_ahead() -> None:
    data = linear(items=200)
    starved = compare(data, ["mean", "max"], seeds=1, recipe=Recipe(learning_rates=(1e-5,), epochs=1))
    assert "; ridge on the mean and knn on the mean are ahead of it: look at the recipe" in starved.sentence
    assert starved.winner in ("mean", "max")
    alone = compare(data, ["mean"], seeds=1, recipe=Recipe(learning_rates=(1e-5,), epochs=1))
    assert alone.sentence.startswith("Only mean was run")
    assert alone.sentence.endswith("look at the recipe.")
    trained = compare(data, ["mean"], seeds=1)
    assert "ahead" not in verdict.sentence(trained)


def test_their_names_are_known_before_anything_is_read() -> None:
    assert reference_names("regression") == ("knn", "ridge")
    assert reference_names("multilabel") == ("knn", "logistic-regression")
