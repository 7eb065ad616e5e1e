"""The verdict in plain words."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from cenote.compare.result import Comparison, PairTest
from cenote.compare.statistics import SIGNIFICANT

C = TypeVar("C", bound="Comparison[Any]")

EQUALLY_CHEAP = 1.1
"""Times the least cost: measured times differ by so much from one run to the next, and then the better metric decides."""


def with_sentence(comparison: C) -> C:
    """The comparison with its recommendation and its sentence filled in."""
    comparison = dataclasses.replace(comparison, recommended=recommended(comparison))
    return dataclasses.replace(comparison, sentence=sentence(comparison), reason=reason(comparison))


def recommended(c: Comparison[Any]) -> str:
    """The cheapest arm that cannot be told from the winner; of arms without a cost, the baseline if it is one of them.

    Of arms that cost the same within `EQUALLY_CHEAP` it is the best. Controls and references are never recommended.
    """
    close = [c.winner, *_inseparable(c)]
    costs = [cost for name in close if (cost := c[name].cost) is not None]
    if len(costs) < len(close):
        return c.baseline if c.baseline in close else c.winner
    return next(name for name, cost in zip(close, costs, strict=True) if cost <= EQUALLY_CHEAP * min(costs))


def reason(c: Comparison[Any]) -> str:
    """Why the recommended arm is the one to use. It says of no arm that it is better."""
    if len(c.results) == 1 + len(c.references):
        return "nothing else was run"
    if c.recommended != c.winner:
        text = f"it cannot be told from {c.winner}, which comes first{_at_cost(c)}"
    elif not _inseparable(c) and not c.no_verdict:
        return "it comes first, and all others can be told from it"
    else:
        text = "it comes first"
        text += "" if c[c.winner].cost is None else ", and of what cannot be told from it nothing is clearly cheaper"
    return f"{text}; these data cannot tell more" if c.no_verdict else text


def sentence(c: Comparison[Any]) -> str:
    """Who wins against the baseline, by how much, at what cost, who cannot be told apart, and which control did not lose."""
    words = c.words
    if len(c.results) == 1 + len(c.references):
        return f"Only {c.baseline} was run: {words.amount(c[c.baseline].metric)} {c.metric_name}{_ahead(c)}."
    if c.no_verdict:
        lead = f"{c.winner} comes first ({words.amount(c[c.winner].metric)} {c.metric_name})"
        return f"No verdict: {lead}, but {c.no_verdict}{_controls(c)}.{_advice(c)}"
    close = [name for name in _inseparable(c) if name != c.baseline]
    if c.winner == c.baseline:
        others = [t for t in c.against_baseline if t.first not in c.references]
        beaten = [t for t in others if t.p_adjusted <= SIGNIFICANT and t.difference < 0]
        text = f"Nothing beats {c.baseline} ({words.amount(c[c.baseline].metric)} {c.metric_name})"
        text += f"; it is significantly better than {len(beaten)} of {len(others)} {words.arms}" if beaten else ""
        return f"{text}{_controls(c)}{_ahead(c)}.{_advice(c)}"
    test = next(t for t in c.against_baseline if t.first == c.winner)
    lead = words.difference(test.difference, test.interval)
    if test.p_adjusted <= SIGNIFICANT and test.difference > 0:
        text = f"{c.winner} beats {c.baseline} by {lead}{_at_odds(test)}"
        first, second = c[c.winner].cost, c[c.baseline].cost
        if first is not None and second is not None:
            text += f" and costs {first / max(second, 1e-9):.1f} times the {words.cost}"
    elif test.difference < 0:
        text = f"{c.winner} comes first of what is no control, and {c.baseline} is ahead of it: {lead}"
    else:
        text = (
            f"{c.winner} comes first, but its lead over {c.baseline} of {lead} is not significant "
            f"(p = {test.p_adjusted:.2g} after Holm's correction)"
        )
    if close:
        verb = "is" if len(close) == 1 else "are"
        text += f"; {_listed(close)} {verb} not distinguishable from it"
    return f"{text}{_controls(c)}{_ahead(c)}.{_advice(c)}"


def _at_odds(test: PairTest) -> str:
    """What to make of a difference that the test sees and the interval does not."""
    low, high = test.interval
    if not low <= 0 <= high:
        return ""
    return f" by its test alone (p = {test.p_adjusted:.2g}), while the interval holds 0: take it for a hint"


def _inseparable(c: Comparison[Any]) -> list[str]:
    """What cannot be told from the winner and might stand in its place."""
    aside = {*c.controls, *c.references}
    return [t.first for t in c.against_winner if t.p_adjusted > SIGNIFICANT and t.first not in aside]


def _advice(c: Comparison[Any]) -> str:
    """What to use, where that is not the arm that was named first."""
    if c.recommended in (c.winner, ""):
        return ""
    return f" Use {c.recommended}: it cannot be told from {c.winner}{_at_cost(c)}."


def _at_cost(c: Comparison[Any]) -> str:
    """What the recommended arm costs beside the winner."""
    first, second = c[c.recommended].cost, c[c.winner].cost
    if first is None or second is None:
        return ""
    return f", and takes {first / max(second, 1e-9):.2g} times the {c.words.cost}"


def _controls(c: Comparison[Any]) -> str:
    """Controls that did not lose to the winner; a control that is the baseline was spoken of."""
    tests = {t.first: t for t in c.against_winner}
    unbeaten = [
        n
        for n in c.controls
        if n in tests and n != c.baseline and (tests[n].p_adjusted > SIGNIFICANT or tests[n].difference > 0)
    ]
    if not unbeaten:
        return ""
    kind, verb = ("a control", "does") if len(unbeaten) == 1 else ("controls", "do")
    return f"; {_listed(unbeaten)}, {kind}, {verb} not lose to it: this table decides nothing"


def _ahead(c: Comparison[Any]) -> str:
    """References that are significantly above the winner."""
    ahead = [
        c.words.reference.format(t.first)
        for t in c.against_winner
        if t.first in c.references and t.p_adjusted <= SIGNIFICANT and t.difference > 0
    ]
    if not ahead:
        return ""
    return f"; {_listed(ahead)} {'is' if len(ahead) == 1 else 'are'} ahead of it: look at {c.words.remedy}"


def _listed(names: list[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
