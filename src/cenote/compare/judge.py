"""From finished cells to a comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from cenote.compare.engine import Measured
from cenote.compare.folds import Folds, Resampled
from cenote.compare.inference import Inference, Inferred, Measure, SeedEffects
from cenote.compare.pareto import pareto
from cenote.compare.result import Comparison, PairTest, as_tuple
from cenote.compare.statistics import Significance, holm
from cenote.compare.units import Units
from cenote.compare.verdict import with_sentence
from cenote.core.errors import InputError

C = TypeVar("C", bound=Comparison[Any])


def judge(
    kind: type[C],
    measured: Measured,
    units: Units,
    measure: Measure,
    *,
    baseline: str,
    significance: Significance = "permutation",
    seed_effects: SeedEffects = "fixed",
    folds: Folds | None = None,
    provenance: Mapping[str, Any] | None = None,
    **more: Any,
) -> C:
    """The table, its tests and its sentence.

    Args:
        kind: the job's class of comparison.
        measured: finished arms and their cells, the baseline's among them.
        units: what the arms were measured on.
        measure: what they are compared by.
        baseline: name of the arm that the others are compared with.
        significance: where p-values come from, see `Inference`.
        seed_effects: whether the verdict speaks of the trained seeds or of any, see `Inference`.
        folds: of units that were tested in several splits; then p-values are those of `cenote.compare.folds.Resampled`.
        provenance: see `cenote.compare.provenance`.
        more: the job's own fields of its comparison.

    Raises:
        InputError: where an arm has not one score for each unit, or a score or the metric of the baseline is no finite number.
            Another arm with such a score or metric is told under `skipped`.
    """
    arms, cells = measured.arms, measured.cells
    for arm in arms:
        shape = tuple(cells[arm.name].scores.shape)
        if len(shape) < 2 or shape[1] != len(units):
            raise InputError(f"{arm.name}: expected scores of [seeds, {len(units)} units, ...], got {list(shape)}")
    skipped = dict(measured.skipped)
    for arm in arms:
        if reason := _not_finite(cells[arm.name].scores, units):
            if arm.name == baseline:
                raise InputError(f"{arm.name}: {reason}, and the others are compared with it; look at that unit")
            skipped[arm.name] = reason
    arms = tuple(arm for arm in arms if arm.name not in skipped)

    def infer() -> Inferred:
        scores = [cells[arm.name].scores.double().cpu().numpy() for arm in arms]
        if folds is not None:
            return Resampled(measure, scores, units, folds, seed_effects)
        return Inference(measure, scores, units, significance, seed_effects)

    inferred = infer()
    undefined = [arm.name for arm, mean in zip(arms, inferred.means, strict=True) if not math.isfinite(mean)]
    if baseline in undefined:
        raise InputError(
            f"{measure.name}: is no number for {baseline}, with which the others are compared; do the {len(units)} units "
            f"differ in what is told of them, as numbers of 32 bits?"
        )
    if undefined:
        skipped |= dict.fromkeys(undefined, f"its {measure.name} is no number")
        arms = tuple(arm for arm in arms if arm.name not in undefined)
        inferred = infer()
    row = {arm.name: i for i, arm in enumerate(arms)}

    known = {f.name for f in dataclasses.fields(kind.result_type)}
    results = []
    for arm in sorted(arms, key=lambda a: -inferred.means[row[a.name]]):
        i = row[arm.name]
        reported = {k: as_tuple(v) for k, v in arm.reported(cells[arm.name]).items() if k in known}
        results.append(
            kind.result_type(
                **{
                    **reported,
                    "method": arm.name,
                    "summary": arm.summary,
                    "metric": inferred.means[i],
                    "interval": inferred.interval(i),
                    "metric_per_seed": inferred.per_seed[i],
                    "control": arm.control,
                    "reference": arm.reference,
                    **inferred.of_arm(i),
                }
            )
        )
    order = [r.method for r in results]
    ranked = [r for r in results if not r.reference]
    winner = next((r.method for r in ranked if not r.control), ranked[0].method)
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    found = inferred.differences([(row[a], row[b]) for a, b in pairs])
    tests = [PairTest(a, b, *f, f[2]) for (a, b), f in zip(pairs, found, strict=True)]
    references = {r.method for r in results if r.reference}
    against_baseline = _adjusted(
        [t.seen_from(n) for n in order for t in tests if {n, baseline} == {t.first, t.second} and n != baseline],
        references,
    )
    all_pairs = _lifted(_adjusted(tests, references), against_baseline, references)
    costs = [0.0 if r.cost is None else r.cost for r in ranked]
    return with_sentence(
        kind(
            metric_name=measure.name,
            results=tuple(results),
            skipped=skipped,
            baseline=baseline,
            winner=winner,
            against_baseline=against_baseline,
            against_winner=tuple(
                t.seen_from(n) for n in order for t in all_pairs if n != winner and {n, winner} == {t.first, t.second}
            ),
            pairs=all_pairs,
            pareto=tuple(ranked[i].method for i in pareto([r.metric for r in ranked], costs)),
            sentence="",
            no_verdict=inferred.too_few(len(ranked) - 1, units),
            provenance={**(provenance or {}), **inferred.provenance()},
            complete=measured.complete,
            **more,
        )
    )


def _adjusted(tests: list[PairTest], references: set[str]) -> tuple[PairTest, ...]:
    """After Holm's correction; tests of references are a family of their own."""
    of_references = [_with_reference(t, references) for t in tests]
    p = {
        kind: iter(holm([t.p_value for t, of in zip(tests, of_references, strict=True) if of is kind]))
        for kind in (False, True)
    }
    return tuple(dataclasses.replace(t, p_adjusted=next(p[of])) for t, of in zip(tests, of_references, strict=True))


def _lifted(
    pairs: tuple[PairTest, ...], against_baseline: tuple[PairTest, ...], references: set[str]
) -> tuple[PairTest, ...]:
    """All pairs, no p below the least of those with the baseline.

    The winner was chosen after the scores were seen: as one of all pairs, and only where the table holds any difference.
    """
    among_others = [t.p_adjusted for t in against_baseline if not _with_reference(t, references)]
    least = {False: min(among_others, default=1.0), True: min((t.p_adjusted for t in against_baseline), default=1.0)}
    return tuple(
        dataclasses.replace(t, p_adjusted=max(t.p_adjusted, least[_with_reference(t, references)])) for t in pairs
    )


def _with_reference(test: PairTest, references: set[str]) -> bool:
    return test.first in references or test.second in references


def _not_finite(scores: Tensor, units: Units) -> str | None:
    """Why these scores cannot be judged; `None` where they can."""
    bad = ~torch.isfinite(scores.movedim(1, 0).flatten(1)).all(1)
    if not bad.any():
        return None
    return (
        f"gives NaN or infinity on {int(bad.sum())} of {len(units)} units, {units.names[int(bad.nonzero()[0])]!r} first"
    )
