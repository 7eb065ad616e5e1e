"""What a comparison of indexes says, in words."""

from __future__ import annotations

import dataclasses

from cenote.compare.result import PairTest
from cenote.compare.smaller import detectable
from cenote.compare.statistics import SIGNIFICANT
from cenote.compare.words import listed
from cenote.jobs.reduce.arms import ONE_MEAN
from cenote.jobs.reduce.indexes import RAW, UNIT
from cenote.jobs.reduce.result import Frontier, IndexResult

SHARES = {2.0: "Half", 3.0: "A third", 4.0: "A quarter", 5.0: "A fifth", 6.0: "A sixth", 8.0: "An eighth"}
LISTED = 3


def worded(found: Frontier) -> Frontier:
    """The comparison with its recommendation, what it can see, and its sentence."""
    found = dataclasses.replace(found, detectable=detectable(found))
    if doubt := found.no_verdict or unfounded(found):
        text = f"No verdict: {doubt}."
        return dataclasses.replace(found, recommended=found.baseline, reason=doubt, sentence=text, no_verdict=doubt)
    chosen = found.smallest(found.loss) if found.most_bytes is None else found.best_within(found.most_bytes)
    if chosen == found.baseline:
        text = f"Keep all vectors: they take {size(found[chosen].bytes)}, and no smaller index is better."
        return dataclasses.replace(found, recommended=chosen, reason=text.partition(": ")[2].rstrip("."), sentence=text)
    found = dataclasses.replace(found, recommended=chosen or found.baseline, reason=reason(found, chosen))
    return dataclasses.replace(found, sentence=sentence(found, chosen))


def unfounded(found: Frontier) -> str:
    """Why nothing can be said of reductions of an index that finds nothing itself; empty where it finds enough."""
    whole = found[found.baseline]
    chance, low = found.dataset["chance"], whole.interval[0]
    what = f"the index of all vectors has {metric(whole, found)}"
    if low <= chance or whole.metric < 2 * chance:
        return f"{what}, where documents in random order have {chance:.3f}: do documents, queries and judgements fit together"
    if whole.metric <= 2 * found.loss and found.most_bytes is None:
        return f"{what}, and {found.loss:g} of it may be lost: ask for a smaller loss"
    return ""


def reason(found: Frontier, chosen: str | None) -> str:
    """Why it is recommended."""
    if chosen is None:
        if found.most_bytes is None:
            return f"of no smaller index can it be said that it loses at most {found.loss:g}"
        told = f"no index that may be recommended takes at most {size(found.most_bytes)}"
        fits = [r.method for r in found.results if r.control and r.bytes <= found.most_bytes]
        return f"{told}; of the controls {listed(fits)} would fit" if fits else told
    if found.most_bytes is not None:
        return f"the best of those that take at most {size(found.most_bytes)}"
    return f"the smallest of which the data say that it loses at most {found.loss:g}, and the best of its factor"


def sentence(found: Frontier, chosen: str | None) -> str:
    """What to take, what cannot be told from it, what the norm does, what the controls say, and what cannot be seen."""
    told = [lead(found, chosen)]
    if chosen is not None:
        told += [of_ties(found, chosen), of_norm(found, chosen), of_controls(found, chosen)]
    told += [of_one_mean(found), of_power(found)]
    return " ".join(t for t in told if t)


def lead(found: Frontier, chosen: str | None) -> str:
    """What to take."""
    base = found[found.baseline]
    if chosen is None:
        best = max(found.candidates, key=lambda r: r.metric, default=None)
        text = f"Keep all vectors: {found.reason}"
        if best is not None:
            text += (
                f". The best that is smaller, {best.method}, has {metric(best, found)}{_against(found, best.method)}"
            )
        return f"{text}."
    small = found[chosen]
    share = SHARES.get(small.factor, f"1/{small.factor:g}")
    text = (
        f"{share} of the vectors {'is enough' if found.most_bytes is None else 'fits'}: {chosen}, {metric(small, found)} "
        f"against {base.metric:.3f}{_against(found, chosen)}, {size(small.bytes)} instead of {size(base.bytes)}"
    )
    return f"{text}."


def of_ties(found: Frontier, chosen: str) -> str:
    """Other methods of the same factor that cannot be told from what is recommended."""
    own = found[chosen]
    others = {r.method for r in found.candidates if r.factor == own.factor and r.method != chosen}
    tied = [t for t in _pairs(found, chosen) if t.second in others and t.p_adjusted > SIGNIFICANT]
    # an interval without 0 and a corrected p-value that is not small say neither
    tied = [t for t in tied if t.interval[0] <= 0 <= t.interval[1]]
    tied.sort(key=lambda t: t.difference)
    if not tied:
        return ""
    named = [f"{t.second} ({difference(-t.difference, (-t.interval[1], -t.interval[0]))})" for t in tied[:LISTED]]
    more = f" and {len(tied) - LISTED} more" if len(tied) > LISTED else ""
    text = f"{listed(named)}{more} cannot be told from it"
    quick = min((found[t.second] for t in tied), key=lambda r: r.pool_ms or 0.0)
    if own.pool_ms and quick.pool_ms is not None and quick.pool_ms < own.pool_ms / 2:
        text += f"; {quick.method} takes {quick.pool_ms:.2g} ms of CPU time a document, {chosen} {own.pool_ms:.2g}"
    return f"{text}."


def of_norm(found: Frontier, chosen: str) -> str:
    """What scaling means to norm 1 does at this factor, of each reducer that was tried with both."""
    factor, told = found[chosen].factor, []
    at = [r for r in found.results if r.factor == factor and not r.control]
    for unit in (r for r in at if r.norm == UNIT):
        raw = next((r for r in at if r.norm == RAW and base(r.reducer) == base(unit.reducer)), None)
        test = None if raw is None else next((t for t in _pairs(found, raw.method) if t.second == unit.method), None)
        if test is not None:
            told.append(f"{base(unit.reducer)} {difference(test.difference, test.interval)}")
    return f"Means left as they are, against those of unit norm: {'; '.join(told)}." if told else ""


def of_controls(found: Frontier, chosen: str) -> str:
    """What keeping the first, or random, vectors loses; and a control that could stand in place of what is recommended."""
    factor, told, unbeaten = found[chosen].factor, [], []
    kinds = {"first-k": "the first of each document", "random-drop": "drawn at random"}
    for kind, words in kinds.items():
        control = next((r for r in found.results if r.reducer == kind and r.factor == factor), None)
        if control is None:
            continue
        told.append(f"{words}{_against(found, control.method)}")
        test = next((t for t in _pairs(found, chosen) if t.second == control.method), None)
        if test is not None and (test.p_adjusted > SIGNIFICANT or test.difference < 0):
            unbeaten.append(control.method)
    text = f"As many vectors without pooling: {', '.join(told)}." if told else ""
    if unbeaten:
        text += f" {chosen} cannot be told from {listed(unbeaten)}: how it chooses was not shown to matter here."
    return text.strip()


def of_one_mean(found: Frontier) -> str:
    """Whether late interaction is needed at all."""
    control = next((r for r in found.results if r.method == ONE_MEAN), None)
    test = next((t for t in found.against_baseline if t.first == ONE_MEAN), None)
    if control is None or test is None:
        return ""
    text = f"One mean vector per document (1/{control.factor:.0f} of the vectors){_against(found, ONE_MEAN)}"
    unseen = test.p_adjusted > SIGNIFICANT and test.interval[1] >= 0
    return f"{text}: no loss was shown, so ask whether you need a vector for each token." if unseen else f"{text}."


def of_power(found: Frontier) -> str:
    """What so many queries cannot show."""
    if found.detectable != found.detectable:
        return ""
    return (
        f"With {found.dataset['queries']:,} queries a difference under {found.detectable:.3f} is missed more often than one "
        f"time in five."
    )


def base(reducer: str) -> str:
    """What reducers of both norms share in their names.

    >>> base("sequential-raw"), base("hierarchical-rows-unit")
    ('sequential', 'hierarchical-rows')
    """
    return reducer.removesuffix("-raw").removesuffix("-unit")


def metric(result: IndexResult, found: Frontier) -> str:
    """With its name."""
    return f"{result.metric:.3f} {found.metric_name}"


def difference(value: float, interval: tuple[float, float]) -> str:
    """With its interval.

    >>> difference(-0.0021, (-0.013, 0.009))
    '-0.002 [-0.013, 0.009]'
    """
    # no -0.000
    value, low, high = (round(v, 3) + 0.0 for v in (value, *interval))
    return f"{value:+.3f}" if low != low else f"{value:+.3f} [{low:.3f}, {high:.3f}]"


def size(count: float) -> str:
    """Bytes in words.

    >>> size(51_200_000), size(1_500)
    ('51 MB', '1.5 kB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 10 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"


def _against(found: Frontier, name: str) -> str:
    test = next((t for t in found.against_baseline if t.first == name), None)
    return "" if test is None else f" ({difference(test.difference, test.interval)})"


def _pairs(found: Frontier, name: str) -> list[PairTest]:
    """All tests of an arm, seen from it."""
    return [t.seen_from(name) for t in found.pairs if name in (t.first, t.second)]
