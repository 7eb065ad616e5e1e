"""Data of studies: a tensor, or a named tuple of tensors that share their leading dimensions, such as `[seeds, items]`.

What a model reads is passed to it as it is, whatever its fields are: only the model knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Data = TypeVar("Data", bound="Tensor | tuple[Any, ...]")


def each(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    """The same data with `change` made to every tensor.

    >>> each((torch.ones(2, 3), torch.zeros(2)), lambda t: t[:1])
    (tensor([[1., 1., 1.]]), tensor([0.]))
    """
    changed: Any = change(data) if isinstance(data, Tensor) else _like(data, [each(part, change) for part in data])
    return changed


def stacked(draws: Iterable[Data]) -> Data:
    """One draw per seed -> data with a leading dimension of seeds.

    >>> x, y = stacked((torch.randn(5, 3), torch.arange(5)) for _ in range(2))
    >>> x.shape, y.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5]))
    """
    drawn: list[Any] = list(draws)
    if isinstance(drawn[0], Tensor):
        together: Any = torch.stack(drawn)
        return together
    return _like(drawn[0], [stacked(parts) for parts in zip(*drawn, strict=True)])


def unstacked(data: Data, seeds: int) -> list[Data]:
    """Inverse of `stacked`: the data of each seed."""
    return [each(data, lambda t, i=i: t[i]) for i in range(seeds)]  # type: ignore[misc]


def split_at(data: Data, items: int) -> tuple[Data, Data]:
    """So many first items of each seed, for training, and the others, for the test.

    >>> [part.tolist() for part in split_at(torch.tensor([[1, 2, 3]]), 2)]
    [[[1, 2]], [[3]]]
    """
    return each(data, lambda t: t[:, :items]), each(data, lambda t: t[:, items:])


def _like(data: Any, parts: list[Any]) -> Any:
    return type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
