"""The plot of metric against latency: geometry only, the template draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cenote.compare.result import ArmResult, Comparison
from cenote.report.axes import Axis
from cenote.report.formats import Units, significant

LETTER = 6.4
LINE = 13.0
DOT = 5.0


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap.

        >>> Box(0, 0, 2, 2).meets(Box(1, 1, 3, 3)), Box(0, 0, 2, 2).meets(Box(2, 0, 3, 3))
        (True, False)
        """
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True)
class Label:
    """A name beside its point; `leader` is a line to a point that is further away."""

    x: float
    y: float
    anchor: str
    leader: tuple[float, float] | None
    box: Box


@dataclass(frozen=True)
class Point:
    """One method."""

    result: ArmResult
    x: float
    y: float
    top: float
    bottom: float
    efficient: bool
    winner: bool
    baseline: bool
    label: Label | None


@dataclass(frozen=True)
class ParetoPlot:
    """Points, ticks and the steps of the efficient front; the size is that of the view box."""

    width: int
    height: int
    left: int
    bottom: int
    right: int
    top: int
    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    front: str
    unnamed: tuple[str, ...]


def pareto_plot(
    c: Comparison[Any], units: Units, width: int, height: int, told: Callable[[float], str] = significant
) -> ParetoPlot | None:
    """Lay the plot out for a screen; `None` where fewer than two methods have a metric and a cost.

    Args:
        c: whose arms are drawn.
        units: of the metric.
        width, height: of the view box.
        told: how a cost is written.
    """
    latency = {r.method: math.nan if r.cost is None else r.cost for r in c.results}
    shown = [r for r in c.results if math.isfinite(r.metric) and math.inf > latency[r.method] > 0]
    if len(shown) < 2:
        return None
    left, right, top, bottom = 46, width - 14, 26, height - 44
    wanted = 5 if width > 500 else 3
    across = Axis.around([latency[r.method] for r in shown], left + 10, right - 10, log=True)
    heights = [v for r in shown for v in (r.metric, *r.interval) if math.isfinite(v)]
    up = Axis.around(heights, bottom - 8, top + 8, margin=0.02)
    places = {r.method: (across.at(latency[r.method]), up.at(r.metric)) for r in shown}
    important = {c.winner, c.baseline, *c.pareto}
    taken = [Box(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in places.values()]
    frame = Box(left + 2, top, right + 8, bottom - 2)
    labels: dict[str, Label] = {}
    for r in sorted(shown, key=lambda r: r.method not in important):
        label = _placed(r.method, *places[r.method], taken, frame, patient=r.method in important)
        if label is not None:
            labels[r.method] = label
            taken.append(label.box)
    points = tuple(
        Point(
            result=r,
            x=places[r.method][0],
            y=places[r.method][1],
            top=_end(up, r.interval[1], r.metric),
            bottom=_end(up, r.interval[0], r.metric),
            efficient=r.method in c.pareto,
            winner=r.method == c.winner,
            baseline=r.method == c.baseline,
            label=labels.get(r.method),
        )
        for r in shown
    )
    return ParetoPlot(
        width,
        height,
        left,
        bottom,
        right,
        top,
        points,
        tuple((across.at(v), told(v)) for v in across.ticks(wanted)),
        tuple((up.at(v), f"{units.number(v):.6g}") for v in up.ticks(5)),
        _front([p for p in points if p.efficient]),
        tuple(p.result.method for p in points if p.label is None),
    )


def _end(axis: Axis, value: float, otherwise: float) -> float:
    return axis.at(value if math.isfinite(value) else otherwise)


def _front(efficient: list[Point]) -> str:
    steps = sorted(efficient, key=lambda p: (p.x, p.y))
    if len(steps) < 2:
        return ""
    return f"M{steps[0].x} {steps[0].y}" + "".join(f"H{p.x}V{p.y}" for p in steps[1:])


def _placed(name: str, x: float, y: float, taken: list[Box], frame: Box, *, patient: bool) -> Label | None:
    """The nearest free place; who is not important goes without a name rather than far away."""
    wide = LETTER * len(name) + 2
    for label in _candidates(x, y, wide, (0, 14, 26, 40, 56) if patient else (0, 12)):
        b = label.box
        inside = b.left >= frame.left and b.right <= frame.right and b.top >= frame.top and b.bottom <= frame.bottom
        if inside and not any(b.meets(t) for t in taken):
            return label
    return None


def _candidates(x: float, y: float, wide: float, distances: tuple[int, ...]) -> Iterator[Label]:
    near = DOT + 4
    for far in distances:
        leader = (x, y) if far else None
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            px, py = x + dx * (near + far), y + dy * (near + 4 + far)
            left = px if dx > 0 else px - wide if dx < 0 else px - wide / 2
            anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
            box = Box(left, py - LINE / 2, left + wide, py + LINE / 2)
            yield Label(round(px, 1), round(py + 4, 1), anchor, leader, box)
