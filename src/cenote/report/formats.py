"""Numbers as people read them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cenote.compare.result import Comparison

NOTHING = "–"


@dataclass(frozen=True)
class Units:
    """How the metric of one comparison is written: in percent, or plain where it is no share (R2).

    Attributes:
        percent: multiply by 100.
        digits: after the point; as many as the narrowest interval deserves.
    """

    percent: bool
    digits: int

    @classmethod
    def of(cls, comparison: Comparison[Any]) -> Units:
        """Chosen once, so that all numbers of a page can be compared.

        >>> Units(percent=True, digits=1).value(0.93449)
        '93.4'
        """
        if not comparison.words.percent:
            return cls(percent=False, digits=3)
        widths = [100 * (high - low) for low, high in (r.interval for r in comparison.results) if high > low]
        narrowest = min(widths, default=1.0)
        return cls(percent=True, digits=1 if narrowest >= 0.5 else 2 if narrowest >= 0.05 else 3)

    @property
    def symbol(self) -> str:
        """After one value."""
        return " %" if self.percent else ""

    @property
    def points(self) -> str:
        """After a difference of two values."""
        return " points" if self.percent else ""

    def number(self, value: float) -> float:
        """The value in these units."""
        return 100 * value if self.percent else value

    def value(self, value: float, more_digits: int = 0) -> str:
        """A value without its symbol."""
        if not math.isfinite(value):
            return NOTHING
        return _minus(f"{self.number(value):.{self.digits + more_digits}f}")

    def difference(self, value: float) -> str:
        """A value with its sign.

        >>> Units(True, 1).difference(-0.0123), Units(True, 1).difference(0.0001)
        ('−1.2', '0.0')
        """
        text = self.value(value)
        return f"+{text}" if text[0] not in "−–" and float(text) > 0 else text

    def between(self, interval: Sequence[float]) -> str:
        """An interval.

        >>> Units(False, 3).between((-0.01, 0.25))
        '−0.010 to 0.250'
        """
        return f"{self.value(interval[0])} to {self.value(interval[1])}"


def _minus(text: str) -> str:
    if text.startswith("-"):
        return f"−{text[1:]}" if float(text) else text[1:]
    return text


def p_value(p: float) -> str:
    """A p-value.

    >>> p_value(0.00021), p_value(0.0123), p_value(1.0)
    ('< 0.001', '0.012', '1')
    """
    if not math.isfinite(p):
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def significant(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never in powers of ten; a dash for what was not measured.

    >>> [significant(v) for v in (0.01234, 1.5, 1234.5, 0.0)]
    ['0.0123', '1.5', '1,234', '0']
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, min(9, digits - 1 - math.floor(math.log10(abs(value)))))
    text = f"{value:,.{decimals}f}"
    return _minus(text.rstrip("0").rstrip(".") if "." in text else text)


def commas(count: int | None) -> str:
    """A whole number, exactly.

    >>> commas(1234567), commas(None)
    ('1,234,567', '–')
    """
    if count is None:
        return NOTHING
    return f"{int(count):,}"


def short(count: float | None) -> str:
    """A large count in thousands, millions or billions.

    >>> short(9850), short(12_345), short(8_100_000)
    ('9,850', '12.3 k', '8.1 M')
    """
    if count is None or not math.isfinite(count):
        return NOTHING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= 10 * size or (size > 1e3 and abs(count) >= size):
            return f"{significant(count / size)} {unit}"
    return f"{count:,.0f}"


def size(count: float) -> str:
    """Bytes.

    >>> size(512), size(1_840_000)
    ('512 bytes', '1.84 MB')
    """
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{significant(count / least)} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """A time.

    >>> duration(3.21), duration(185), duration(7300)
    ('3.2 s', '3 min 5 s', '2 h 1 min')
    """
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 120:
        return f"{significant(seconds, 2 if seconds < 100 else 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def moment(iso: str) -> str:
    """A date and time, to the minute.

    >>> moment("2026-05-04T10:11:12+00:00"), moment("last week")
    ('4 May 2026, 10:11 UTC', 'last week')
    """
    try:
        when = datetime.datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".rstrip()
