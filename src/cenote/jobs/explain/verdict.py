"""What an audit says besides who wins: of attention, of the ways of taking away, of what was struck out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from cenote.compare.statistics import SIGNIFICANT
from cenote.jobs.explain.result import Audit

ATTENTION = "attention"
ASKING = ("perturbation", "gradients", "decomposition")
AGREES_FROM = 0.6
"""Kendall's tau of two orders, from which they say much the same."""


def worded(audit: Audit, settings: Sequence[str]) -> Audit:
    """The audit with its sentences filled in."""
    audit = dataclasses.replace(audit, attention=of_attention(audit), order=of_orders(audit, settings))
    if audit.winner in audit.controls:
        gone = (
            f"all of them said the same of random weights ({', '.join(audit.struck)})" if audit.struck else "none fits"
        )
        return dataclasses.replace(audit, sentence=f"No explanation is left: {gone}.", recommended="", reason="")
    told = [audit.sentence, of_controls(audit), audit.attention, of_masks(audit), of_struck(audit)]
    return dataclasses.replace(audit, sentence=" ".join(t for t in told if t))


def told_from_random(audit: Audit) -> set[str]:
    """The explanations that are significantly more faithful than random scores."""
    return {t.first for t in audit.against_baseline if t.p_adjusted <= SIGNIFICANT and t.difference > 0}


def of_attention(audit: Audit) -> str:
    """Whether attention shows what the model uses, where what asks the model itself does."""
    if audit.no_verdict:
        return ""
    faithful = told_from_random(audit)
    looks = [r.method for r in audit.results if r.family == ATTENTION and not r.struck]
    asks = [r.method for r in audit.results if r.family in ASKING and not r.struck and r.method in faithful]
    lost = [name for name in looks if name not in faithful]
    if not lost or not asks:
        return ""
    verb = "is" if len(lost) == 1 else "are"
    if len(lost) == len(looks):
        return (
            f"Attention does not show what this model uses: {_listed(lost)} {verb} no better than random scores, while "
            f"{_listed(asks)} can be told from them."
        )
    return f"Of the explanations from attention, {_listed(lost)} {verb} no better than random scores."


def of_controls(audit: Audit) -> str:
    """The explanations that are less faithful than a control other than random scores, each with the first such control."""
    if audit.no_verdict:
        return ""
    known = {r.method: r for r in audit.results}
    controls = [known[c] for c in audit.controls if c in known and c != audit.baseline]
    best = max(controls, key=lambda r: r.metric, default=None)
    if best is None:
        return ""
    lost = [r.method for r in audit.results if not r.control and not r.struck and r.metric < best.metric]
    if not lost:
        return ""
    verb = "is" if len(lost) == 1 else "are"
    return f"{_listed(lost)} {verb} less faithful than the control {best.method}."


def of_masks(audit: Audit) -> str:
    """Which explanation lies in the masks most."""
    told = [r for r in audit.results if r.mass_inside is not None]
    best = max((r for r in told if not r.control and not r.struck), key=lambda r: r.mass_inside or 0.0, default=None)
    chance = next((r for r in told if r.method == audit.baseline), None)
    if best is None or chance is None:
        return ""
    return (
        f"{best.method} lies in the masks most ({best.mass_inside:.2f} of it, of random scores {chance.mass_inside:.2f}); its "
        f"largest score does on {best.pointing:.0%} of the items."
    ).replace("%", " %")


def of_struck(audit: Audit) -> str:
    """What said the same of random weights."""
    if not audit.struck:
        return ""
    verb = "was" if len(audit.struck) == 1 else "were"
    return f"{_listed(audit.struck)} said the same when the weights were randomised, and {verb} struck out."


def of_orders(audit: Audit, settings: Sequence[str]) -> str:
    """Whether the order hangs on how and what is taken away."""
    names = [r.method for r in audit.results if not r.control and not r.struck]
    if len(names) < 2 or len(settings) < 2:
        return ""
    first, told = audit.orders[settings[0]], []
    best = max(names, key=first.__getitem__)
    for setting in settings[1:]:
        other = audit.orders[setting]
        tau, leads = kendall(first, other, names), max(names, key=other.__getitem__)
        ahead = "" if leads == best else f", and {leads} comes first"
        verdict = "agrees on" if tau >= AGREES_FROM else "disagrees with"
        told.append(f"{setting} {verdict} the order of {settings[0]} (tau {tau:.2f}){ahead}")
    return f"{'; '.join(told)}."


def kendall(a: Mapping[str, float], b: Mapping[str, float], names: Sequence[str]) -> float:
    """Kendall's tau of two orders.

    >>> kendall({"x": 1, "y": 2, "z": 3}, {"x": 1, "y": 3, "z": 2}, ["x", "y", "z"]) == 1 / 3
    True
    """
    first, second = (np.array([of[n] for n in names]) for of in (a, b))
    upper = np.triu_indices(len(names), 1)
    signs = [np.sign(v[:, None] - v)[upper] for v in (first, second)]
    return float((signs[0] * signs[1]).mean())


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
