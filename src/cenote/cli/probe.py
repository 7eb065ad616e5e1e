"""`cenote probe`: which pooling wins on your data."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli import interrupts, options
from cenote.cli.console import emit, say, talking
from cenote.cli.engines import extractor, known_engine, sweep
from cenote.cli.leaderboard import leaderboard
from cenote.cli.progress import arms_bar
from cenote.cli.tokens import extracting, listed, tell
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.compare import PairTest
    from cenote.jobs.probe import Comparison

P_FROM = {"wilcoxon": "of Wilcoxon's signed ranks, ", "corrected t": "of the corrected resampled t test, "}


def probe(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of bags with labels.csv, feature store, Arrow/Parquet file, .npz, graphs (DGCNN text, PyTorch "
            "Geometric dataset), or one of: digits, digit-bags; "
            "with --backbone, raw images, sounds or texts."
        ),
    ] = "digits",
    methods: options.Methods = "fast",
    seeds: options.Seeds = 3,
    out: options.Out = Path("cenote-out"),
    metric: options.Metric = None,
    significance: options.Significance = "permutation",
    seed_effects: options.SeedEffects = "fixed",
    folds: options.Folds = None,
    repeats: options.Repeats = 1,
    task: options.Task = None,
    labels: options.Labels = None,
    label: options.Label = None,
    vectors: options.Vectors = None,
    group: options.Group = None,
    id_column: options.Id = None,
    split: options.Split = None,
    split_seed: options.SplitSeed = 0,
    grid: options.Grid = None,
    prefix_tokens: options.PrefixTokens = 0,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Of features with several layers: where token pools are tried, last, all, or numbers such as 0,4-6 or -4:; "
            "pools of layers join the table."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most so many passes over the training items.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better validation.")
    ] = None,
    references: options.References = True,
    workers: options.Workers = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Model that turns raw data into tokens first, kept in OUT/features: a folder, or a name on the hub."
        ),
    ] = None,
    kind: options.Kind = None,
    column: options.Column = None,
    names: options.Names = None,
    limit: options.Limit = None,
    dtype: options.Dtype = "float16",
    batch: options.Batch = 32,
    max_item_size: options.MaxItemSize = options.DEFAULT_SIZE,
    skip_bad: options.SkipBad = False,
    device: options.Device = "cpu",
    precision: options.Precision = "float32",
    max_length: options.MaxLength = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    engine: options.Engine = "local",
    address: options.Address = "auto",
    as_json: options.Json = False,
) -> None:
    """Train probes with every pooling on labelled token features; say which wins, by how much, at what cost."""
    console = talking(as_json)
    import cenote.features as features
    from cenote.jobs.probe import Recipe, compare
    from cenote.jobs.probe.arms import chosen_methods, columns_of
    from cenote.jobs.probe.folds import planned
    from cenote.jobs.probe.references import reference_names

    chosen_methods(methods)
    known_engine(engine)
    recipe = Recipe()
    recipe = Recipe(epochs=epochs or recipe.epochs, patience=patience or recipe.patience)
    if backbone is None:
        with console.status(Text(f"reading {data}")):
            items = features.read(
                data,
                labels=labels,
                task=task,
                label_column=label,
                vector_column=vectors,
                id_column=id_column,
                group_column=group,
                split_column=split,
                prefix_tokens=prefix_tokens,
                grid=options.parsed_grid(grid),
                seed=split_seed,
                layers=None if layers is None else "all",
                max_item_size=options.parsed_size(max_item_size),
            )
    else:
        from cenote.jobs.extract import ModelSpec, Options
        from cenote.jobs.probe.raw import FEATURES, tokens_of_raw

        _require_raw(data, {"grid": grid, "prefix-tokens": prefix_tokens or None, "vectors": vectors})
        raw = listed(
            data, console, kind=kind, labels=labels, column=column, names=names, id_column=id_column, limit=limit,
            max_item_size=max_item_size,
        )  # fmt: skip
        with extracting(console, len(raw), out / FEATURES) as on_progress:
            items = tokens_of_raw(
                raw,
                ModelSpec(backbone, kind, revision, device, precision, max_length, trust_remote_code, allow_pickle),
                out / FEATURES,
                features.Labelling(task, label, group, split, seed=split_seed),
                name=Path(data).stem,
                options=Options(dtype=dtype, batch=batch, skip_bad=skip_bad),  # type: ignore[arg-type]
                layers=layers,
                metric=metric,
                significance=significance,
                folds=folds,
                repeats=repeats,
                extractor=extractor(engine, address),
                on_progress=on_progress,
                on_message=lambda text: say(console, text),
                on_extracted=lambda done: tell(done, console),
            )
    say(console, features.describe(items))
    plan = planned(items, folds, repeats, significance)
    if told := plan.told():
        say(console, f"  {told}")

    count = len(columns_of(items, methods, layers)[0]) + (len(reference_names(items.task)) if references else 0)
    start = time.perf_counter()
    with arms_bar(console, count) as on_method:
        comparison = compare(
            items,
            methods,
            seeds=seeds,
            out=out,
            metric=metric,
            significance=significance,  # type: ignore[arg-type]
            seed_effects=seed_effects,  # type: ignore[arg-type]
            folds=folds,
            repeats=repeats,
            recipe=recipe,
            layers=layers,
            references=references,
            workers=workers,
            engine=sweep(engine, address),
            on_method=on_method,
        )

    from cenote.report import write

    page = write(out)
    _tell(comparison, console)
    _tell_what_to_use(comparison, out, console)
    say(console, f"{time.perf_counter() - start:.0f} s; report: {page}")
    if as_json:
        emit({**dataclasses.asdict(comparison), "report": page})
    if not comparison.complete:
        interrupts.tell(
            f"kept {len(comparison.results)} of {count} methods in {out}; run the same command again to go on"
        )
        raise typer.Exit(interrupts.EXIT)


def _require_raw(data: str, told_by_model: dict[str, object]) -> None:
    """What is asked of a model is asked of raw data."""
    from cenote.features.reading import EMBEDDED

    if data in EMBEDDED and not Path(data).exists():
        raise InputError(
            f"data: with --backbone, name a folder or file of raw images, sounds or texts; {data} are tokens already"
        )
    for option, given in told_by_model.items():
        if given is not None:
            raise InputError(f"{option}: with --backbone, the model says how its tokens lie; leave it out")


def _tell(comparison: Comparison, console: Console) -> None:
    console.print(table_of(comparison, console.width))
    for name, why in comparison.skipped.items():
        say(console, f"skipped {name}: {why}")
    if comparison.localisation:
        found = sorted(comparison.localisation.items(), key=lambda pair: -pair[1])
        scores = ", ".join(f"{name} {score:.3f}" for name, score in found)
        say(console, f"weights find the labelled tokens (AUROC within items): {scores}")
    for caution in comparison.cautions:
        say(console, f"caution: {caution}", "yellow")
    console.print(Text(f"\n{comparison.sentence}", "bold red" if comparison.no_verdict else "bold"))


def _tell_what_to_use(comparison: Comparison, out: Path, console: Console) -> None:
    folder = out / "recommended"
    say(console, f"\nuse {comparison.recommended}: {comparison.reason}", "bold")
    say(console, f"  Python   cenote.load({str(folder)!r})")
    say(console, f"  predict  cenote predict {shlex.quote(str(folder))} DATA\n")


def table_of(comparison: Comparison, width: int) -> Table:
    """The results for a terminal of so many columns, best first."""
    source = P_FROM.get(comparison.provenance.get("significance", ""), "")
    aside = "; † only for reference, never the winner" if comparison.references else ""
    tests = {t.first: t for t in comparison.against_baseline}
    difference = f"vs {comparison.baseline}"
    columns = {
        "method": [_named(r.method, comparison) for r in comparison.results],
        comparison.metric_name: [f"{r.metric:.3f}" for r in comparison.results],
        "interval": [_interval(r.interval) for r in comparison.results],
        difference: [_difference(tests.get(r.method)) for r in comparison.results],
        "p adj.": [_adjusted(tests.get(r.method)) for r in comparison.results],
        "params": [_measured(r.parameters, ",") for r in comparison.results],
        "ms/item": [_measured(r.latency_ms, ".3f") for r in comparison.results],
        "multiply-adds": [_measured(r.multiply_adds, ",") for r in comparison.results],
        "train s": [f"{r.seconds:.1f}" for r in comparison.results],
    }
    return leaderboard(
        columns,
        width,
        title=f"{comparison.dataset['name']}: {comparison.metric_name} on {comparison.tested}",
        caption=f"intervals of 95 %; p {source}adjusted by Holm's method; * no other method is both better and faster{aside}",
        luxuries=("multiply-adds", "train s"),
        spared=("params", "ms/item", "interval", "p adj.", difference),
    )


def _named(method: str, comparison: Comparison) -> str:
    return f"{method}{' *' if method in comparison.pareto else ' †' if method in comparison.references else ''}"


def _measured(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(interval: tuple[float, float]) -> str:
    return "" if math.isnan(interval[0]) else f"{interval[0]:.3f}-{interval[1]:.3f}"


def _difference(test: PairTest | None) -> str:
    # adding 0 takes the sign from a zero
    return "" if test is None else f"{round(test.difference, 3) + 0.0:+.3f}"


def _adjusted(test: PairTest | None) -> str:
    return "" if test is None else "<0.001" if test.p_adjusted < 0.001 else f"{test.p_adjusted:.2g}"
