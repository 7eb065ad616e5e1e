import math

import pytest
import torch

from cenote.core import Bags
from cenote.features.dataset import TokenDataset


def make_dataset(items: int = 90, tokens: int = 6, dim: int = 8, classes: int = 3, seed: int = 0) -> TokenDataset:
    """Classes differ in the mean of one channel, so that every pooling can learn something."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(items) % classes
    x = torch.randn(items, tokens, dim, generator=g).to(torch.get_default_dtype())
    x[torch.arange(items), :, y] += 1.5
    split = (torch.arange(items) // classes % 3).long()
    return TokenDataset(
        name="toy",
        x=x,
        y=y,
        task="binary" if classes == 2 else "multiclass",
        classes=tuple("abcdefgh"[:classes]),
        ids=tuple(f"item{i}" for i in range(items)),
        split=split,
    )


def make_ragged(items: int = 60, dim: int = 8, seed: int = 0) -> TokenDataset:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (items,), generator=g).tolist()
    y = torch.arange(items) % 2
    sets = [torch.randn(n, dim, generator=g) + 1.5 * y[i] for i, n in enumerate(lengths)]
    return TokenDataset(
        name="ragged toy",
        x=Bags.from_list(sets),
        y=y,
        task="binary",
        classes=("no", "yes"),
        ids=tuple(f"bag{i}" for i in range(items)),
        split=(torch.arange(items) // 2 % 3).long(),
    )


@pytest.fixture(autouse=True)
def _in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no workers are asked for, a clock decides whether processes pay, and with it the order of what is told."""
    monkeypatch.setattr("cenote.compare.engine.PROCESSES_PAY_FROM", math.inf)


@pytest.fixture
def toy() -> TokenDataset:
    return make_dataset()


@pytest.fixture
def ragged() -> TokenDataset:
    return make_ragged()
