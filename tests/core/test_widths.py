from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.core import InputError
from cenote.core.widths import largest_divisor, require_divides


@given(width=st.integers(1, 5000), at_most=st.integers(1, 5000))
def test_largest_divisor(width: int, at_most: int) -> None:
    found = largest_divisor(width, at_most)
    assert width % found == 0
    assert found <= at_most
    assert not any(width % d == 0 for d in range(found + 1, min(at_most, width) + 1))


@given(width=st.integers(1, 200), parts=st.integers(-2, 250))
def test_require_divides(width: int, parts: int) -> None:
    if parts >= 1 and width % parts == 0:
        require_divides("heads", parts, width)
        return
    with pytest.raises(
        InputError, match=rf"^heads: {parts} does not divide the width {width} into equal slices; .* is \d+$"
    ):
        require_divides("heads", parts, width)


def test_the_nearest_is_named() -> None:
    with pytest.raises(InputError, match=r"heads: 10 does not divide the width 768 .* is 8$"):
        require_divides("heads", 10, 768)


@pytest.mark.parametrize("arguments", [(0, 3), (5, 0), (5, -1)])
def test_no_divisor_below_one(arguments: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected positive"):
        largest_divisor(*arguments)
