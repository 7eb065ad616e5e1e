"""`cenote probe`: which pooling wins on your data."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import cenote.cli.extract as raw
from cenote.cli.console import say
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.compare import Engine, PairTest
    from cenote.features.raw import RawItems
    from cenote.jobs.probe import Comparison
    from cenote.models import Layout


WIDE = 100
"""Columns of a terminal that has room for the whole table."""


def probe(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of bags with labels.csv, feature store, Arrow/Parquet file, .npz, graphs (DGCNN text, PyTorch "
            "Geometric dataset), or one of: digits, digit-bags; "
            "with --backbone, raw images, sounds or texts."
        ),
    ] = "digits",
    methods: Annotated[str, typer.Option(help="fast, all, or names separated by commas (see cenote list).")] = "fast",
    seeds: Annotated[int, typer.Option(min=1, help="How many initialisations of each probe.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for results; the same folder again resumes.")] = Path("cenote-out"),
    metric: Annotated[
        str | None, typer.Option(help="Default by task: AUROC, accuracy, mean average precision, R2.")
    ] = None,
    significance: Annotated[
        str, typer.Option(help="Where p-values come from: bootstrap, or wilcoxon (signed ranks of the test items).")
    ] = "bootstrap",
    task: Annotated[
        str | None, typer.Option(help="binary, multiclass, multilabel or regression; default: found from the labels.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV with the labels, if not labels.csv in the folder.")] = None,
    label: Annotated[str | None, typer.Option(help="Name of the label column.")] = None,
    vectors: Annotated[str | None, typer.Option(help="Name of the column with lists of vectors.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Column with patient, speaker, ...: its items stay on one side of a split.")
    ] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="Column with the items' names.")] = None,
    split: Annotated[str | None, typer.Option(help="Column with train, val or test.")] = None,
    split_seed: Annotated[int, typer.Option(help="Seed of the split, where none is given.")] = 0,
    grid: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the patch tokens, for pictures: 14x14.")] = None,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Leading tokens that are [CLS] or registers.")] = 0,
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
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="How many methods are trained at once; default: one per core where that is faster."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Model that turns raw data into tokens first, kept in OUT/features: a folder, or a name on the hub."
        ),
    ] = None,
    kind: raw.Kind = None,
    column: raw.Column = None,
    names: raw.Names = None,
    limit: raw.Limit = None,
    dtype: raw.Dtype = "float16",
    batch: raw.Batch = 32,
    skip_bad: raw.SkipBad = False,
    device: raw.Device = "cpu",
    precision: raw.Precision = "float32",
    max_length: raw.MaxLength = None,
    revision: raw.Revision = None,
    trust_remote_code: raw.Trust = False,
    allow_pickle: raw.Pickle = False,
    engine: raw.EngineName = "local",
    address: raw.Address = "auto",
) -> None:
    """Train probes with every pooling on labelled token features; say which wins, by how much, at what cost."""
    console = Console()
    import cenote.features as features
    from cenote.jobs.probe import Recipe, compare
    from cenote.jobs.probe.arms import chosen_methods, columns_of

    chosen_methods(methods)
    raw.known_engine(engine)
    recipe = Recipe()
    recipe = Recipe(epochs=epochs or recipe.epochs, patience=patience or recipe.patience)
    title = None
    if backbone is not None:
        from cenote.features.reading import EMBEDDED, require_labels
        from cenote.jobs.extract import ModelSpec, Options
        from cenote.jobs.probe.measure import judged_by
        from cenote.models.base import layer_numbers

        spec = ModelSpec(backbone, kind, revision, device, precision, max_length, trust_remote_code, allow_pickle)
        options = Options(None if layers is None else "all", dtype, None, batch, None, skip_bad)  # type: ignore[arg-type]
        if data in EMBEDDED and not Path(data).exists():
            raise InputError(
                f"data: with --backbone, name a folder or file of raw images, sounds or texts; {data} are tokens already"
            )
        for option, given in (("grid", grid), ("prefix-tokens", prefix_tokens or None), ("vectors", vectors)):
            if given is not None:
                raise InputError(f"{option}: with --backbone, the model says how its tokens lie; leave it out")
        title = Path(data).stem

        def check(items: RawItems) -> None:
            found = require_labels(
                items, task=task, label_column=label, group_column=group, split_column=split, seed=split_seed
            )
            judged_by(found, metric, significance)

        def on_model(layout: Layout) -> None:
            layer_numbers(layers, range(layout.blocks + 1))

        data = raw.from_raw(
            data, spec, out / "features", options, console, labels, id_column, column, names, limit, engine, address, check,
            on_model,
        )  # fmt: skip
        labels = id_column = None
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
            grid=parsed_grid(grid),
            seed=split_seed,
            layers=None if layers is None else "all",
        )
    if title is not None:
        items = replace(items, name=title)
    say(console, features.describe(items))

    count = len(columns_of(items, methods, layers)[0])
    start = time.perf_counter()
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=count, told="")
        pace = Pace(count)

        def on_method(name: str, share: float) -> None:
            pace.update(name, share, time.perf_counter())
            progress.update(bar, description=pace.names() or name, completed=pace.work, told=pace.told())

        comparison = compare(
            items,
            methods,
            seeds=seeds,
            out=out,
            metric=metric,
            significance=significance,  # type: ignore[arg-type]
            recipe=recipe,
            layers=layers,
            workers=workers,
            engine=sweep(engine, address),
            on_method=on_method,
        )

    from cenote.report import write

    page = write(out)
    console.print(leaderboard(comparison, console.width))
    for name, why in comparison.skipped.items():
        say(console, f"skipped {name}: {why}")
    if comparison.localisation:
        found = sorted(comparison.localisation.items(), key=lambda pair: -pair[1])
        scores = ", ".join(f"{name} {score:.3f}" for name, score in found)
        say(console, f"weights find the labelled tokens (AUROC within items): {scores}")
    console.print(Text(f"\n{comparison.sentence}", "bold"))
    say(console, f"{time.perf_counter() - start:.0f} s; report: {page}")
    if not comparison.complete:
        sys.stderr.write(
            f"interrupted: kept {len(comparison.results)} of {count} methods in {out}; "
            f"run the same command again to go on\n"
        )
        raise typer.Exit(130)


class Pace:
    """How far `count` methods are, several of them at once, and how long the others will take.

    >>> pace = Pace(10)
    >>> for now, name, share in ((0, "found", 1), (0, "max", 0), (30, "max", 0.5), (60, "max", 1), (60, "gem", 0.5)):
    ...     pace.update(name, share, now)
    >>> pace.told()
    '2 of 10, 1.5/min, 5:00 min left'
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.done: set[str] = set()
        self.running: dict[str, float] = {}
        self.began: tuple[float, float] | None = None
        self.rate = 0.0

    @property
    def work(self) -> float:
        """Methods that are done, and the shares of those in hand."""
        return len(self.done) + sum(self.running.values())

    def update(self, name: str, share: float, now: float) -> None:
        """That so much of a method was done at a time, in seconds."""
        if share < 1 and self.began is None:
            # what an earlier run had finished took no time, and says nothing of the others
            self.began = now, self.work
        self.running.pop(name, None)
        if share >= 1:
            self.done.add(name)
        else:
            self.running[name] = share
        if self.began is not None and now > self.began[0]:
            self.rate = (self.work - self.began[1]) / (now - self.began[0])

    def names(self) -> str:
        """Of those in hand, the last told of first, cut where they are many."""
        first, *others = [*reversed(self.running)] or [""]
        return f"{first} and {len(others)} more" if len(others) > 1 else ", ".join([first, *others])

    def told(self) -> str:
        """For a line in a terminal."""
        if self.rate <= 0:
            return f"{len(self.done)} of {self.count}"
        left = raw.clock((self.count - self.work) / self.rate)
        return f"{len(self.done)} of {self.count}, {60 * self.rate:.1f}/min, {left} left"


def sweep(name: str, address: str) -> Engine | None:
    """Where probes are trained; `None`: here."""
    if raw.known_engine(name) == "local":
        return None
    from cenote.scale import RaySweep

    return RaySweep(address)


def parsed_grid(text: str | None) -> tuple[int, int] | None:
    """`"14x14"` as numbers."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--grid: expected HEIGHTxWIDTH such as 14x14, got {text!r}")
    return int(height), int(width)


def leaderboard(comparison: Comparison, width: int) -> Table:
    """The results as a table for a terminal of so many columns, best first; what does not fit is left out."""
    source = "of Wilcoxon's signed ranks, " if comparison.provenance.get("significance") == "wilcoxon" else ""
    tests = {t.first: t for t in comparison.against_baseline}
    columns: dict[str, list[str]] = {
        "method": [f"{r.method}{' *' if r.method in comparison.pareto else ''}" for r in comparison.results],
        comparison.metric_name: [f"{r.metric:.3f}" for r in comparison.results],
        "interval": [f"{r.interval[0]:.3f}-{r.interval[1]:.3f}" for r in comparison.results],
        f"vs {comparison.baseline}": [_difference(tests.get(r.method)) for r in comparison.results],
        "p adj.": [_adjusted(tests.get(r.method)) for r in comparison.results],
        "params": [f"{r.parameters:,}" for r in comparison.results],
        "ms/item": [f"{r.latency_ms:.3f}" for r in comparison.results],
        "multiply-adds": [f"{r.multiply_adds:,}" for r in comparison.results],
        "train s": [f"{r.seconds:.1f}" for r in comparison.results],
    }
    if width < WIDE:
        del columns["multiply-adds"], columns["train s"]
    for name in ("params", "ms/item", "interval", "p adj.", f"vs {comparison.baseline}"):
        if sum(max(map(len, (head, *cells))) + 1 for head, cells in columns.items()) + 1 > width:
            columns.pop(name)
    table = Table(
        title=Text(
            f"{comparison.dataset['name']}: {comparison.metric_name} on {comparison.dataset['items']['test']} test items",
            "table.title",
        ),
        caption=f"intervals of 95 %; p {source}adjusted by Holm's method; * no other method is both better and faster",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _difference(test: PairTest | None) -> str:
    # adding 0 takes the sign from a zero
    return "" if test is None else f"{round(test.difference, 3) + 0.0:+.3f}"


def _adjusted(test: PairTest | None) -> str:
    return "" if test is None else "<0.001" if test.p_adjusted < 0.001 else f"{test.p_adjusted:.2g}"
