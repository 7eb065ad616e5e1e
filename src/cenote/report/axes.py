"""Linear and logarithmic axes: where a value lies, and where the ticks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Maps values of `[low, high]` to pixels of `[start, end]`.

    >>> Axis(0.1, 10, 0, 200, log=True).at(1.0)
    100.0
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.08
    ) -> Axis:
        """An axis that holds all values with some room around them; one single value lies in the middle."""
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        alone = 0.3 if log else max(abs(low) * 0.05, 1e-3)
        room = alone if high - low < 1e-9 else margin * (high - low)
        low, high = low - room, high + room
        return cls(10**low if log else low, 10**high if log else high, start, end, log)

    def at(self, value: float) -> float:
        """Pixels, beyond the ends for values outside."""
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = math.log10(low), math.log10(high), math.log10(v)
        return round(self.start + (v - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers on the axis.

        >>> Axis(0.81, 0.97, 0, 1).ticks()
        [0.84, 0.88, 0.92, 0.96]
        >>> Axis(0.012, 0.9, 0, 1, log=True).ticks()
        [0.02, 0.05, 0.1, 0.2, 0.5]
        """
        if self.log:
            return self._log_ticks(wanted)
        rough = (self.high - self.low) / max(wanted, 1)
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 4, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 10) for i in range(first, last + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for multiples in ((1, 2, 5), (1, 3), (1,)):
            found = [round(m * 10.0**k, 12) for k in powers for m in multiples]
            found = [v for v in found if self.low <= v <= self.high]
            if len(found) <= wanted + 3:
                break
        return found
