"""Defaults that fit any width."""

from cenote.core.errors import InputError


def largest_divisor(width: int, at_most: int) -> int:
    """The largest divisor of `width` that is not above `at_most`.

    >>> largest_divisor(768, 32), largest_divisor(50, 32), largest_divisor(7, 4)
    (32, 25, 1)
    """
    if width < 1 or at_most < 1:
        raise InputError(f"largest_divisor: expected positive numbers, got the width {width} and at most {at_most}")
    return next(d for d in range(min(at_most, width), 0, -1) if width % d == 0)


def require_divides(name: str, parts: int, width: int) -> None:
    """Raise `InputError` unless `parts` cuts `width` into equal slices."""
    if parts < 1 or width % parts:
        raise InputError(
            f"{name}: {parts} does not divide the width {width} into equal slices; "
            f"the nearest below that does is {largest_divisor(width, max(parts, 1))}"
        )
