"""Requirements that many arguments share."""

import math
import re
from collections.abc import Callable

import pytest
import torch

from cenote.core import InputError
from cenote.core.requirements import (
    require_all_positive,
    require_at_least,
    require_floating,
    require_one_of,
    require_positive,
    require_rate,
)


@pytest.mark.parametrize(
    ("require", "fits", "does_not"),
    [
        (lambda **given: require_at_least(2, **given), (2, 2.5, math.inf), (1, 1.99, -math.inf, math.nan)),
        (require_positive, (1e-30, 1, math.inf), (0, -1e-30, math.nan)),
        (require_all_positive, ([1], (2, 0.5)), ((), (1, 0), (1, -1e-30), (math.nan,))),
        (require_rate, (0, 0.5, 1 - 1e-9), (-1e-9, 1, math.nan)),
        (lambda **given: require_one_of((3, None), **given), (3, None), (0, "3", "")),
    ],
)
def test_what_fits_passes_and_what_does_not_is_named(
    require: Callable[..., None], fits: tuple[object, ...], does_not: tuple[object, ...]
) -> None:
    for value in fits:
        require(here=value, there=value)
    for value in does_not:
        with pytest.raises(InputError, match=rf"^there: expected .*, got {re.escape(repr(value))}$"):
            require(here=fits[0], there=value)


def test_one_known_value_is_named_alone() -> None:
    with pytest.raises(InputError, match=r"^kind: expected 'text', got 'image'$"):
        require_one_of(["text"], kind="image")


def test_floating_point_of_any_width_fits() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        require_floating(torch.zeros(1, dtype=dtype))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(InputError, match=rf"x: expected floating point features, got {dtype}; use x\.float"):
            require_floating(torch.zeros(1, dtype=dtype))
