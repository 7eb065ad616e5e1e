"""Each caution, with data that have what it warns of and with data that have not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.jobs.probe.conftest import make_dataset, make_ragged

from cenote.core.graphs import Graphs
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe import Comparison, MethodResult, Recipe, compare
from cenote.jobs.probe.cautions import (
    Seen,
    at_the_edge,
    diverged,
    odd_features,
    odd_targets,
    small_test,
    still_improving,
)

RECIPE = Recipe(learning_rates=(1e-3, 1e-2, 1e-1), epochs=10)


def test_few_test_items() -> None:
    assert small_test(make_dataset(297), "accuracy") == (
        "the test split holds only 99 items: intervals are wide, and only large differences can be seen; "
        "with 100 or more they say more",
    )
    assert small_test(make_dataset(306), "accuracy") == ()


@pytest.mark.parametrize(("groups", "told"), [(19, 1), (20, 0)])
def test_few_test_groups(groups: int, told: int) -> None:
    data = make_dataset(600)
    of_item = tuple(f"g{i // 9 % groups}" for i in range(len(data)))
    found = small_test(dataclasses.replace(data, groups=of_item), "accuracy")
    assert len(found) == told
    assert all(text.startswith("the test split holds only 19 groups") for text in found)


def _with_positives(count: int) -> TokenDataset:
    """Of 200 test items so many are of class `yes`."""
    data = make_dataset(600, classes=2)
    y = torch.zeros_like(data.y)
    for split in range(3):
        y[(data.split == split).nonzero().flatten()[:count]] = 1
    return dataclasses.replace(data, y=y, classes=("no", "yes"))


def test_a_rare_class_of_the_test_items() -> None:
    found = small_test(_with_positives(1), "AUROC")
    assert found == (
        "AUROC rests on only 1 test item of 'yes': it can be high or low by luck; with 10 or more it says more",
    )
    assert small_test(_with_positives(10), "AUROC") == ()
    assert small_test(_with_positives(1), "accuracy") == ()


def test_a_rare_label_and_a_class_of_few_groups() -> None:
    data = _with_positives(6)
    labels = torch.stack([data.y, 1 - data.y, 0 * data.y], 1).float()
    several = dataclasses.replace(data, y=labels, task="multilabel", classes=("rare", "usual", "absent"))
    assert "rests on only 6 test items of 'rare'" in small_test(several, "mean average precision")[0]
    many = _with_positives(60)
    groups = tuple("one" if on else f"g{i // 6 % 30}" for i, on in enumerate(many.y.tolist()))
    found = small_test(dataclasses.replace(many, groups=groups), "AUROC")
    assert found[0].startswith("AUROC rests on only 1 test group of 'yes'")


def test_items_on_both_sides_of_the_split() -> None:
    data = make_dataset()
    assert odd_features(data) == ()
    train, test = int(data.indices("train")[3]), int(data.indices("test")[5])
    x = data.x.clone()
    x[test] = x[train]
    (told,) = odd_features(dataclasses.replace(data, x=x))
    assert told.startswith(
        f"1 of 30 test items have the same features as an item of train or val ('item{test}' as 'item{train}')"
    )
    within = data.x.clone()
    within[test] = within[int(data.indices("test")[6])]
    assert odd_features(dataclasses.replace(data, x=within)) == ()


def test_items_on_both_sides_of_folds() -> None:
    data = make_dataset()
    one, other = data.indices("train")[:2].tolist()
    x = data.x.clone()
    x[other] = x[one]
    twice = dataclasses.replace(data, x=x)
    assert odd_features(twice) == ()
    (told,) = odd_features(twice, Seen.of(twice, in_folds=True))
    assert told.startswith(
        f"1 of 90 test items have the same features as another item, which is trained on in some fold ('item{other}' as "
        f"'item{one}')"
    )
    groups = tuple("pair" if i in (one, other) else str(i) for i in range(len(data)))
    kept = dataclasses.replace(twice, groups=groups)
    assert odd_features(kept, Seen.of(kept, in_folds=True)) == ()


def test_targets_that_32_bits_hardly_resolve() -> None:
    data = make_dataset()
    y = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(0))
    for shift, told in ((1e3, 0), (1e5, 1)):
        targets = torch.stack([y[:, 0], y[:, 1] + shift], 1)
        found = odd_targets(dataclasses.replace(data, y=targets, task="regression", classes=("age", "time")))
        assert len(found) == told
        assert all(text.startswith("time varies by ") and "around 1e+05, which" in text for text in found)
    assert odd_targets(data) == ()


def test_losses_that_are_no_numbers() -> None:
    nan = float("nan")
    result = compare(make_dataset(), ["mean"], seeds=1, recipe=Recipe(epochs=1), references=False)["mean"]
    assert diverged(result) == ()
    (told,) = diverged(dataclasses.replace(result, train_loss=((0.5, 0.4, nan), (0.5, nan, nan))))
    assert told.startswith("the loss of mean was no finite number from epoch 2 on")


def test_graphs_with_the_same_nodes_and_other_edges_are_no_copies() -> None:
    ring, path = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.tensor([[0, 1], [1, 2]])
    x = torch.arange(6.0).view(3, 2)
    for edges, told in (((ring, ring, ring), 1), ((ring, ring, path), 0)):
        shifted = torch.cat([e + 3 * i for i, e in enumerate(edges)], 1)
        graphs = Graphs(x.repeat(3, 1), torch.tensor([0, 3, 6, 9]), shifted)
        data = TokenDataset(
            "g", graphs, torch.tensor([0, 1, 0]), "binary", ("a", "b"), ("p", "q", "r"), torch.arange(3)
        )
        assert len(odd_features(data)) == told


def test_constant_features_and_features_beyond_half_precision() -> None:
    data = make_dataset(dim=10)
    x = data.x.clone()
    x[:, :, 4] = 7.0
    (told,) = odd_features(dataclasses.replace(data, x=x))
    assert told.startswith("1 of 10 features never change (first: 4)")
    wide = make_dataset(dim=40)
    one = wide.x.clone()
    one[:, :, 4] = 7.0
    assert odd_features(dataclasses.replace(wide, x=one)) == ()
    for largest, told_of in ((-7e4, 1), (6.5e4, 0)):
        x = data.x.clone()
        x[3, 2, 1] = largest
        assert len(odd_features(dataclasses.replace(data, x=x))) == told_of
    ragged = make_ragged()
    values = ragged.x.values.clone()
    values[3, 0] = 1e6
    (told,) = odd_features(dataclasses.replace(ragged, x=type(ragged.x)(values, ragged.x.offsets)))
    assert told.startswith("features reach 1e+06, beyond float16's 65,504")


def _trained(by_rate: tuple[float, ...], chosen: float, curve: np.ndarray) -> MethodResult:
    curves = (tuple(curve.tolist()),) * 2
    return MethodResult(
        method="mean",
        summary="",
        metric=0.9,
        interval=(0.8, 1.0),
        metric_per_seed=(0.9, 0.9),
        seconds=1.0,
        validation_per_seed=(0.9, 0.9),
        learning_rate=chosen,
        validation_by_rate=by_rate,
        validation_curve=curves,
    )


FLAT, RISING = np.full(10, 0.8), np.linspace(0.5, 0.8, 10)


@pytest.mark.parametrize(
    ("by_rate", "chosen", "told"),
    [
        ((0.7, 0.8, 0.9), 1e-1, "the largest learning rate of the grid, which is 0.100 above 0.01"),
        ((0.9, 0.8, 0.7), 1e-3, "the smallest learning rate of the grid, which is 0.100 above 0.01"),
        ((0.7, 0.9, 0.8), 1e-2, None),
        ((0.7, 0.897, 0.9), 1e-1, None),
        ((), 1e-1, None),
    ],
)
def test_the_edge_of_the_grid(by_rate: tuple[float, ...], chosen: float, told: str | None) -> None:
    found = at_the_edge(_trained(by_rate, chosen, FLAT), RECIPE)
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def test_a_curve_that_has_not_ended() -> None:
    (told,) = still_improving(_trained((), 1e-2, RISING), RECIPE)
    assert "(validation +0.067 after epoch 8 of 10): give --epochs more" in told
    assert still_improving(_trained((), 1e-2, FLAT), RECIPE) == ()
    assert still_improving(_trained((), 1e-2, RISING), dataclasses.replace(RECIPE, epochs=40)) == (), "it stopped early"
    unknown = np.where(np.arange(10) == 2, np.nan, FLAT)
    assert still_improving(_trained((), 1e-2, unknown), RECIPE) == ()


def test_the_comparison_tells_them(tmp_path: Path) -> None:
    data = dataclasses.replace(make_dataset(), cautions=("the reader noticed something",))
    c = compare(data, ["mean", "max"], seeds=1, recipe=Recipe(learning_rates=(1e-4, 1e-2), epochs=2), out=tmp_path)
    assert c.cautions[0] == "the reader noticed something"
    assert c.cautions[1].startswith("the test split holds only 30 items")
    assert len(c["mean"].validation_by_rate) == 2
    assert max(c["mean"].validation_by_rate) == pytest.approx(np.mean(c["mean"].validation_per_seed))
    assert Comparison.load(tmp_path).cautions == c.cautions


def test_the_same_data_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, looked = make_dataset(dim=10), []
    x = data.x.clone()
    x[:, :, 4] = 7.0
    x[int(data.indices("test")[0])] = x[int(data.indices("train")[0])]
    data = dataclasses.replace(data, x=x)
    own = Seen.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Seen, "of", classmethod(lambda cls, d, in_folds: looked.append(d) or own(cls, d, in_folds)))
    recipe = Recipe(learning_rates=(1e-2,), epochs=1)
    first, again = (compare(data, ["mean", "max"], seeds=1, recipe=recipe, out=tmp_path) for _ in range(2))
    assert len(looked) == 1
    assert first.cautions == again.cautions
    assert any("1 of 30 test items" in text for text in first.cautions)
    assert any("1 of 10 features never change" in text for text in first.cautions)
    (tmp_path / "seen.safetensors").write_bytes(b"cut")
    assert compare(data, ["mean", "max"], seeds=1, recipe=recipe, out=tmp_path).cautions == first.cautions
    compare(data.with_split(data.split.flip(0)), ["mean", "max"], seeds=1, recipe=recipe, out=tmp_path)
    assert len(looked) == 3
