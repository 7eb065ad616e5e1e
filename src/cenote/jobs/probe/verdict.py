"""The verdict in plain words."""

from __future__ import annotations

import dataclasses

from cenote.jobs.probe.result import Comparison, PairTest

SIGNIFICANT = 0.05


def with_sentence(comparison: Comparison) -> Comparison:
    """The comparison with its sentence filled in."""
    return dataclasses.replace(comparison, sentence=sentence(comparison))


def sentence(c: Comparison) -> str:
    """Who wins against the baseline, by how much, at what cost, and who cannot be told apart from the winner."""
    if len(c.results) == 1:
        return f"Only {c.baseline} was run: {_amount(c, c.results[0].metric)} {c.metric_name}."
    close = [t.first for t in c.against_winner if t.p_adjusted > SIGNIFICANT and t.first != c.baseline]
    if c.winner == c.baseline:
        beaten = [t for t in c.against_baseline if t.p_adjusted <= SIGNIFICANT]
        text = f"Nothing beats {c.baseline} ({_amount(c, c[c.baseline].metric)} {c.metric_name})"
        text += (
            f"; it is significantly better than {len(beaten)} of {len(c.against_baseline)} methods" if beaten else ""
        )
        return text + "."
    test = next(t for t in c.against_baseline if t.first == c.winner)
    ratio = c[c.winner].latency_ms / max(c[c.baseline].latency_ms, 1e-9)
    if test.p_adjusted <= SIGNIFICANT:
        text = f"{c.winner} beats {c.baseline} by {_difference(c, test)} and costs {ratio:.1f} times the time"
    else:
        text = (
            f"{c.winner} comes first, but its lead over {c.baseline} of {_difference(c, test)} is not significant "
            f"(p = {test.p_adjusted:.2g} after Holm's correction)"
        )
    if close:
        verb = "is" if len(close) == 1 else "are"
        text += f"; {_listed(close)} {verb} not distinguishable from it"
    return text + "."


def _difference(c: Comparison, test: PairTest) -> str:
    scale, unit = (1.0, "") if c.metric_name == "R2" else (100.0, " points")
    digits = 3 if c.metric_name == "R2" else 1
    low, high = (scale * v for v in test.interval)
    return f"{scale * test.difference:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def _amount(c: Comparison, value: float) -> str:
    return f"{value:.3f}" if c.metric_name == "R2" else f"{100 * value:.1f} %"


def _listed(names: list[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
