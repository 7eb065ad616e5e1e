"""The page of `cenote reduce` of a collection: what fewer vectors per document cost in search."""

from __future__ import annotations

from dataclasses import dataclass

from cenote.compare import PairTest
from cenote.compare.statistics import SIGNIFICANT
from cenote.jobs.reduce.result import Frontier, IndexResult
from cenote.report import formats
from cenote.report.assets import environment, flat, shell
from cenote.report.formats import Units
from cenote.report.pareto import pareto_plot

WIDE, NARROW = (920, 430), (360, 400)


@dataclass(frozen=True)
class Row:
    """One index of the table."""

    result: IndexResult
    against: PairTest | None
    recommended: bool
    efficient: bool
    kept: float

    @property
    def sure(self) -> bool:
        """Whether it can be told from the index of all vectors."""
        return self.against is not None and self.against.p_adjusted <= SIGNIFICANT


def render_frontier(found: Frontier) -> str:
    """The page as text, with no reference to anything outside itself.

    Example:
        >>> from cenote.features.hashed_words import HashedWords
        >>> from cenote.features.manuals import manuals
        >>> from cenote.jobs.reduce import Asked, compare_corpus
        >>> found = compare_corpus(manuals(queries=8), HashedWords(8), Asked(["sequential"], factors=(8,), seeds=1))
        >>> render_frontier(found).splitlines()[0]
        '<!doctype html>'
    """
    units = Units.of(found)
    tests = {t.first: t for t in found.against_baseline}
    templates = environment(units)
    templates.filters.update(commas=formats.commas, size=formats.size)
    plots = [pareto_plot(found, units, *form, told=formats.size) for form in (WIDE, NARROW)]
    return templates.get_template("frontier.html.j2").render(
        c=found,
        units=units,
        rows=[
            Row(
                r,
                tests.get(r.method),
                r.method == found.recommended,
                r.method in found.pareto,
                found.kept(r.method)[0],
            )
            for r in found.results
        ],
        whole=found[found.baseline],
        plots=[plot for plot in plots if plot],
        cost_axis="bytes on disk (logarithmic)",
        cost_about="what the index takes on disk",
        cost_less="smaller",
        cost_told=formats.size,
        provenance=flat(found.provenance),
        **shell(),
    )
