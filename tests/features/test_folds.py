import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cenote.core import InputError
from cenote.features import digits, read
from cenote.features.dataset import TokenDataset
from cenote.features.splits import folds


def made(task: Any, y: torch.Tensor, classes: tuple[str, ...], groups: tuple[str, ...] | None = None) -> TokenDataset:
    """Items without much in them, split as 3 : 1 : 1."""
    split = torch.tensor([0, 0, 0, 1, 2]).repeat(len(y))[: len(y)]
    ids = tuple(map(str, range(len(y))))
    return TokenDataset("made", torch.ones(len(y), 1, 1), y, task, classes, ids, split, groups, split_seed=0)


TARGETS: list[tuple[Any, torch.Tensor, tuple[str, ...]]] = [
    ("binary", torch.arange(60) % 4 // 3, ("no", "yes")),
    ("multiclass", torch.arange(60) % 3, ("a", "b", "c")),
    ("regression", torch.arange(60)[:, None].float(), ("age",)),
    ("multilabel", (torch.arange(60)[:, None] % torch.tensor([2, 3]) == 0).float(), ("even", "third")),
]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("task", "y", "classes"), TARGETS)
def test_each_item_is_tested_once_in_each_round(
    task: Any, y: torch.Tensor, classes: tuple[str, ...], grouped: bool
) -> None:
    groups = tuple(f"g{i // 4}" for i in range(60)) if grouped else None
    data = made(task, y, classes, groups)
    found = folds(data, 5, 2)
    assert len(found) == 10
    for rounds in (found[:5], found[5:]):
        assert torch.equal(torch.stack([split == 2 for split in rounds]).sum(0), torch.ones(60, dtype=torch.int64))
    assert not torch.equal(found[0], found[5])
    for split in found:
        sizes = split.bincount().tolist()
        # labels that overlap cannot all be met at once
        assert sizes == pytest.approx([36, 12, 12], abs=1 if task == "multilabel" else 0)
        if groups is not None:
            assert len({(g, s) for g, s in zip(groups, split.tolist(), strict=True)}) == 15
        if task == "binary":
            assert [int(y[split == part].sum()) for part in range(3)] == [9, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(found, folds(data, 5, 2), strict=True))


def test_another_seed_gives_other_folds() -> None:
    data = made(*TARGETS[1])
    other = dataclasses.replace(data, split_seed=1)
    assert not torch.equal(folds(data, 5)[0], folds(other, 5)[0])


def test_a_given_split_is_not_taken_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"come with a split of their own.*without a split column"):
        folds(digits(), 5)
    rng = np.random.default_rng(0)
    y, split = np.arange(30) % 2, np.array(["train", "val", "test"])[np.arange(30) // 2 % 3]
    np.savez(tmp_path / "made.npz", x=rng.normal(size=(30, 2, 3)), y=y)
    np.savez(tmp_path / "given.npz", x=rng.normal(size=(30, 2, 3)), y=y, split=split)
    assert read(tmp_path / "made.npz", seed=7).split_seed == 7
    assert read(tmp_path / "given.npz").split_seed is None
    assert read(tmp_path / "made.npz").with_split([0, 1, 2] * 10).split_seed is None


def test_too_few_items_or_groups_for_so_many_folds_are_told() -> None:
    y = torch.tensor([0] * 40 + [1] * 4)
    with pytest.raises(InputError, match=r"folds: each of 5 tests items .* class 'yes' has 4; give at most 4, or 1"):
        folds(made("binary", y, ("no", "yes")), 5)
    groups = tuple(f"g{i % 3}" for i in range(44))
    with pytest.raises(InputError, match=r"folds: each of 4 tests groups .* has 3; give at most 3"):
        folds(made("binary", y, ("no", "yes"), groups), 4)
    with pytest.raises(InputError, match="folds: of 4, number 1 has nothing to learn, choose or judge by"):
        folds(
            made(
                "regression", torch.arange(40)[:, None] // 10 * 1.0, ("age",), tuple("abcd"[i // 10] for i in range(40))
            ),
            4,
        )
    with pytest.raises(InputError, match="folds: expected at least 2"):
        folds(made("binary", y, ("no", "yes")), 1)
