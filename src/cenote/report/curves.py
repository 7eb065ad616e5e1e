"""Validation per epoch, one small panel per method."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cenote.jobs.probe.result import Comparison
from cenote.report.axes import Axis

WIDTH, HEIGHT, EDGE = 200, 96, 6
MOST_STEPS = 90
CUT = 0.12


@dataclass(frozen=True)
class Panel:
    """One method: a path per seed, and a dot at each epoch that was kept."""

    method: str
    paths: tuple[str, ...]
    kept: tuple[tuple[float, float], ...]
    best: float
    epochs: int


@dataclass(frozen=True)
class Curves:
    """Panels on common axes, from `low` to `high` and from epoch 1 to `epochs`.

    Attributes:
        reference: height of the baseline's best validation.
    """

    panels: tuple[Panel, ...]
    low: float
    high: float
    epochs: int
    reference: float | None


def curves(c: Comparison) -> Curves | None:
    """All panels; `None` where nothing was recorded. A slow start may fall below the axis, half of a curve never."""
    trained = [r for r in c.results if not r.reference]
    recorded = [sorted(v for seed in r.validation_curve for v in seed if math.isfinite(v)) for r in trained]
    values = sorted(v for of_method in recorded for v in of_method)
    if not values:
        return None
    epochs = max(len(seed) for r in trained for seed in r.validation_curve)
    halves = [of_method[len(of_method) // 2] for of_method in recorded if of_method]
    low, high = min(values[int(CUT * (len(values) - 1))], *halves), values[-1]
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    up = Axis(low, high, HEIGHT - EDGE, EDGE)
    across = Axis(1, max(epochs, 2), EDGE, WIDTH - EDGE)
    panels = []
    for r in trained:
        kept = [(e, seed[e - 1]) for e, seed in zip(r.epochs, r.validation_curve, strict=False) if 0 < e <= len(seed)]
        panels.append(
            Panel(
                r.method,
                tuple(path for seed in r.validation_curve if (path := _path(seed, across, up))),
                tuple((across.at(e), up.at(v)) for e, v in kept if math.isfinite(v)),
                max((v for seed in r.validation_curve for v in seed if math.isfinite(v)), default=math.nan),
                max((len(seed) for seed in r.validation_curve), default=0),
            )
        )
    best = next((p.best for p in panels if p.method == c.baseline), math.nan)
    return Curves(tuple(panels), low, high, epochs, up.at(best) if math.isfinite(best) else None)


def _path(values: tuple[float, ...], across: Axis, up: Axis) -> str:
    step = -(-len(values) // MOST_STEPS)
    places = [
        (across.at(epoch), up.at(v))
        for epoch, v in enumerate(values, start=1)
        if math.isfinite(v) and (epoch % step == 1 % step or epoch == len(values))
    ]
    # a path of one place draws nothing; its kept epoch draws the dot
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places) if len(places) > 1 else ""
