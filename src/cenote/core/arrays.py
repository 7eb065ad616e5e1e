"""What people hold numbers in, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cenote.core.errors import InputError


def as_tensor(dtype: torch.dtype | None = None, **given: Any) -> Tensor:
    """The one argument, given by its name, as a tensor: of a tensor, an array of any order and byte order, or nested lists.

    Raises:
        InputError: for what holds no numbers, or rows of different lengths.

    >>> as_tensor(x=np.arange(3, dtype=">i4")[::-1]).tolist()
    [2, 1, 0]
    >>> as_tensor(x=[[1.0], [2.0, 3.0]])
    Traceback (most recent call last):
    cenote.core.errors.InputError: x: expected an array of numbers, got rows of different lengths
    """
    ((name, value),) = given.items()
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"{name}: expected an array of numbers, got rows of different lengths") from None
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected an array of numbers, got {_said(value, array)}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype in (np.uint16, np.uint32, np.uint64):
        native = native.astype(np.int64)
    if native.dtype == np.longdouble:
        native = native.astype(np.float64)
    # torch takes no negative strides, and warns of arrays that cannot be written
    usable = native.flags.writeable and all(step >= 0 for step in native.strides)
    tensor = torch.from_numpy(native if usable else native.copy())
    return tensor if dtype is None else tensor.to(dtype)


def _said(value: Any, array: np.ndarray) -> str:
    kind = {"U": "texts", "S": "texts", "O": "objects", "M": "dates", "c": "complex numbers"}.get(array.dtype.kind)
    return f"{kind or array.dtype} ({type(value).__name__})"
