"""One number for all axes, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from cenote.core.errors import InputError

Number = TypeVar("Number", int, float)


def per_axis(
    name: str, given: Number | Sequence[Number], axes: int, holds: Callable[[Number], bool], expected: str
) -> tuple[Number, ...]:
    """The number of each axis, of one for all or one for each.

    Args:
        name: of the argument.
        given: what came.
        axes: their number.
        holds: what each number must be.
        expected: the same in words.

    Raises:
        InputError: naming the argument.

    Example:
        >>> per_axis("sigma", 2.0, 2, lambda s: s > 0, "a positive number")
        (2.0, 2.0)
    """
    numbers = (given,) * axes if isinstance(given, int | float) else tuple(given)
    if len(numbers) != axes or not all(map(holds, numbers)):
        raise InputError(f"{name}: expected {expected}, or one for each of {axes} axes, got {given!r}")
    return numbers


def integers_per_axis(name: str, given: int | Sequence[int], axes: int, least: int = 1) -> tuple[int, ...]:
    """As `per_axis`, of integers.

    >>> integers_per_axis("kernel_size", (3, 0), 2)
    Traceback (most recent call last):
    cenote.core.errors.InputError: kernel_size: expected an integer of at least 1, or one for each of 2 axes, got (3, 0)
    """
    return per_axis(name, given, axes, lambda n: isinstance(n, int) and n >= least, f"an integer of at least {least}")
