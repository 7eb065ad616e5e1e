"""What a job calls things, and how it writes its metric."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What a job calls things, and how it writes its metric.

    Attributes:
        arms: several of what is compared.
        percent: whether the metric is a share, told in per cent and points; otherwise it is told as it is.
        digits: after the point; default 1 of per cent, 3 of others.
        cost: what the winner takes so many times of.
        reference: how an arm that is a reference is called, its name in place of `{}`.
        remedy: what to look at where a reference is ahead of the winner.
    """

    arms: str = "methods"
    percent: bool = False
    digits: int | None = None
    cost: str = "time"
    reference: str = "{}"
    remedy: str = "how the others are run"

    def amount(self, value: float) -> str:
        """A metric.

        >>> Words().amount(0.5), Words(percent=True).amount(0.5)
        ('0.500', '50.0 %')
        """
        return f"{self._written(100 * value)} %" if self.percent else self._written(value)

    def difference(self, value: float, interval: tuple[float, float]) -> str:
        """Of two metrics; without an interval where none is known.

        >>> Words(percent=True).difference(0.061, (0.042, 0.08))
        '6.1 points (4.2 to 8.0)'
        """
        scale, unit = (100.0, " points") if self.percent else (1.0, "")
        low, high = (scale * v for v in interval)
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"{self._written(scale * value)}{unit}"
        return f"{self._written(scale * value)}{unit} ({self._written(low)} to {self._written(high)})"

    def _written(self, value: float) -> str:
        """
        >>> Words()._written(-0.0001)
        '0.000'
        """
        return f"{round(value, self._digits) + 0.0:.{self._digits}f}"

    @property
    def _digits(self) -> int:
        return self.digits if self.digits is not None else 1 if self.percent else 3


def listed(names: list[str]) -> str:
    """Names as people list them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(number: int, thing: str) -> str:
    """So many things.

    >>> counted(1, "text"), counted(1200, "text")
    ('1 text', '1,200 texts')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
