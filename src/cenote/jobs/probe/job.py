"""Compare poolings on one data set: train, test, decide."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from cenote.compare.arms import OnShare, unheard
from cenote.compare.engine import CELLS, Engine, prepared
from cenote.compare.inference import SeedEffects
from cenote.compare.judge import judge
from cenote.compare.provenance import provenance
from cenote.compare.statistics import Significance
from cenote.core import InputError, files
from cenote.core.memory import return_freed_blocks
from cenote.core.requirements import require_one_of
from cenote.features import facts
from cenote.features.dataset import SPLITS, TokenDataset, require_data
from cenote.jobs.probe.arms import Layers, Trial, columns_of, remembered
from cenote.jobs.probe.cautions import Seen, cautions, tests_more
from cenote.jobs.probe.folds import planned
from cenote.jobs.probe.looks import save_looks
from cenote.jobs.probe.measure import judged_by
from cenote.jobs.probe.own import Choice
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.references import references_of
from cenote.jobs.probe.result import Comparison
from cenote.jobs.probe.saved import BEST, RECOMMENDED, by_hand, save_probe, save_same
from cenote.jobs.probe.tested import save as save_tested

HUGE_ITEM_BYTES = 2**24


def compare(
    data: TokenDataset,
    methods: str | Sequence[Choice] = "fast",
    *,
    seeds: int | Sequence[int] = 3,
    out: str | Path | None = None,
    metric: str | None = None,
    significance: Significance = "permutation",
    seed_effects: SeedEffects = "fixed",
    folds: int | None = None,
    repeats: int = 1,
    recipe: Recipe | None = None,
    layers: Layers = None,
    references: bool = True,
    workers: int | None = None,
    engine: Engine | None = None,
    on_method: OnShare = unheard,
) -> Comparison:
    """Find out which pooling wins on labelled token features.

    Args:
        data: see `cenote.features.read`, `cenote.features.digits`.
        methods: `"fast"`, `"all"`, or names; `mean`, the baseline, is always among them. A pool of your own by its class, or by
            its dotted path (`"mypackage.pools.MyPool"`); or as it is (`MyPool(384)`: every seed begins at its weights), with a
            name (`("mine", MyPool(384, heads=4))`), or built by a function of the width of a token
            (`("mine", lambda dim: MyPool(dim))`). It is tried against what every pool keeps first, see
            `cenote.testing.check_pool`, and is left out with the reason where it breaks that.
        seeds: how many (0, 1, ...), or which.
        out: folder for the finished cells, `comparison.json`, which items were tested, attention samples, and the probes of the
            winner and of the recommended method; given the same folder again, finished cells are not recomputed. `None`:
            nothing is written.
        metric: default by task, see `cenote.jobs.probe.measure`.
        significance: where p-values come from: `"permutation"`, how often a difference would be as large if two methods were
            exchanged in random test items (whole groups); `"wilcoxon"`, signed ranks of what each test item (each group) adds
            to the metric, mean over the seeds: not for AUROC and mean average precision. Finished cells serve both.
        seed_effects: `"fixed"`: the verdict speaks of these trained probes, on other test items. `"random"`: of the methods,
            trained with other seeds as well.
        folds: how many splits of the items, each testing another part; methods are then told apart by the corrected resampled
            t test, see `cenote.compare.folds`, and looked at and saved as the first fold trained them. 1: the split of the data
            decides alone. Default: 1, but 5 where that split was made and tests fewer than 200 items.
        repeats: so many rounds of folds, each with another assignment.
        recipe: how probes are trained.
        layers: of data that hold several: at which of them token pools are tried, `"last"` (the default), `"all"`, a number,
            several, or a text such as `"-4:"`. Pools of layers are compared in the same table; they read all layers but the
            embeddings.
        references: whether k-NN and scikit-learn's logistic (ridge) regression on the baseline's vectors stand in the table
            too; they never win, see `cenote.jobs.probe.references`.
        workers: how many methods are trained at once, in processes of their own. `None`: one per thread of torch where
            steps are too small to gain by several threads and there is enough to do, else one. The results are the same.
        engine: trains the methods elsewhere, instead of `workers`: `cenote.scale.RaySweep`.
        on_method: progress: called with a method's name and the share of its work that is done.

    Returns:
        The `Comparison`. After Ctrl-C, if any method had finished, that of the finished methods, with `complete=False`.

    Raises:
        InputError: for anything that cannot be used, before training starts.

    Example:
        >>> from cenote.features import digits
        >>> result = cenote.jobs.probe.compare(digits(), ["mean", "max"], seeds=1)
        >>> result.baseline
        'mean'
    """
    require_data(data)
    recipe = recipe or Recipe()
    columns, baseline, skipped = columns_of(data, methods, layers)
    seed_numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not seed_numbers:
        raise InputError(f"seeds: expected at least one, got {seeds}")
    name_of_metric = judged_by(data.task, metric, significance)
    require_one_of(get_args(SeedEffects), seed_effects=seed_effects)
    if seed_effects == "random" and len(seed_numbers) < 2:
        raise InputError("seed_effects: random needs at least 2 seeds, for their variance")
    for split in SPLITS:
        if not len(data.indices(split)):
            raise InputError(f"data: no item is in the {split} split; it needs train, val and test items")
    plan = planned(data, folds, repeats, significance)
    with prepared(None if out is None else Path(out)) as folder:
        if int(data.lengths().max()) * data.dim * 4 >= HUGE_ITEM_BYTES:
            return_freed_blocks()
        fingerprint = remembered()
        of_folds = [
            {
                c.name: Trial(
                    plan.seen(c, fold), name_of_metric, seed_numbers, recipe, plan.fingerprinted(fingerprint, c, fold)
                )
                for c in columns
            }
            for fold in range(len(plan))
        ]
        trials, cells_folder = of_folds[0], None if folder is None else folder / CELLS
        arms = [[*of_fold.values(), *(references_of(of_fold[baseline]) if references else ())] for of_fold in of_folds]
        measured = plan.measured(
            arms, baseline, folder=cells_folder, workers=workers, engine=engine, on_share=on_method
        )
        measured = dataclasses.replace(measured, skipped={**skipped, **measured.skipped})
        units, by, in_folds = plan.judged_on(name_of_metric)
        comparison = judge(
            Comparison,
            measured,
            units,
            by,
            baseline=baseline,
            significance=significance,
            seed_effects=seed_effects,
            folds=in_folds,
            provenance=provenance(
                "cenote.jobs.probe.compare",
                seeds=list(seed_numbers),
                recipe=json.loads(json.dumps(dataclasses.asdict(recipe))),
                data_sha256=fingerprint(data),
                **plan.provenance(),
            ),
            dataset={**facts(plan.view(data, 0)), "classes": list(data.classes)},
        )
        tested, seen = plan.tested(), None
        if folder is not None:
            seen = Seen.kept(data, fingerprint(data), folder / "seen.safetensors", tests_more(data, tested))
        told = cautions(data, comparison, recipe, tested, seen)
        comparison = dataclasses.replace(comparison, cautions=told)
        if folder is not None:
            save_tested(folder, units, by, in_folds)
            for place in (BEST, RECOMMENDED):
                files.remove_unfinished(folder / place)
            judged = {r.method for r in comparison.results}
            done = {name: trial for name, trial in trials.items() if name in judged}
            probes = {name: trial.probe(measured.cells[name], 0) for name, trial in done.items()}
            views = {name: trial.column.data for name, trial in done.items()}
            comparison = save_looks(folder, comparison, plan.view(data, 0), probes, views)
            for place, name in ((BEST, comparison.winner), (RECOMMENDED, comparison.recommended)):
                if place == RECOMMENDED and name == comparison.winner:
                    save_same(folder / place, BEST)
                    continue
                best_seed = int(np.argmax(comparison[name].validation_per_seed))
                probe = done[name].probe(measured.cells[name], best_seed)
                if (why := save_probe(folder / place, comparison, done[name].column, probe)) is not None:
                    alone = f"the probe of {name} is kept by its weights alone: {why}; {by_hand(folder / place)}"
                    comparison = dataclasses.replace(comparison, cautions=(*comparison.cautions, alone))
            comparison.save(folder)
    return comparison
