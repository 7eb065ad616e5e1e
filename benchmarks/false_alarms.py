"""How often a comparison calls chance a winner, how often its intervals hold the truth, how often it finds five points.

    python -m benchmarks.false_alarms [--runs N] [--json FILE] [--only TEXT] [--without TEXT]

Scores are drawn, not trained: each item is easier or harder for all methods alike, groups of items too, and a group may suit
one method and not another. Each run draws a test set and goes through `cenote.compare.judge`, as results of `cenote probe` do.

- alarms: share of runs in which a table of equally good methods calls any two of them different, after its own corrections;
- coverage: share of 95 % intervals that hold the true value, of a method's metric and of a difference;
- power: share of runs in which a gain of five points over the baseline is called one; beside it the paired percentile bootstrap
  over groups, which decided before, and its alarms: where those are too many, its power counts for nothing.

Folds share what they train on, which scores that are drawn cannot show. Their cases are trained: ridge regression, its penalty
chosen on validation, on features in which each method finds the same few hidden numbers by a random projection of its own, in
its own noise, so that all are equally good. Items, not splits alone, are drawn anew in each run; alarms and coverage are those
of other items as well: what is covered is the mean metric of such a method, over all runs.

Bounds: alarms at most 0.07 at level 0.05; coverage 0.93 or more, wider intervals are named; power not below the bootstrap's
where that holds its level, within two standard errors of the simulation.

An exact test at level 0.05 raises more than 0.07 alarms in 3 of 100 cases of 400 runs, by luck of the draw. So a case that
misses a bound is drawn again, five times as often from another seed, and that decides; the row keeps what the first draw
gave. This rule was added after a first look, at which R2 in 30 unequal groups gave 0.075 and AUROC of 2 methods 0.072.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy import ndarray

from cenote.compare import Arm, Cell, Comparison, Measure, Units, judge
from cenote.compare.arms import OnShare, unheard
from cenote.compare.engine import Measured
from cenote.compare.metrics import METRICS
from cenote.features import TokenDataset
from cenote.jobs.probe.folds import planned

RUNS = 400
GAIN = 0.05
ALARMS = 0.07
COVERAGE = (0.93, 0.97)
OWN, SHARED, SUITS, HARD = 1.0, 0.7, 0.4, 0.5
"""Standard deviations: a method's own noise on an item; an item's difficulty; how a group suits a method; its difficulty."""
TRUE = {"accuracy": 0.75, "AUROC": 0.8, "R2": 0.5}
RESAMPLES = 999
AGAIN, AGAIN_SEED = 5, 100


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        groups: `None`: each item is its own.
        equal: sizes of the groups; else the k-th is as likely as 1 / k.
        positives: of AUROC.
    """

    metric: str
    items: int
    groups: int | None = None
    equal: bool = True
    positives: int = 0
    methods: int = 4

    @property
    def name(self) -> str:
        of = "" if self.groups is None else f", {self.groups} {'equal' if self.equal else 'unequal'} groups"
        rare = f", {self.positives} positives" if self.positives else ""
        return f"{self.metric}, {self.items} items{rare}{of}, {self.methods} methods"


def cases() -> list[Case]:
    """What is tried; fixed before any result was seen. R2 of 20 items was added later, as its intervals had once
    been too narrow there."""
    alone = [*(Case(m, n) for m in ("accuracy", "R2") for n in (12, 30, 100, 300, 1000)), Case("R2", 20)]
    together = [Case("accuracy", 200, g, equal) for g in (3, 5, 6, 8, 10, 15, 30, 100) for equal in (True, False)]
    together += [Case("R2", 200, g, equal) for g in (5, 10, 30) for equal in (True, False)]
    rare = [Case("AUROC", n, positives=p) for n, p in ((100, 3), (100, 5), (200, 10), (200, 20), (200, 50), (1000, 50))]
    rare += [Case("AUROC", 200, g, equal, 50) for g in (6, 10, 30) for equal in (True, False)]
    many = [Case("accuracy", 200, methods=m) for m in (2, 8, 32)] + [
        Case("accuracy", 200, 15, methods=m) for m in (2, 32)
    ]
    many += [Case("AUROC", 200, positives=30, methods=m) for m in (2, 32)] + [Case("R2", 100, methods=32)]
    return [*alone, *together, *rare, *many]


FOLDS = 5
HIDDEN, FEATURES = 4, 16
PENALTIES = (0.3, 3.0, 30.0)
SHIFT = 0.9
"""Of the first hidden number of an item, up or down by its class; the others say nothing of it."""


@dataclass(frozen=True)
class Folded:
    """A case of folds.

    Attributes:
        repeats: rounds of `FOLDS` folds.
        groups: as in `Case`, all of one size.
    """

    metric: str
    items: int
    repeats: int = 1
    groups: int | None = None
    methods: int = 2

    @property
    def name(self) -> str:
        of = "" if self.groups is None else f", {self.groups} groups"
        return f"folds: {self.metric}, {self.items} items{of}, {self.repeats} x {FOLDS} folds, {self.methods} methods"


def folded_cases() -> list[Folded]:
    """What is tried of folds; fixed before any result was seen."""
    alone = [Folded(m, n, r) for m in ("accuracy", "AUROC", "R2") for n in (60, 150, 300) for r in (1, 3)]
    together = [Folded("accuracy", 150, r, g) for g in (5, 8, 15, 30) for r in (1, 3)]
    many = [Folded(m, 100, r, methods=8) for m in ("accuracy", "AUROC") for r in (1, 3)]
    return [*alone, *together, *many, Folded("accuracy", 100, methods=32), Folded("accuracy", 100, 3, methods=32)]


def powers() -> list[Case]:
    """Where five points can be found by someone."""
    found = [Case("accuracy", n, methods=2) for n in (300, 1000)]
    found += [Case("accuracy", 1000, g, equal, methods=2) for g in (10, 30, 100) for equal in (True, False)]
    return [*found, Case("AUROC", 1000, positives=100, methods=2), Case("AUROC", 1000, 100, positives=200, methods=2)]


def drawn(case: Case, rng: np.random.Generator, gain: float = 0.0) -> tuple[list[ndarray], ndarray, ndarray]:
    """`(scores of each method, truth, group of each item)`; the first method is better by `gain`."""
    n, metric = case.items, case.metric
    groups = np.arange(n)
    hard = suits = 0.0
    if case.groups is not None:
        likely = np.ones(case.groups) if case.equal else 1 / np.arange(1, case.groups + 1)
        groups = rng.choice(case.groups, n, p=likely / likely.sum())
        groups[: case.groups] = np.arange(case.groups)
        hard, suits = HARD, SUITS
    shared = SHARED * rng.normal(size=n) + hard * rng.normal(size=n)[groups]
    spread = math.sqrt(SHARED**2 + hard**2 + OWN**2 + suits**2)
    noise = [shared + OWN * rng.normal(size=n) + suits * rng.normal(size=n)[groups] for _ in range(case.methods)]
    true = [TRUE[metric] + (gain if m == 0 else 0.0) for m in range(case.methods)]
    if metric == "accuracy":
        levels = [spread * scipy.stats.norm.ppf(t) for t in true]
        return [(e + level)[:, None] for e, level in zip(noise, levels, strict=True)], np.ones(n, int), groups
    if metric == "AUROC":
        y = np.zeros(n, int)
        y[rng.permutation(n)[: case.positives]] = 1
        apart = [math.sqrt(2) * spread * scipy.stats.norm.ppf(t) for t in true]
        return [(e + d * y)[:, None] for e, d in zip(noise, apart, strict=True)], y, groups
    y = rng.normal(size=(n, 1))
    return [y + math.sqrt(1 - t) / spread * e[:, None] for e, t in zip(noise, true, strict=True)], y, groups


class Drawn(Arm):
    """An arm whose scores are there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def key(self) -> dict[str, Any]:
        return {}

    def run(self, on_share: OnShare = unheard) -> Cell:
        raise NotImplementedError


def judged(case: Case, scores: list[ndarray], truth: ndarray, groups: ndarray) -> Comparison[Any]:
    """What the library says of them; method 1 is the baseline."""
    names = [f"m{m}" for m in range(case.methods)]
    cells = {
        n: Cell(n, {"seconds": 0.0}, {"scores": torch.as_tensor(s)[None]}) for n, s in zip(names, scores, strict=True)
    }
    units = Units([str(i) for i in range(case.items)], None if case.groups is None else [str(g) for g in groups])
    measured = Measured(tuple(Drawn(n) for n in names), cells, {}, complete=True)
    return judge(Comparison, measured, units, Measure.known(case.metric, truth), baseline="m1")


def trained(case: Folded, rng: np.random.Generator, run: int) -> Comparison[Any]:
    """Equally good methods, trained and tested in folds of items that are drawn, and what the library says of them."""
    n, methods = case.items, case.methods
    groups = np.arange(n) if case.groups is None else rng.permutation(np.arange(n) % case.groups)
    y = rng.permutation(np.arange(n) < (0.3 if case.metric == "AUROC" else 0.5) * n).astype(int)
    hidden = rng.normal(size=(n, HIDDEN))
    if case.groups is not None:
        hidden += HARD * rng.normal(size=(n, HIDDEN))[groups]
    hidden[:, 0] += SHIFT * (2 * y - 1)
    target = 2.0 * y - 1 if case.metric != "R2" else hidden[:, 0] + 0.5 * rng.normal(size=n)
    projections = np.linalg.qr(rng.normal(size=(methods, FEATURES, HIDDEN)))[0]
    x = hidden @ projections.transpose(0, 2, 1) + OWN * rng.normal(size=(methods, n, FEATURES))
    if case.groups is not None:
        x += SUITS * rng.normal(size=(methods, n, FEATURES))[:, groups]
    data = TokenDataset(
        "drawn", torch.zeros(n, 1, 1),
        torch.as_tensor(target[:, None]).float() if case.metric == "R2" else torch.as_tensor(y),
        "regression" if case.metric == "R2" else "binary", ("target",) if case.metric == "R2" else ("no", "yes"),
        tuple(map(str, range(n))), torch.as_tensor([0, 0, 0, 1, 2] * n)[:n],
        None if case.groups is None else tuple(map(str, groups)), split_seed=run,
    )  # fmt: skip
    plan = planned(data, FOLDS, case.repeats)
    scores = np.concatenate([_ridge(x, target, split.numpy(), case.metric) for split in plan.splits], 1)
    units, by, folds = plan.judged_on(case.metric)
    names = [f"m{m}" for m in range(methods)]
    cells = {
        name: Cell(name, {"seconds": 0.0}, {"scores": torch.as_tensor(s)[None]})
        for name, s in zip(names, scores, strict=True)
    }
    return judge(Comparison, Measured(tuple(map(Drawn, names)), cells, {}), units, by, baseline="m1", folds=folds)


def _ridge(x: ndarray, target: ndarray, split: ndarray, metric: str) -> ndarray:
    """Scores `[methods, test items, 1]`; the penalty is chosen on validation."""
    train, val, test = (np.flatnonzero(split == s) for s in range(3))
    middle, level = x[:, train].mean(1, keepdims=True), target[train].mean()
    x = x - middle
    products = x[:, train].transpose(0, 2, 1) @ x[:, train]
    seen = (x[:, train].transpose(0, 2, 1) @ (target[train] - level))[..., None]
    truth = target[val][:, None] if metric == "R2" else (target[val] > 0).astype(int)
    measure, ones = METRICS[metric], np.ones((1, len(val)))
    best, kept = np.full(len(x), -np.inf), np.zeros((len(x), len(test), 1))
    for penalty in PENALTIES:
        said = x @ np.linalg.solve(products + penalty * np.eye(FEATURES), seen) + level
        now = np.array([measure(s[val], truth, ones)[0] for s in said])
        kept[now > best] = said[now > best][:, test]
        best = np.maximum(best, now)
    return kept


def level_of_folds(case: Folded, runs: int, seed: int = 3) -> dict[str, Any]:
    """Alarms and coverage among equally good methods."""
    rng = np.random.default_rng(seed)
    found = [trained(case, rng, run) for run in range(runs)]
    true = float(np.mean([r.metric for c in found for r in c.results]))
    intervals = [c[m].interval for c in found for m in ("m0", "m1")]
    pairs = [next(t for t in c.pairs if {t.first, t.second} == {"m0", "m1"}).interval for c in found]
    return {
        "case": case.name,
        "alarms": float(np.mean([alarmed(c) for c in found])),
        "coverage": float(np.mean([not (true < low or true > high) for low, high in intervals])),
        "coverage of differences": float(np.mean([not (low > 0 or high < 0) for low, high in pairs])),
        "no verdict": float(np.mean([bool(c.no_verdict) for c in found])),
        "metric": true,
    }


def alarmed(c: Comparison[Any]) -> bool:
    return not c.no_verdict and min(t.p_adjusted for t in (*c.against_baseline, *c.pairs)) <= 0.05


def bootstrapped(case: Case, scores: list[ndarray], truth: ndarray, groups: ndarray, rng: np.random.Generator) -> float:
    """The p-value of the first method against the second, whole groups drawn with replacement."""
    metric, count = Measure.known(case.metric, truth).metric, int(groups.max()) + 1
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)[:, groups].astype(float)
    d = metric(scores[0], truth, weights) - metric(scores[1], truth, weights)
    d = d[np.isfinite(d)]
    return min(1.0, 2 * (min(int((d <= 0).sum()), int((d >= 0).sum())) + 1) / (len(d) + 1))


def level_of(case: Case, runs: int, seed: int = 0) -> dict[str, Any]:
    """Alarms and coverage among equally good methods."""
    rng = np.random.default_rng(seed)
    alarms, held, held_apart, silent = 0, [], [], 0
    for _ in range(runs):
        c = judged(case, *drawn(case, rng))
        alarms += alarmed(c)
        silent += bool(c.no_verdict)
        for m in ("m0", "m1"):
            low, high = c[m].interval
            held.append(not (TRUE[case.metric] < low or TRUE[case.metric] > high))
        pair = next(t for t in c.pairs if {t.first, t.second} == {"m0", "m1"})
        held_apart.append(not (pair.interval[0] > 0 or pair.interval[1] < 0))
    return {
        "case": case.name,
        "alarms": alarms / runs,
        "coverage": float(np.mean(held)),
        "coverage of differences": float(np.mean(held_apart)),
        "no verdict": silent / runs,
    }


def power_of(case: Case, runs: int) -> dict[str, Any]:
    """How often a gain is found, and by the bootstrap; and how often that raises a false alarm."""
    rng, drawing = np.random.default_rng(1), np.random.default_rng(2)
    ours = theirs = alarms = 0
    for _ in range(runs):
        scores, truth, groups = drawn(case, rng, GAIN)
        (test,) = judged(case, scores, truth, groups).against_baseline
        ours += test.p_adjusted <= 0.05 and test.difference > 0
        theirs += bootstrapped(case, scores, truth, groups, drawing) <= 0.05
        alarms += bootstrapped(case, *drawn(case, rng), drawing) <= 0.05
    return {
        "case": case.name,
        "power": ours / runs,
        "power of the bootstrap": theirs / runs,
        "alarms of the bootstrap": alarms / runs,
    }


def verdict_of_level(row: dict[str, Any]) -> str:
    if row["alarms"] > ALARMS or min(row["coverage"], row["coverage of differences"]) < COVERAGE[0]:
        return "missed"
    return "wider" if max(row["coverage"], row["coverage of differences"]) > COVERAGE[1] else "held"


def verdict_of_power(row: dict[str, Any], runs: int) -> str:
    if row["alarms of the bootstrap"] > ALARMS:
        return "the bootstrap does not hold its level"
    noise = 2 * math.sqrt(2 * row["power of the bootstrap"] * (1 - row["power of the bootstrap"]) / runs)
    return "held" if row["power"] >= row["power of the bootstrap"] - noise else "missed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--without", default="-", help="and not this: folds")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    levels, found, start = [], [], time.perf_counter()
    for case in (*cases(), *folded_cases()):
        if arguments.only in case.name and arguments.without not in case.name:
            measured: Any = level_of if isinstance(case, Case) else level_of_folds
            row = measured(case, arguments.runs)
            row["verdict"] = verdict_of_level(row)
            if row["verdict"] == "missed":
                first = {k: row[k] for k in ("alarms", "coverage", "coverage of differences")}
                row = measured(case, AGAIN * arguments.runs, AGAIN_SEED)
                row |= {"verdict": verdict_of_level(row), "at first": first}
            levels.append(row)
            print(
                f"{row['case']:<58} alarms {row['alarms']:.3f}  coverage {row['coverage']:.3f}, of differences "
                f"{row['coverage of differences']:.3f}  no verdict {row['no verdict']:.2f}  {row['verdict']}",
                flush=True,
            )
    for case in powers():
        if arguments.only in case.name and arguments.without not in case.name:
            row = power_of(case, arguments.runs)
            row["verdict"] = verdict_of_power(row, arguments.runs)
            found.append(row)
            print(
                f"{row['case']:<58} power {row['power']:.3f}, of the bootstrap {row['power of the bootstrap']:.3f} "
                f"(alarms {row['alarms of the bootstrap']:.3f})  {row['verdict']}",
                flush=True,
            )
    seconds = round(time.perf_counter() - start)
    print(f"{arguments.runs} runs of each case, {seconds} s")
    if arguments.json:
        result = {"runs": arguments.runs, "seconds": seconds, "levels": levels, "powers": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return any(row["verdict"] == "missed" for row in (*levels, *found))


if __name__ == "__main__":
    raise SystemExit(main())
