"""The page of `cenote mix`: what fewer keys cost a decoder in facts, and what they save."""

from __future__ import annotations

from dataclasses import dataclass

from cenote.compare import PairTest
from cenote.compare.statistics import SIGNIFICANT
from cenote.jobs.mix.measure import STRETCH
from cenote.jobs.mix.result import PolicyFrontier, PolicyResult
from cenote.jobs.mix.verdict import beside_window
from cenote.report import formats
from cenote.report.assets import environment, flat, shell
from cenote.report.formats import Units
from cenote.report.pareto import pareto_plot

WIDE, NARROW = (920, 430), (360, 400)
PLAIN = Units(percent=False, digits=3)
ROLES = {"window": "control", "random": "control", "oracle": "best choice"}
KINDS = (
    (
        "keep",
        "Policies that read fewer keys",
        "All memory is kept: what is not read for one token may be read for the next.",
    ),
    ("forget", "Policies that forget keys", "What is taken out of the cache is lost for ever; memory is saved."),
)


@dataclass(frozen=True)
class Row:
    """One arm of the table."""

    result: PolicyResult
    told: int
    against: PairTest | None
    recommended: bool
    efficient: bool
    loses: bool

    @property
    def sure(self) -> bool:
        """Whether it can be told from the model that reads all."""
        return self.against is not None and self.against.p_adjusted <= SIGNIFICANT

    @property
    def label(self) -> str:
        """What it is, where it is no policy to be recommended by name."""
        return ROLES.get(self.result.role, "")


def render_policies(found: PolicyFrontier) -> str:
    """The page as text, with no reference to anything outside itself."""
    units = Units.of(found)
    tests = {t.first: t for t in found.against_baseline}
    rows = [
        Row(
            r,
            found.told(r),
            tests.get(r.method),
            r.method == found.recommended,
            r.method in found.pareto,
            r.role == "policy" and beside_window(found, r) < 0,
        )
        for r in found.results
    ]
    base = next(row for row in rows if row.result.method == found.baseline)
    tables = [
        (
            key,
            title,
            about,
            [base, *(row for row in rows if row is not base and row.result.forgets == (key == "forget"))],
        )
        for key, title, about in KINDS
    ]
    templates = environment(units)
    templates.filters.update(commas=formats.commas, size=formats.size, loss=PLAIN.difference, losses=PLAIN.between)
    plots = [pareto_plot(found, units, *form, told=_keys) for form in (WIDE, NARROW)]
    return templates.get_template("policies.html.j2").render(
        c=found,
        units=units,
        base=base.result,
        stretch=STRETCH,
        tables=[table for table in tables if len(table[3]) > 1],
        plots=[plot for plot in plots if plot],
        depths=[row for row in rows if any(share == share for share in row.result.depths)],
        cost_axis="keys read by a key head for a token (logarithmic)",
        cost_about="how many keys one key head reads for one token, counted in the store",
        cost_less="reads fewer keys",
        cost_told=_keys,
        provenance=flat(found.provenance),
        **shell(),
    )


def _keys(count: float) -> str:
    return f"{formats.significant(count)} keys"
