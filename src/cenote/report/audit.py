"""The page of `cenote explain`: which explanation is faithful, against controls, with heat maps."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cenote.compare import PairTest
from cenote.compare.statistics import SIGNIFICANT
from cenote.jobs.explain.result import Audit, ExplanationResult
from cenote.report.assets import environment, flat, shell
from cenote.report.axes import Axis
from cenote.report.formats import Units
from cenote.report.looks import overlay
from cenote.report.matrix import matrix
from cenote.report.pareto import pareto_plot

WIDE, NARROW = (920, 430), (360, 400)
WIDTH, HEIGHT, EDGE = 200, 96, 6
SMALLEST_PICTURE = 128


@dataclass(frozen=True)
class Row:
    """One explanation of the leaderboard."""

    rank: int
    result: ExplanationResult
    against: PairTest | None
    winner: bool
    tied: bool
    efficient: bool

    def key(self, column: str) -> str:
        """What the browser sorts by; empty where there is nothing, which sorts last."""
        r = self.result
        known: dict[str, Any] = {
            "rank": self.rank,
            "metric": r.metric,
            "difference": self.against.difference if self.against else None,
            "p": self.against.p_adjusted if self.against else None,
        }
        value = known[column] if column in known else getattr(r, column)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        return f"{value:.9g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Heat:
    """A unit and its colour: share of full strength, in per cent, and whether it speaks for the class."""

    text: str
    strength: int
    speaks_for: bool


@dataclass(frozen=True)
class Look:
    """One explanation of one item: over its words, or over its image."""

    method: str
    words: tuple[Heat, ...]
    overlay: str | None


def render_audit(audit: Audit) -> str:
    """The page as text, with no reference to anything outside itself.

    Example:
        >>> from cenote.jobs.explain import audit, digits
        >>> found = audit(digits(items=8), methods=["attention-rollout"])
        >>> render_audit(found).splitlines()[0]
        '<!doctype html>'
    """
    units = Units.of(audit)
    tests = {t.first: t for t in audit.against_baseline}
    beside = {t.first: t for t in audit.against_winner}
    rows = [
        Row(
            rank,
            r,
            tests.get(r.method),
            r.method == audit.winner,
            r.method in beside and beside[r.method].p_adjusted > SIGNIFICANT,
            r.method in audit.pareto,
        )
        for rank, r in enumerate(audit.results, start=1)
    ]
    return (
        environment(units)
        .get_template("audit.html.j2")
        .render(
            c=audit,
            units=units,
            rows=rows,
            plots=[p for p in (pareto_plot(audit, units, *WIDE), pareto_plot(audit, units, *NARROW)) if p],
            matrix=matrix(audit),
            panels=_panels(audit),
            panel={"width": WIDTH, "height": HEIGHT},
            names=[r.method for r in audit.results],
            items=[(item, _looks(item, audit)) for item in audit.gallery.get("items", ())],
            pictures=[_large(item) for item in audit.gallery.get("items", ())],
            provenance=flat(audit.provenance),
            **shell(),
        )
    )


def _panels(audit: Audit) -> list[dict[str, str]]:
    """Per explanation the curve of deletion, and that of random scores, both on axes from 0 to 1."""
    across, up = Axis(0, 1, EDGE, WIDTH - EDGE), Axis(0, 1, HEIGHT - EDGE, EDGE)

    def path(values: list[float]) -> str:
        points = zip(audit.points, values, strict=True)
        return "M" + "L".join(f"{across.at(x):g} {up.at(min(max(y, 0), 1)):g}" for x, y in points)

    return [
        {
            "method": r.method,
            "deletion": path(audit.curves[r.method]["deletion"]),
            "insertion": path(audit.curves[r.method]["insertion"]),
            "random": path(audit.curves[audit.baseline]["deletion"]),
        }
        for r in audit.results
        if r.method in audit.curves and audit.baseline in audit.curves
    ]


def _looks(item: dict[str, Any], audit: Audit) -> list[Look]:
    grid = audit.gallery.get("grid")
    looks = []
    for r in audit.results:
        scores = item["scores"].get(r.method)
        if scores is None:
            continue
        drawn = None
        if grid is not None:
            for_it = np.asarray(scores, dtype=np.float32).clip(min=0)
            drawn = overlay(for_it / max(float(for_it.sum()), 1e-9), (grid[0], grid[1]))
        words = zip(item["words"], scores, strict=True)
        heat = () if grid is not None else tuple(Heat(w, round(100 * abs(s)), s >= 0) for w, s in words)
        looks.append(Look(r.method, heat, drawn))
    return looks


def _large(item: dict[str, Any]) -> str | None:
    """The item's picture as an address, pixels shown as such where it is small."""
    from PIL import Image

    if item["picture"] is None:
        return None
    image: Image.Image = Image.open(io.BytesIO(base64.b64decode(item["picture"])))
    if max(image.size) < SMALLEST_PICTURE:
        times = -(-SMALLEST_PICTURE // max(image.size))
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
