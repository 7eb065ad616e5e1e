"""Which task the labels mean, and which items train, choose and judge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.core import InputError
from cenote.features import Labelling, TokenDataset, describe, digit_bags, digits, facts, read
from cenote.features.splits import make_split, stratified
from cenote.features.targets import Target, target
from cenote.features.validate import Problems

from .conftest import ITEMS, relabel, table


def found(columns: dict[str, list[Any]], task: str | None = None, names: dict[str, list[str]] | None = None) -> Target:
    problems = Problems("data")
    ids = [str(i) for i in range(len(next(iter(columns.values()))))]
    made = target(ids, columns, Labelling(task), names or {}, problems)
    problems.raise_any()
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("cells", "task", "classes"),
    [
        (["b", "a", "b"], "binary", ("a", "b")),
        (["1", "0", "1.0"], "multiclass", ("0", "1", "1.0")),
        (["01", "1", "2"], "multiclass", ("01", "1", "2")),
        (["1.0", "0.0"], "binary", ("0", "1")),
        ([1, 0, 1.0], "binary", ("0", "1")),
        ([10, 9, 11], "multiclass", ("9", "10", "11")),
        (["10", "9", "x"], "multiclass", ("10", "9", "x")),
        ([True, False, True], "binary", ("False", "True")),
        (["a;b", "b", ""], "multilabel", ("a", "b")),
        ([["a", "c"], ["b"], []], "multilabel", ("a", "b", "c")),
        ([i + 0.5 for i in range(11)], "regression", ("label",)),
        ([str(i / 4) for i in range(44)], "regression", ("label",)),
        ([i % 30 for i in range(300)], "multiclass", tuple(str(i) for i in range(30))),
    ],
)
def test_task_from_one_column(cells: list[Any], task: str, classes: tuple[str, ...]) -> None:
    made = found({"label": cells})
    assert (made.task, made.classes) == (task, classes)


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"a": ["0", "1", "0"], "b": ["1.0", "0", "0"]}, "multilabel"),
        ({"a": [True, False, False], "b": [False, False, True]}, "multilabel"),
        ({"a": ["0", "2", "1"], "b": ["0.5", "1", "3"]}, "regression"),
    ],
)
def test_task_from_several_columns(columns: dict[str, list[Any]], task: str) -> None:
    made = found(columns)
    assert (made.task, made.classes) == (task, ("a", "b"))
    assert made.y.dtype == torch.float32
    assert made.y.tolist() == [[float(columns["a"][i]), float(columns["b"][i])] for i in range(3)]


def test_values_of_y() -> None:
    assert found({"label": ["b", "a", "c", "a"]}).y.tolist() == [1, 0, 2, 0]
    assert found({"label": ["b", "a", "c", "a"]}).y.dtype == torch.int64
    assert found({"label": ["a;b", "b ; c", "", "a"]}).y.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert found({"label": ["1", "2.5"]}, "regression").y.tolist() == [[1.0], [2.5]]
    assert found({"label": [[1.0, 2.0], [3.0, 4.0]]}, "regression").y.tolist() == [[1, 2], [3, 4]]


def test_task_as_given_wins() -> None:
    assert found({"label": [0, 1, 2]}, "regression").y.flatten().tolist() == [0, 1, 2]
    assert found({"label": ["a", "b", "a"]}, "multiclass").task == "multiclass"
    assert found({"label": ["a", "b", "a"]}, "multilabel").y.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert found({"label": list(range(40))}, "multiclass").classes == tuple(map(str, range(40)))


def test_names_of_class_numbers() -> None:
    made = found({"label": [2, 0, 2]}, names={"label": ["cat", "dog", "ant"]})
    assert made.classes == ("cat", "ant")
    assert made.y.tolist() == [1, 0, 1]
    assert found({"label": [[0], [1, 0], []]}, names={"label": ["x", "y"]}).classes == ("x", "y")


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        (
            {"label": [0.5, 1.0, 1.5]},
            None,
            "3 different numbers over 3 items (0.5, 1.0, 1.5), which may be classes or a quantity",
        ),
        ({"age": list(range(20, 70)) * 2}, None, "50 different numbers over 100 items"),
        ({"a": ["x", "y"], "b": [0, 1]}, None, "but there is 'x'; name one column"),
        ({"a": [0, 1], "b": [0, 1]}, "binary", "a binary task has one label column, got a, b"),
        ({"label": ["a", "b", "c"]}, "binary", "binary, but column 'label' holds 3 classes (a, b, c)"),
        ({"label": ["1", "two"]}, "regression", "item '1': label is 'two'; a regression target is a finite number"),
        ({"label": [1.0, float("inf")]}, "regression", "item '1': label is inf"),
        ({"label": [1.0, float("nan"), 2.0]}, "regression", "item '1' has no label"),
        ({"label": [3.0, 3.0]}, "regression", "holds one value only, 3.0"),
        ({"label": [[1.0], [1.0, 2.0]]}, "regression", "item '0': label is [1.0]; expected 2 numbers"),
        ({"a": [0, 2], "b": [0, 1]}, "multilabel", "item '1': a is 2; a multilabel column holds 0 or 1"),
        ({"a": [0, None], "b": [0, 1]}, "multilabel", "item '1' has no a"),
        ({"label": ["a;b", "a"]}, None, "label 'a' is on every item"),
        ({"a": [0, 0], "b": [0, 1]}, None, "label 'a' is on no item"),
        ({"label": ["", ""]}, "multilabel", "no item has any label"),
    ],
)
def test_labels_that_cannot_be_used(columns: dict[str, list[Any]], task: str | None, message: str) -> None:
    with pytest.raises(InputError) as told:
        found(columns, task)
    assert message in str(told.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=12), st.integers(0, 5))
def test_stratified_split(sizes: list[int], seed: int) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    split = stratified(strata, (0.6, 0.2, 0.2), np.random.RandomState(seed))
    for stratum, size in enumerate(sizes):
        counts = np.bincount(split[strata == stratum], minlength=3)
        assert counts.min() >= 1
        assert counts.sum() == size
    if min(sizes) >= 5:
        totals = np.bincount(split, minlength=3)
        assert np.abs(totals - sum(sizes) * np.array([0.6, 0.2, 0.2])).max() <= 2


def test_made_split_is_60_20_20_and_seeded(folder: Path) -> None:
    data = read(folder)
    assert data.split.bincount().tolist() == [18, 6, 6]
    for split in range(3):
        assert data.y[data.split == split].float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(read(folder).split, data.split)
    assert not torch.equal(read(folder, seed=1).split, data.split)
    assert read(folder, fractions=(0.4, 0.2, 0.4)).split.bincount().tolist() == [12, 6, 12]


def test_groups_stay_whole(folder: Path) -> None:
    rows = [[f"item{i}", "ab"[i % 2], f"g{i // 2}"] for i in range(ITEMS)]
    table(folder, ["id", "label", "group"], rows)
    data = read(folder)
    assert data.groups is not None
    sides = {g: {int(s) for s, h in zip(data.split, data.groups, strict=True) if h == g} for g in set(data.groups)}
    assert all(len(s) == 1 for s in sides.values())
    assert data.split.bincount().tolist() == [18, 6, 6]
    assert torch.equal(read(folder).split, data.split)
    assert "15, none on two sides" in describe(data)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), min_size=12, max_size=40),
    st.integers(0, 3),
)
def test_group_split_covers_every_class(groups: list[tuple[int, int]], seed: int) -> None:
    groups = [*groups, *((2, c) for c in range(3) for _ in range(3))]
    owner = [f"g{i}" for i, (size, _) in enumerate(groups) for _ in range(size)]
    y = torch.tensor([c for size, c in groups for _ in range(size)])
    problems = Problems("data")
    split = make_split(Target(y, "multiclass", ("a", "b", "c")), owner, Labelling(seed=seed), problems)
    problems.raise_any()
    for c in range(3):
        assert set(split[y == c].tolist()) == {0, 1, 2}
    assert len({(g, s) for g, s in zip(owner, split.tolist(), strict=True)}) == len(set(owner))
    share = split.bincount(minlength=3) / len(split)
    largest = max(size for size, _ in groups) / len(split)
    assert (share - torch.tensor([0.6, 0.2, 0.2])).abs().max() < 2 * largest + 0.1


def test_three_groups_are_enough() -> None:
    owner = [g for g in "abc" for _ in range(10)]
    y = torch.arange(30) % 2
    problems = Problems("data")
    split = make_split(Target(y, "binary", ("n", "p")), owner, Labelling(), problems)
    problems.raise_any()
    assert sorted(split.bincount().tolist()) == [10, 10, 10]


def test_groups_that_cannot_be_split_are_told() -> None:
    # class x is in three groups, but two of them hold all of class y as well, which has no third
    owner = ["a", "a", "b", "b", "c", "c"]
    y = torch.tensor([0, 1, 0, 1, 0, 0])
    problems = Problems("data")
    make_split(Target(y, "binary", ("x", "y")), owner, Labelling(), problems)
    with pytest.raises(InputError, match="whole groups of class 'y' into each of train, val and test"):
        problems.raise_any()


def test_multilabel_split_has_every_label_everywhere(folder: Path) -> None:
    rng = np.random.RandomState(1)
    rare = {int(i) for i in rng.permutation(ITEMS)[:4]}
    relabel(
        folder, lambda i: ";".join(n for n, on in (("odd", i % 2), ("third", i % 3 == 0), ("rare", i in rare)) if on)
    )
    data = read(folder)
    assert data.classes == ("odd", "rare", "third")
    for split in range(3):
        assert (data.y[data.split == split].sum(0) > 0).all()
    assert (data.split.bincount() - torch.tensor([18, 6, 6])).abs().max() <= 2


def test_regression_split(folder: Path) -> None:
    relabel(folder, lambda i: i / 7)
    data = read(folder)
    assert data.task == "regression"
    assert data.split.bincount().tolist() == [18, 6, 6]
    torch.testing.assert_close(data.y.flatten(), torch.arange(ITEMS) / 7)
    table(folder, ["id", "label", "group"], [[f"item{i}", i / 7, f"g{i // 5}"] for i in range(ITEMS)])
    assert sorted(read(folder).split.bincount().tolist()) == [5, 5, 20]


def test_given_split_in_many_words(folder: Path) -> None:
    words = ["train", "Training", "0", "val", "VALID", "validation", "dev", "1", "test", "Test ", "2"]
    expected = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    rows = [[f"item{i}", "ab"[i // 11 % 2], words[i % 11]] for i in range(ITEMS)]
    table(folder, ["id", "label", "split"], rows)
    assert read(folder).split.tolist() == [expected[i % 11] for i in range(ITEMS)]


@pytest.mark.parametrize("grouped", [False, True])
def test_val_is_taken_from_train(folder: Path, grouped: bool) -> None:
    rows = [[f"item{i}", "ab"[i % 2], "train" if i < 20 else "test", f"g{i // 2}"] for i in range(ITEMS)]
    if not grouped:
        rows = [row[:3] for row in rows]
    table(folder, ["id", "label", "split", "group"][: len(rows[0])], rows)
    data = read(folder)
    assert (data.split[20:] == 2).all()
    assert data.split[:20].bincount().tolist() == ([16, 4] if grouped else [15, 5])
    if grouped:
        assert torch.equal(data.split[:20:2], data.split[1:20:2])
    assert set(data.y[data.split == 1].tolist()) == {0, 1}
    assert torch.equal(read(folder).split, data.split)


def test_columns_found_without_being_named(folder: Path) -> None:
    table(folder, ["filename", "grade"], [[f"item{i}.npy", "ab"[i % 2]] for i in range(ITEMS)])
    assert read(folder).classes == ("a", "b")
    table(folder, ["id", "sick", "old"], [[f"item{i}", i % 2, int(i % 3 == 0)] for i in range(ITEMS)])
    data = read(folder)
    assert (data.task, data.classes) == ("multilabel", ("sick", "old"))
    assert read(folder, label_column="sick").task == "binary"
    assert read(folder, label_column="old, sick").classes == ("old", "sick")
    assert read(folder, label_column=["old", "sick"]).classes == ("old", "sick")


def test_facts_and_description() -> None:
    f = facts(digits())
    assert f["items"] == {"train": 1000, "val": 200, "test": 597}
    assert sum(f["class_counts"]["test"].values()) == 597
    assert f["tokens"] == [17, 17, 17]
    assert f["bytes"] == 1797 * 17 * 64 * 4
    text = describe(digits())
    assert "17 (1 prefix + 4 x 4 grid); width 64, float32, 7.8 MB" in text
    assert "multiclass, 10 classes" in text
    bags = digit_bags()
    assert facts(bags)["tokens"] == [5, int(bags.lengths().float().quantile(0.5, interpolation="lower")), 40]


def test_description_of_many_classes_and_of_regression() -> None:
    def data(task: Any, y: torch.Tensor, classes: tuple[str, ...]) -> TokenDataset:
        ids = tuple(map(str, range(len(y))))
        return TokenDataset("d", torch.ones(len(y), 2, 3).half(), y, task, classes, ids, torch.arange(len(y)) % 3)

    text = describe(data("multiclass", torch.arange(90) % 30, tuple(f"c{i}" for i in range(30))))
    assert "c11" in text
    assert "c12" not in text
    assert "... and 18 more" in text
    assert "float16, 1.1 kB" in text
    assert "task: regression of age, weight" in describe(data("regression", torch.rand(9, 2), ("age", "weight")))
