"""The page of a comparison that has nothing to do with probes."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import torch

from cenote.compare import Arm, Cell, Comparison, Measure, Units, judge, measure
from cenote.compare.arms import OnShare, unheard
from cenote.report.table import render_table


class Guess(Arm):
    def __init__(self, name: str, level: float, control: bool = False) -> None:
        self.name, self.level, self.control = name, level, control
        self.summary = f"<guesses> {level}"

    def key(self) -> Mapping[str, Any]:
        return {}

    def run(self, on_share: OnShare = unheard) -> Cell:
        noise = torch.randn(1, 40, generator=torch.Generator().manual_seed(len(self.name)))
        return Cell(self.name, {}, {"scores": self.level + 0.1 * noise})


def test_any_job_gets_a_page() -> None:
    arms = [Guess("mean", 0.5), Guess("better", 0.9), Guess("random", 0.0, control=True), Guess("broken", float("nan"))]
    units = Units(tuple(map(str, range(40))))
    c: Comparison[Any] = judge(Comparison, measure(arms, "mean"), units, Measure("nDCG"), baseline="mean")
    page = render_table(c, "40 <queries>")
    assert c.sentence in html.unescape(page)
    assert page.count("<tr>") == 1 + 3
    for written in (
        "nDCG",
        "40 &lt;queries&gt;",
        "&lt;guesses&gt; 0.9",
        ">control<",
        ">baseline<",
        "against mean",
    ):
        assert written in page, written
    assert "<b>broken</b>: gives NaN or infinity" in page
    assert f"<td>{c['better'].metric:.3f}</td>" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
