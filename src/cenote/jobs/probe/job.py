"""Compare poolings on one data set: train, test, decide."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

import cenote.core.files as files
from cenote.core import InputError
from cenote.core.memory import return_freed_blocks
from cenote.core.version import __version__
from cenote.features import facts
from cenote.features.dataset import SPLITS, Task, TokenDataset
from cenote.jobs.probe import statistics, training, verdict
from cenote.jobs.probe.arms import BASELINE, Column, Layers, chosen_methods, columns_of
from cenote.jobs.probe.cells import Cell, cell_key, load_cell, save_cell
from cenote.jobs.probe.looks import save_looks
from cenote.jobs.probe.metrics import FITTING, METRICS, SHARES, metric_name
from cenote.jobs.probe.module import build_probe
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.result import Comparison, MethodResult, PairTest
from cenote.jobs.probe.saved import save_best
from cenote.jobs.probe.trials import OnShare, Trial, processors, run_in_processes, run_in_turn, timed

MAX_PAIRWISE_TOKENS = 8192
HUGE_ITEM_BYTES = 2**24

PROCESSES_PAY_FROM = 2.0
"""Seconds of training, if every method were as cheap as the baseline, from which starting processes pays."""

LARGEST_COPY = 2**31
"""Bytes of features that are written to a temporary file for other processes."""

Engine = Callable[[Sequence[Trial], OnShare], Iterator[tuple[Trial, Cell]]]
"""Trains all trials somewhere, and gives their cells as they finish; see `cenote.scale.RaySweep`."""

OnMethod = Callable[[str, float], None]
"""Called with a method's name and the share of its work that is done; 1.0 also where a finished cell was found."""


def compare(
    data: TokenDataset,
    methods: str | Sequence[str] = "fast",
    *,
    seeds: int | Sequence[int] = 3,
    out: str | Path | None = None,
    metric: str | None = None,
    significance: statistics.Significance = "bootstrap",
    recipe: Recipe | None = None,
    layers: Layers = None,
    workers: int | None = None,
    engine: Engine | None = None,
    on_method: OnMethod = lambda _name, _share: None,
) -> Comparison:
    """Find out which pooling wins on labelled token features.

    Args:
        data: see `cenote.features.read`, `cenote.features.digits`.
        methods: `"fast"`, `"all"`, or names; `mean`, the baseline, is always among them.
        seeds: how many (0, 1, ...), or which.
        out: folder for the finished cells, `comparison.json`, attention samples and the best probe; given the same folder
            again, finished cells are not recomputed. `None`: nothing is written.
        metric: default by task, see `cenote.jobs.probe.metrics`.
        significance: where p-values come from: `"bootstrap"`, paired, of the metric itself; `"wilcoxon"`, signed ranks of what
            each test item (each group) adds to the metric, mean over the seeds: not for AUROC and mean average precision.
            Intervals are those of the bootstrap in both. Finished cells serve both.
        recipe: how probes are trained.
        layers: of data that hold several: at which of them token pools are tried, `"last"` (the default), `"all"`, a number,
            several, or a text such as `"-4:"`. Pools of layers are compared in the same table; they read all layers but the
            embeddings.
        workers: how many methods are trained at once, in processes of their own. `None`: one per thread of torch where
            steps are too small to gain by several threads and there is enough to do, else one. The results are the same.
        engine: trains the methods elsewhere, instead of `workers`: `cenote.scale.RaySweep`.
        on_method: progress.

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
    recipe = recipe or Recipe()
    columns, baseline, skipped = columns_of(data, methods, layers)
    seed_numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not seed_numbers:
        raise InputError(f"seeds: expected at least one, got {seeds}")
    name_of_metric = judged_by(data.task, metric, significance)
    for split in SPLITS:
        if not len(data.indices(split)):
            raise InputError(f"data: no item is in the {split} split; it needs train, val and test items")
    folder = None if out is None else _prepared(Path(out))

    if int(data.lengths().max()) * data.dim * 4 >= HUGE_ITEM_BYTES:
        return_freed_blocks()
    fingerprint_of = _remembered(data)
    cells: dict[str, Cell] = {}
    kept: dict[str, tuple[Path, str]] = {}
    missing: list[Trial] = []
    for column in columns:
        name = column.name
        try:
            _require_trainable(column)
        except InputError as error:
            if name == baseline:
                raise
            skipped[name] = str(error).removeprefix(f"{column.method.name}: ")
            on_method(name, 1.0)
            continue
        if folder is not None:
            settings = dict(column.method.settings or {})
            fingerprint = fingerprint_of(column.data)
            key = cell_key(fingerprint, name, settings, recipe, seed_numbers, name_of_metric, __version__)
            kept[name] = folder / "cells" / f"{name}.safetensors", key
        cell = load_cell(*kept[name]) if name in kept else None
        if cell is None:
            missing.append(Trial(column, name_of_metric, seed_numbers, recipe))
        else:
            cells[name] = cell
            on_method(name, 1.0)

    complete = True
    try:
        trained = engine(missing, on_method) if engine else _trained(missing, cells, baseline, workers, on_method)
        for trial, cell in trained:
            if trial.name in kept:
                save_cell(*kept[trial.name], cell)
            cells[trial.name] = cell
            on_method(trial.name, 1.0)
    except KeyboardInterrupt:
        if baseline not in cells:
            raise
        complete = False
    done = {column.name: column for column in columns if column.name in cells}
    for name, column in done.items():
        if "latency_ms" not in cells[name].record:
            cells[name] = timed(cells[name], column)
            if name in kept:
                save_cell(*kept[name], cells[name])

    provenance = _provenance(seed_numbers, recipe, fingerprint_of(data))
    comparison = _judged(data, done, baseline, cells, skipped, name_of_metric, significance, provenance, complete)
    if folder is not None:
        probes = {name: cells[name].probe(_builder(column), 0) for name, column in done.items()}
        views = {name: column.data for name, column in done.items()}
        comparison = save_looks(folder, comparison, data, probes, views)
        winner = done[comparison.winner]
        best_seed = int(np.argmax(comparison[comparison.winner].validation_per_seed))
        save_best(folder / "best", comparison, winner, cells[winner.name].probe(_builder(winner), best_seed))
        files.write_whole(folder / "comparison.json", comparison.to_json())
    return comparison


def judged_by(task: Task, metric: str | None = None, significance: str = "bootstrap") -> str:
    """The metric that methods are compared by.

    Raises:
        InputError: where it does not fit the task, or the source of p-values does not fit the metric.
    """
    name = metric_name(task, metric)
    if significance not in get_args(statistics.Significance):
        raise InputError(f"significance: expected bootstrap or wilcoxon, got {significance!r}")
    if significance == "wilcoxon" and name not in SHARES:
        fitting = [m for m in FITTING[task] if m in SHARES]
        raise InputError(
            f"significance: wilcoxon compares what each item adds to the metric, and {name} ranks items against each other; "
            f"use bootstrap{''.join(f', or metric {m!r}' for m in fitting)}"
        )
    return name


def _remembered(data: TokenDataset) -> Callable[[TokenDataset], str]:
    """Fingerprints; the data are read once for each view of them."""
    known: dict[tuple[int, ...], str] = {}

    def fingerprint(view: TokenDataset) -> str:
        key = (id(view),) if view is not data else ()
        if key not in known:
            known[key] = view.fingerprint()
        return known[key]

    return fingerprint


def _require_trainable(column: Column) -> None:
    name, data = column.method.name, column.data
    longest = int(data.lengths().max())
    if getattr(build_probe(name, data).pool, "pairwise", False) and longest > MAX_PAIRWISE_TOKENS:
        item = data.ids[int(data.lengths().argmax())]
        raise InputError(
            f"{name}: its tokens attend to each other, which at the {longest:,} tokens of item {item!r} would take too "
            f"long; the limit is {MAX_PAIRWISE_TOKENS:,}"
        )


def _builder(column: Column) -> Callable[[], Any]:
    return lambda: build_probe(column.method.name, column.data)


def _trained(
    trials: list[Trial], known: dict[str, Cell], baseline: str, workers: int | None, on_method: OnMethod
) -> Iterator[tuple[Trial, Cell]]:
    """Cells of all trials, the baseline's first: how long it takes says whether processes of their own pay."""
    first = [trial for trial in trials if trial.name == baseline]
    others = [trial for trial in trials if trial.name != baseline]
    for trial, cell in run_in_turn(first, on_method):
        known = {**known, trial.name: cell}
        yield trial, cell
    if workers is None:
        least = float(known[baseline].record["seconds"]) * len(others)
        pays = least >= PROCESSES_PAY_FROM and all(
            training.steps_are_small(t.column.data, t.recipe) and t.column.data.nbytes() <= LARGEST_COPY for t in others
        )
        workers = processors() if pays else 1
    workers = min(workers, len(others))
    if workers <= 1:
        yield from run_in_turn(others, on_method)
    else:
        yield from run_in_processes(others, workers, on_method)


def _judged(
    data: TokenDataset,
    columns: dict[str, Column],
    baseline: str,
    cells: dict[str, Cell],
    skipped: dict[str, str],
    metric: str,
    significance: statistics.Significance,
    provenance: dict[str, Any],
    complete: bool,
) -> Comparison:
    items = data.indices("test")
    y = data.y[items].numpy()
    groups = _group_numbers(data, items)
    names = list(columns)
    all_scores = [cells[n].scores.double().numpy() for n in names]
    ones = np.ones((1, len(items)))
    per_seed = [tuple(float(METRICS[metric](s, y, ones)[0]) for s in scores) for scores in all_scores]
    means = [float(np.mean(p)) for p in per_seed]
    by_rank = significance == "wilcoxon"
    resamples = statistics.RESAMPLES if by_rank else statistics.resamples_for(len(names))
    samples = statistics.resampled_metrics(METRICS[metric], all_scores, y, groups, resamples)
    shares = [
        np.bincount(groups, np.mean([SHARES[metric](s, y) for s in scores], 0)) for scores in all_scores if by_rank
    ]
    row = {n: i for i, n in enumerate(names)}

    def paired(pairs: list[tuple[str, str]]) -> tuple[PairTest, ...]:
        differences = [samples[row[a]] - samples[row[b]] for a, b in pairs]
        raw = (
            [statistics.signed_rank_p(shares[row[a]] - shares[row[b]]) for a, b in pairs]
            if by_rank
            else [statistics.two_sided_p(d) for d in differences]
        )
        adjusted = statistics.holm(raw)
        return tuple(
            PairTest(a, b, means[row[a]] - means[row[b]], statistics.interval(d), p, q)
            for (a, b), d, p, q in zip(pairs, differences, raw, adjusted, strict=True)
        )

    order = sorted(names, key=lambda n: -means[row[n]])
    results = tuple(
        MethodResult(
            method=n,
            summary=columns[n].method.summary,
            layers=columns[n].layers,
            metric=means[row[n]],
            interval=statistics.interval(samples[row[n]]),
            metric_per_seed=per_seed[row[n]],
            **_tuples(cells[n].record),
        )
        for n in order
    )
    winner = order[0]
    efficient = statistics.pareto([r.metric for r in results], [r.latency_ms for r in results])
    comparison = Comparison(
        dataset={**facts(data), "classes": list(data.classes)},
        metric_name=metric,
        results=results,
        skipped=skipped,
        baseline=baseline,
        winner=winner,
        against_baseline=paired([(n, baseline) for n in order if n != baseline]),
        against_winner=paired([(n, winner) for n in order if n != winner]),
        pairs=paired([(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]),
        pareto=tuple(order[i] for i in efficient),
        sentence="",
        provenance={**provenance, "bootstrap_resamples": resamples, "significance": significance},
        complete=complete,
    )
    return verdict.with_sentence(comparison)


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    def fixed(value: Any) -> Any:
        return tuple(fixed(v) for v in value) if isinstance(value, list | tuple) else value

    return {k: fixed(v) for k, v in record.items()}


def _group_numbers(data: TokenDataset, items: torch.Tensor) -> np.ndarray:
    if data.groups is None:
        return np.arange(len(items))
    return np.unique([data.groups[i] for i in items.tolist()], return_inverse=True)[1]


def _provenance(seeds: tuple[int, ...], recipe: Recipe, fingerprint: str) -> dict[str, Any]:
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["cenote", *sys.argv[1:]])
        if Path(sys.argv[0]).name == "cenote"
        else "cenote.jobs.probe.compare",
        "versions": {
            "cenote": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "seeds": list(seeds),
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "data_sha256": fingerprint,
    }


def _prepared(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out: {folder} is a file; name a folder")
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot write to {folder}: {error.strerror}; name another folder") from error
    return folder


__all__ = ["BASELINE", "Recipe", "chosen_methods", "compare"]
