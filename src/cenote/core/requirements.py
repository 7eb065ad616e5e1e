"""What many arguments must be. Arguments come by their names, which the messages give back."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core.errors import InputError


def require_at_least(least: int | float, **given: int | float) -> None:
    """Raise `InputError` unless each number is `least` or more.

    >>> require_at_least(1, heads=8, depth=0)
    Traceback (most recent call last):
    cenote.core.errors.InputError: depth: expected at least 1, got 0
    """
    for name, number in given.items():
        if not number >= least:
            raise InputError(f"{name}: expected at least {least}, got {number}")


def require_positive(**given: int | float) -> None:
    """Raise `InputError` unless each number is above 0.

    >>> require_positive(eps=0.0)
    Traceback (most recent call last):
    cenote.core.errors.InputError: eps: expected a positive number, got 0.0
    """
    for name, number in given.items():
        if not number > 0:
            raise InputError(f"{name}: expected a positive number, got {number}")


def require_all_positive(**given: Iterable[int | float]) -> None:
    """Raise `InputError` unless each argument holds numbers, all of them above 0.

    >>> require_all_positive(rates=(6, 0))
    Traceback (most recent call last):
    cenote.core.errors.InputError: rates: expected at least one number, all of them positive, got (6, 0)
    """
    for name, numbers in given.items():
        held = tuple(numbers)
        if not held or not all(number > 0 for number in held):
            raise InputError(f"{name}: expected at least one number, all of them positive, got {held}")


def require_heads(dim: int, heads: int) -> None:
    """Raise `InputError` unless so many heads share the width evenly.

    >>> require_heads(8, 3)
    Traceback (most recent call last):
    cenote.core.errors.InputError: heads: expected a divisor of dim = 8, got 3
    """
    require_at_least(1, dim=dim, heads=heads)
    if dim % heads:
        raise InputError(f"heads: expected a divisor of dim = {dim}, got {heads}")


def require_mask(shape: Sequence[int], **given: Tensor | None) -> None:
    """Raise `InputError` unless each mask that is given is bool and of this shape.

    >>> require_mask((1, 3), mask=torch.ones(1, 3))
    Traceback (most recent call last):
    cenote.core.errors.InputError: mask: expected bool [1, 3], got torch.float32 [1, 3]; use mask.bool()
    """
    for name, mask in given.items():
        if mask is not None and (mask.dtype != torch.bool or mask.shape != torch.Size(shape)):
            hint = "" if mask.dtype == torch.bool else f"; use {name}.bool()"
            raise InputError(f"{name}: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}{hint}")


def require_rate(**given: int | float) -> None:
    """Raise `InputError` unless each number is a share that can be left out, as of dropout.

    >>> require_rate(dropout=1.0)
    Traceback (most recent call last):
    cenote.core.errors.InputError: dropout: expected a share from 0 to below 1, got 1.0
    """
    for name, share in given.items():
        if not 0 <= share < 1:
            raise InputError(f"{name}: expected a share from 0 to below 1, got {share}")


def require_one_of(known: Iterable[Any], **given: Any) -> None:
    """Raise `InputError` unless each argument is one of the known values.

    >>> require_one_of(("mean", "sum", "max"), reduce="median")
    Traceback (most recent call last):
    cenote.core.errors.InputError: reduce: expected 'mean', 'sum' or 'max', got 'median'
    """
    known = tuple(known)
    for name, value in given.items():
        if value not in known:
            *others, last = map(repr, known)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise InputError(f"{name}: expected {expected}, got {value!r}")


def require_several(**given: object) -> None:
    """Raise `InputError` unless each argument is a collection, and not one text, whose letters would pass for names.

    >>> require_several(kinds="self")
    Traceback (most recent call last):
    cenote.core.errors.InputError: kinds: expected names, such as ['self'], got the one text 'self'
    """
    for name, names in given.items():
        if isinstance(names, (str, bytes)):
            raise InputError(f"{name}: expected names, such as [{names!r}], got the one text {names!r}")
        if not isinstance(names, Collection):
            raise InputError(f"{name}: expected a list of names, got {names!r}")


def require_finite(**given: object) -> None:
    """Raise `InputError` unless each argument is a number, neither infinite nor NaN.

    >>> require_finite(weight="2")
    Traceback (most recent call last):
    cenote.core.errors.InputError: weight: expected a finite number, got '2'
    """
    for name, number in given.items():
        if not isinstance(number, Real) or not math.isfinite(number):
            raise InputError(f"{name}: expected a finite number, got {number!r}")


def require_floating(x: Tensor) -> None:
    """Raise `InputError` unless the features `x` are floating point numbers.

    >>> require_floating(torch.arange(3))
    Traceback (most recent call last):
    cenote.core.errors.InputError: x: expected floating point features, got torch.int64; use x.float()
    """
    if not x.is_floating_point():
        raise InputError(f"x: expected floating point features, got {x.dtype}; use x.float()")


def require_dtype_of(module: nn.Module, x: Tensor) -> None:
    """Raise `InputError` unless `x` has the dtype of the module's matrices, without which torch cannot multiply them.

    Where autocast is on, torch sees to it.

    >>> require_dtype_of(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.float64))
    Traceback (most recent call last):
    cenote.core.errors.InputError: x: expected torch.float32 as the parameters of Linear, got torch.float64; use ...
    """
    for parameter in module.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            if parameter.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                own, came = (_METHODS.get(d, f".to({d})") for d in (parameter.dtype, x.dtype))
                raise InputError(
                    f"x: expected {parameter.dtype} as the parameters of {type(module).__name__}, got {x.dtype}; use x{own}, "
                    f"or {came} on the module"
                )
            return


_METHODS = {
    torch.float16: ".half()",
    torch.bfloat16: ".bfloat16()",
    torch.float32: ".float()",
    torch.float64: ".double()",
}
