"""Two finished comparisons side by side: paired where they tested the same items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cenote.compare import PairTest
from cenote.compare.folds import Resampled
from cenote.compare.inference import Inference, Measure
from cenote.compare.statistics import SIGNIFICANT, holm
from cenote.core import InputError
from cenote.jobs.probe.result import Comparison
from cenote.jobs.probe.tested import Tested, load


@dataclass(frozen=True)
class Beside:
    """Two comparisons, and the differences between their methods.

    Attributes:
        names: of the runs, for people.
        first, second: what they found.
        apart: why their methods are not paired; empty where they are.
        tests: of paired runs, each method of both, and the best of each run, if these are two methods: `first` is the method of
            the second run, Holm-corrected over all.
    """

    names: tuple[str, str]
    first: Comparison
    second: Comparison
    apart: str
    tests: tuple[PairTest, ...] = ()

    @property
    def sentence(self) -> str:
        """Which run is ahead, and whether that can be chance."""
        a, b = (f"{c.winner} of {name}" for name, c in zip(self.names, (self.first, self.second), strict=True))
        scores = [c.words.amount(c[c.winner].metric) for c in (self.first, self.second)]
        if self.first.metric_name != self.second.metric_name:
            return f"{a} and {b} are judged by {self.first.metric_name} and {self.second.metric_name}: no difference."
        told = f"{self.first.metric_name} of {b}: {scores[1]}, of {a}: {scores[0]}"
        test = next((t for t in self.tests if (t.first, t.second) == (self.second.winner, self.first.winner)), None)
        if test is None:
            return f"{told}; not paired, so that no test says whether the difference could be chance."
        by = self.first.words.difference(abs(test.difference), _absolute(test))
        if test.p_adjusted > SIGNIFICANT:
            return f"{told}; the difference of {by} is not significant (p {test.p_adjusted:.2g})."
        ahead, other = (b, a) if test.difference > 0 else (a, b)
        return f"{ahead} beats {other} by {by} (p {max(test.p_adjusted, 0.001):.2g}{' or less' * (test.p_adjusted < 0.001)})."

    def test_of(self, method: str) -> PairTest | None:
        """The difference of one method between the runs."""
        return next((t for t in self.tests if t.first == t.second == method), None)


def _absolute(test: PairTest) -> tuple[float, float]:
    return test.interval if test.difference >= 0 else (-test.interval[1], -test.interval[0])


def beside(first: str | Path, second: str | Path) -> Beside:
    """Lay two finished runs of `cenote probe` side by side.

    They are paired where they tested the same items, by id, with equal labels, in the same folds, by the same metric.

    Args:
        first, second: their folders.

    Raises:
        InputError: where a folder holds no comparison of probes.

    Example:
        `cenote.jobs.probe.beside("dino-out", "mae-out").sentence`
    """
    places = Path(first), Path(second)
    found = [_comparison(place) for place in places]
    names = [place.resolve().name for place in places]
    labels = (names[0], names[1]) if names[0] != names[1] else (str(first), str(second))
    apart = _apart(*found)
    if apart:
        return Beside(labels, found[0], found[1], apart)
    try:
        mine, its = (load(place, c) for place, c in zip(places, found, strict=True))
    except InputError as error:
        return Beside(labels, found[0], found[1], str(error))
    if apart := _other_items(mine, its):
        return Beside(labels, found[0], found[1], apart)
    where = its.places()
    its = its.ordered(np.array([where[key] for key in mine.places()]))
    return Beside(labels, found[0], found[1], "", tuple(_tests(found[0], found[1], mine, its)))


def _comparison(folder: Path) -> Comparison:
    try:
        return Comparison.load(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{folder}: holds no comparison of probes ({error}); name a folder that cenote probe --out wrote"
        ) from error


def _apart(first: Comparison, second: Comparison) -> str:
    """Why two comparisons cannot be paired, whatever they tested."""
    if first.metric_name != second.metric_name:
        return f"they are judged by {first.metric_name} and by {second.metric_name}"
    if first.dataset["task"] != second.dataset["task"] or first.dataset["classes"] != second.dataset["classes"]:
        return "their classes, labels or targets are others"
    return ""


def _other_items(first: Tested, second: Tested) -> str:
    """Why items cannot be paired one by one; empty where they can."""
    names = [set(t.units.names) for t in (first, second)]
    if names[0] != names[1]:
        both = len(names[0] & names[1])
        return f"they tested other items: {len(names[0]):,} and {len(names[1]):,}, of which {both:,} in both"
    places, there = first.places(), second.places()
    if (first.folds is None) != (second.folds is None) or places.keys() != there.keys():
        return "they tested the same items in other folds; give both the same --split-seed, --folds and --repeats"
    others = [
        name
        for (name, fold), i in places.items()
        if not np.array_equal(first.truth[i], second.truth[there[name, fold]])
    ]
    if others:
        return f"{len(others):,} of the items that both tested have other labels, {others[0]!r} first"
    return ""


def _tests(first: Comparison, second: Comparison, mine: Tested, its: Tested) -> Iterator[PairTest]:
    shared = [r.method for r in first.results if r.method in its.scores]
    pairs = [(method, method) for method in shared]
    if first.winner != second.winner:
        pairs.append((second.winner, first.winner))
    rows = [*its.scores.values(), *mine.scores.values()]
    of_second = {name: i for i, name in enumerate(its.scores)}
    of_first = {name: len(of_second) + i for i, name in enumerate(mine.scores)}
    inferred = _inferred(first, rows, mine)
    found = inferred.differences([(of_second[a], of_first[b]) for a, b in pairs])
    adjusted = holm([p for _, _, p in found])
    for (a, b), (difference, interval, p), after in zip(pairs, found, adjusted, strict=True):
        yield PairTest(a, b, difference, interval, p, float(after))


def _inferred(comparison: Comparison, rows: list[np.ndarray], tested: Tested) -> Inference | Resampled:
    measure = Measure.known(comparison.metric_name, tested.truth)
    if tested.folds is not None:
        return Resampled(measure, rows, tested.units, tested.folds)
    return Inference(measure, rows, tested.units)
