import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

ITEMS, DIM = 30, 8


@pytest.fixture
def bags() -> list[np.ndarray]:
    """30 bags of 3 to 9 vectors of width 8; the first number of each row tells the item, the second the row."""
    rng = np.random.RandomState(0)
    made = [rng.randn(3 + i % 7, DIM).astype(np.float32) for i in range(ITEMS)]
    for i, bag in enumerate(made):
        bag[:, 0], bag[:, 1] = i, np.arange(len(bag))
    return made


@pytest.fixture
def same(bags: list[np.ndarray]) -> list[np.ndarray]:
    """The same with 3 vectors each."""
    return [bag[:3] for bag in bags]


@pytest.fixture
def folder(tmp_path: Path, bags: list[np.ndarray]) -> Path:
    """The bags as .npy files with two classes in labels.csv."""
    root = tmp_path / "bags"
    root.mkdir()
    for i, bag in enumerate(bags):
        np.save(root / f"item{i}.npy", bag)
    table(root, ["id", "label"], [[f"item{i}", "ab"[i % 2]] for i in range(ITEMS)])
    return root


def table(root: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Write labels.csv."""
    path = root / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def relabel(root: Path, label: Callable[[int], object], name: str = "label") -> None:
    """Give the 30 items other labels."""
    table(root, ["id", name], [[f"item{i}", label(i)] for i in range(ITEMS)])
