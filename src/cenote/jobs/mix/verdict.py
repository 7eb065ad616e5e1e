"""What a comparison of policies says, in words."""

from __future__ import annotations

import dataclasses

from cenote.compare.result import PairTest
from cenote.compare.smaller import THREE, detectable
from cenote.compare.statistics import SIGNIFICANT
from cenote.compare.words import listed
from cenote.jobs.mix.result import PolicyFrontier, PolicyResult

FEW = 100
"""Facts, of fewer than which the standard error is told."""
HIDDEN = 0.25
"""Perplexity that rises by less is no warning to anybody who looks at nothing else."""
LISTED = 4
FOR_EVER = "what it forgets is lost for ever"


def worded(found: PolicyFrontier) -> PolicyFrontier:
    """The comparison with its recommendation, what it can see, and its sentence."""
    found = dataclasses.replace(found, detectable=detectable(found))
    nothing = unfounded(found)
    if doubt := nothing or found.no_verdict:
        # of few facts what was seen is told all the same
        seen = [] if nothing else [*(of_kind(found, forgets, None) for forgets in (False, True)), of_band(found)]
        told = [f"No verdict: {doubt}.", *seen, of_perplexity(found), of_speed(found)]
        return dataclasses.replace(
            found, recommended=found.baseline, reason=doubt, no_verdict=doubt, sentence=" ".join(t for t in told if t)
        )
    # a policy that keeps all memory comes first: what it does not read now it may read later
    chosen = found.best(forgets=False) or found.best(forgets=True)
    found = dataclasses.replace(found, recommended=chosen or found.baseline, reason=reason(found, chosen))
    told = [
        lead(found, chosen),
        *(of_kind(found, forgets, chosen) for forgets in (False, True)),
        of_band(found),
        *of_window(found),
        of_hidden(found),
        of_speed(found),
        of_error(found),
    ]
    return dataclasses.replace(found, sentence=" ".join(t for t in told if t))


def unfounded(found: PolicyFrontier) -> str:
    """Why nothing can be said of facts that the model does not tell anyway; empty where it tells enough."""
    whole = found[found.baseline]
    if len(found.candidates) == 0:
        return "no policy was measured"
    if whole.metric > 2 * found.loss and found.told(whole) > 1:
        return ""
    return (
        f"with all keys the model tells {_facts(found, whole)}, so that no policy can be seen to lose any; try fewer facts in "
        f"a context (a larger length), or a model that can tell them"
    )


def reason(found: PolicyFrontier, chosen: str | None) -> str:
    """Why it is recommended."""
    allowed = found.words.amount(found.loss)
    if chosen is None:
        return f"of no policy can it be said that it loses at most {allowed} of the facts"
    kind = f"it forgets, and {FOR_EVER}" if found[chosen].forgets else "it keeps all memory"
    return (
        f"of those of which the data say that they lose at most {allowed} of the facts it reads the fewest keys; {kind}"
    )


def lead(found: PolicyFrontier, chosen: str | None) -> str:
    """What to take."""
    base = found[found.baseline]
    if chosen is not None:
        r = found[chosen]
        kept = f"; it forgets, and {FOR_EVER}" if r.forgets else "; all memory is kept"
        return (
            f"{chosen} is enough: it tells {_facts(found, r)} against {found.told(base)} with all "
            f"keys{_against(found, chosen)}, reading {_percent(r.share)} of the keys{kept}."
        )
    text = f"Read all keys: {reason(found, None)}"
    count = found.dataset["facts"]
    if THREE / count > found.loss:
        needed = -int(-THREE // found.loss) if found.loss else 0
        text += f"; {count} facts cannot show so little" + (f", {needed} could" if needed else "")
    return f"{text}."


def of_kind(found: PolicyFrontier, forgets: bool, chosen: str | None) -> str:
    """The best of the policies that keep all memory, or of those that forget, where it is not what is recommended."""
    fit = [r for r in found.candidates if r.forgets == forgets and r.role == "policy"]
    if not fit or (chosen is not None and found[chosen].forgets == forgets):
        return ""
    best = max(fit, key=lambda r: (r.metric, -r.log_loss))
    who = "Of those that forget for ever" if forgets else "Of those that keep all memory"
    return (
        f"{who}, {best.method} tells most: {_facts(found, best)}{_against(found, best.method)}, reading "
        f"{_percent(best.share)} of the keys."
    )


def of_band(found: PolicyFrontier) -> str:
    """Between what so many keys can tell at best, and at random."""
    told = []
    for budget in dict.fromkeys(r.budget for r in sorted(found.results, key=lambda r: r.budget or 0) if r.budget):
        roles = {r.role: found.told(r) for r in found.results if r.budget == budget}
        words = (("oracle", "the best choice"), ("window", "sink + window"), ("random", "random keys"))
        parts = [f"{name} {roles[role]}" for role, name in words if role in roles]
        if parts:
            told.append(f"at {budget:,} keys {', '.join(parts)}")
    whole = found.told(found[found.baseline])
    return f"Facts of {found.dataset['facts']}, all keys {whole}: {'; '.join(told)}." if told else ""


def of_window(found: PolicyFrontier) -> list[str]:
    """Policies that lose to sink + window of as many keys, and those that were not shown to be better."""
    lost, alike = [], []
    for r in sorted(found.results, key=lambda r: r.method):
        if r.role != "policy" or found.window_of(r) is None:
            continue
        standing = beside_window(found, r)
        if standing < 0:
            lost.append(r.method)
        elif not standing:
            alike.append(r.method)
    told = []
    if lost:
        told.append(f"{_several(lost)} {_verb(lost, 'loses', 'lose')} to sink + window of as many keys.")
    if alike:
        than = "it" if lost else "sink + window of as many keys"
        told.append(f"{_several(alike)} {_verb(alike, 'was', 'were')} not shown to be better than {than}.")
    return told


def beside_window(found: PolicyFrontier, result: PolicyResult) -> int:
    """1 for a policy that is better than sink + window at its budget, -1 for one that loses to it, 0 where neither was shown.

    Facts decide, after Holm's correction; where they do not, log-loss does, if its interval leaves out 0 and the facts do not
    point the other way.
    """
    window = found.window_of(result)
    test = None if window is None else _pair(found, result.method, window.method)
    if test is not None and test.p_adjusted <= SIGNIFICANT and test.difference:
        return 1 if test.difference > 0 else -1
    if len(result.over_window) != 3:
        return 0
    facts = 0.0 if test is None else test.difference
    _, low, high = result.over_window
    if low > 0 and facts <= 0:
        return -1
    return 1 if high < 0 and facts >= 0 else 0


def of_hidden(found: PolicyFrontier) -> str:
    """What loses most facts while perplexity hardly tells."""
    base, tests = found[found.baseline], {t.first: t for t in found.against_baseline}
    hidden = [
        r
        for r in found.results
        if r.method in tests
        and tests[r.method].p_adjusted <= SIGNIFICANT
        and tests[r.method].difference < 0
        and r.perplexity < (1 + HIDDEN) * base.perplexity
    ]
    if not hidden:
        return ""
    worst = min(hidden, key=lambda r: (r.metric, r.perplexity))
    return (
        f"Perplexity hides it: {worst.method} tells {_facts(found, worst)} at a perplexity of {worst.perplexity:.3g}, all keys "
        f"{base.perplexity:.3g}."
    )


def of_perplexity(found: PolicyFrontier) -> str:
    """Where facts cannot decide: what is clearly worse than all keys."""
    worse = [r.method for r in found.results if len(r.over_dense) == 3 and r.over_dense[1] > 0]
    if not worse:
        return ""
    return f"By log-loss {_several(worse)} {_verb(worse, 'is', 'are')} worse than all keys."


def of_speed(found: PolicyFrontier) -> str:
    """What is gained in time, beside the model as it is and beside what is exact."""
    base, length = found[found.baseline], found.dataset["length"]
    fast = [r for r in found.candidates if r.faster]
    # the dense arm runs as loaded: the exact path beside it
    exact = f"the exact path ({base.exact_ms:.3g} ms per token; as loaded {base.loaded_ms:.3g})"
    if not fast:
        return f"At {length:,} tokens nothing is faster than {exact}: no gain."
    best = max(fast, key=lambda r: r.over_exact)
    return (
        f"At {length:,} tokens {best.method} is {best.over_exact:.2f} times as fast as {exact}, and {best.over_loaded:.2f} "
        f"times as fast as the model as loaded."
    )


def of_error(found: PolicyFrontier) -> str:
    """What so few facts leave open."""
    count = found.dataset["facts"]
    if count >= FEW:
        return ""
    return f"These are {count} facts: the standard error of a share is up to {100 * found.standard_error:.0f} points."


def _facts(found: PolicyFrontier, result: PolicyResult) -> str:
    return f"{found.told(result)} of {found.dataset['facts']} facts"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _against(found: PolicyFrontier, name: str) -> str:
    test = next((t for t in found.against_baseline if t.first == name), None)
    return "" if test is None else f" ({found.words.difference(test.difference, test.interval)})"


def _pair(found: PolicyFrontier, first: str, second: str) -> PairTest | None:
    """Their test, seen from the first."""
    return next((t.seen_from(first) for t in found.pairs if {t.first, t.second} == {first, second}), None)


def _several(names: list[str]) -> str:
    return listed(names) if len(names) <= LISTED else f"{', '.join(names[:LISTED])} and {len(names) - LISTED} more"


def _verb(names: list[str], one: str, many: str) -> str:
    return one if len(names) == 1 else many
