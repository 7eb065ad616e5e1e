import dataclasses
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.report.axes import Axis
from cenote.report.curves import HEIGHT, WIDTH, curves
from cenote.report.formats import Units
from cenote.report.page import NARROW, WIDE
from cenote.report.pareto import pareto_plot
from tests.report.factory import make_comparison


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("methods", [2, 9, 30])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_meet_neither_each_other_nor_points(size: tuple[int, int], methods: int, seed: int) -> None:
    c = make_comparison(methods, seed=seed)
    plot = pareto_plot(c, Units.of(c), *size)
    assert plot is not None
    boxes = [p.label.box for p in plot.points if p.label]
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.meets(b)]
    for p in plot.points:
        assert plot.left <= p.x <= plot.right
        assert plot.top <= p.y <= plot.bottom
        assert plot.top <= p.top <= p.y <= p.bottom <= plot.bottom
        assert not [b for b in boxes if b.left < p.x < b.right and b.top < p.y < b.bottom]
    for b in boxes:
        assert 0 <= b.left < b.right <= plot.width
    named = {p.result.method for p in plot.points if p.label}
    assert named | set(plot.unnamed) == {r.method for r in c.results}
    if size == WIDE:
        assert named >= {c.winner, c.baseline, *c.pareto}


def test_better_is_higher_and_slower_is_further_right() -> None:
    c = make_comparison()
    plot = pareto_plot(c, Units.of(c), *WIDE)
    assert plot is not None
    points = plot.points
    assert [p.y for p in points] == sorted(p.y for p in points)
    by_latency = sorted(points, key=lambda p: p.result.latency_ms)
    assert [p.x for p in by_latency] == sorted(p.x for p in points)
    corners = re.findall(r"H([\d.]+)V([\d.]+)", plot.front)
    assert len(corners) == len(c.pareto) - 1


def test_one_point_is_no_plot() -> None:
    c = make_comparison(1)
    assert pareto_plot(c, Units.of(c), *WIDE) is None
    c = make_comparison(2)
    slow = tuple(dataclasses.replace(r, latency_ms=0.0) for r in c.results)
    assert pareto_plot(dataclasses.replace(c, results=slow), Units.of(c), *WIDE) is None


def test_methods_in_one_place_do_not_break_the_plot() -> None:
    c = make_comparison(8)
    same = tuple(dataclasses.replace(r, metric=0.9, interval=(0.9, 0.9), latency_ms=1.0) for r in c.results)
    plot = pareto_plot(dataclasses.replace(c, results=same), Units.of(c), *NARROW)
    assert plot is not None
    assert len({(p.x, p.y) for p in plot.points}) == 1


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_lie_on_the_axis(low: float, length: float) -> None:
    axis = Axis(low, low + length, 0, 500)
    if axis.high == axis.low:
        return
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1 <= axis.at(t) <= 501 for t in ticks)


@given(st.floats(1e-6, 1e4), st.floats(1.5, 1e6))
def test_logarithmic_ticks_lie_on_the_axis(low: float, times: float) -> None:
    axis = Axis(low, low * times, 0, 500, log=True)
    ticks = axis.ticks(4)
    assert len(ticks) <= 12
    assert all(-1 <= axis.at(t) <= 501 for t in ticks)
    if times >= 10:
        assert ticks


def test_curves_share_axes_and_mark_the_kept_epochs() -> None:
    c = make_comparison(4, seeds=2, epochs=300)
    drawn = curves(c)
    assert drawn is not None
    assert drawn.epochs == 300
    for p, r in zip(drawn.panels, c.results, strict=True):
        assert p.method == r.method
        assert len(p.paths) == len(p.kept) == 2
        assert all(d.count("L") < 120 for d in p.paths)
        assert p.best == max(max(s) for s in r.validation_curve)
        for x, y in p.kept:
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
        assert list(r.epochs) == [round(1 + (x - 6) / (WIDTH - 12) * 299) for x, _ in p.kept]


def test_one_epoch_draws_its_dot() -> None:
    drawn = curves(make_comparison(2, epochs=1))
    assert drawn is not None
    assert all(p.kept and not p.paths for p in drawn.panels)
