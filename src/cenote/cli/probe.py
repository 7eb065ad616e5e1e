"""`cenote probe`: which pooling wins on your data."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli import interrupts, options
from cenote.cli.console import emit, rounded_p, say, signed, talking
from cenote.cli.engines import extractor, known_engine, sweep
from cenote.cli.leaderboard import leaderboard
from cenote.cli.progress import arms_bar
from cenote.cli.tokens import extracting, listed, tell
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.compare import PairTest
    from cenote.features import Labelling
    from cenote.features.dataset import TokenDataset
    from cenote.features.raw import RawItems
    from cenote.jobs.extract import ModelSpec
    from cenote.jobs.probe import Comparison, Recipe

P_FROM = {"wilcoxon": "of Wilcoxon's signed ranks, ", "corrected t": "of the corrected resampled t test, "}


def probe(
    data: options.Labelled = "digits",
    # what is compared, and how it is judged
    methods: options.Methods = "fast",
    seeds: options.Seeds = 3,
    out: options.Out = Path("cenote-out"),
    metric: options.Metric = None,
    significance: options.Significance = "permutation",
    seed_effects: options.SeedEffects = "fixed",
    folds: options.Folds = None,
    repeats: options.Repeats = 1,
    # labelled items
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
    layers: options.ProbedLayers = None,
    # how long is trained
    epochs: options.Epochs = None,
    patience: options.Patience = None,
    references: options.References = True,
    workers: options.Workers = None,
    # raw items, a model, and what is kept of its tokens
    backbone: options.Backbone = None,
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
    # where results go besides, where it is computed, and for machines
    track: options.Track = None,
    json_lines: options.JsonLines = None,
    engine: options.Engine = "local",
    address: options.Address = "auto",
    as_json: options.Json = False,
) -> None:
    """Train probes with every pooling on labelled token features; say which wins, by how much, at what cost."""
    console = talking(as_json)
    from cenote.features import Labelling
    from cenote.jobs.extract import ModelSpec, Options
    from cenote.jobs.probe.arms import chosen_methods

    options.import_from_here(*methods.split(","))
    chosen_methods(methods)
    known_engine(engine)
    _require_places(track or [], json_lines)
    labelling = Labelling(task, label, group, split, seed=split_seed)
    judged = {"metric": metric, "significance": significance, "folds": folds, "repeats": repeats}
    if backbone is None:
        found = {
            "labels": labels,
            "vector_column": vectors,
            "id_column": id_column,
            "prefix_tokens": prefix_tokens,
            "grid": options.parsed_grid(grid),
            "max_item_size": options.parsed_size(max_item_size),
        }
        items = _read(data, labelling, layers, found, console)
    else:
        _require_raw(data, {"grid": grid, "prefix-tokens": prefix_tokens or None, "vectors": vectors})
        raw = listed(
            data, console, kind=kind, labels=labels, column=column, names=names, id_column=id_column, limit=limit,
            max_item_size=max_item_size,
        )  # fmt: skip
        spec = ModelSpec(backbone, kind, revision, device, precision, max_length, trust_remote_code, allow_pickle)
        kept = Options(dtype=dtype, batch=batch, skip_bad=skip_bad)  # type: ignore[arg-type]
        job = {"name": Path(data).stem, "options": kept, "layers": layers, "extractor": extractor(engine, address)}
        items = _extracted(raw, spec, out, labelling, {**job, **judged}, console)
    trained = {"seeds": seeds, "seed_effects": seed_effects, "references": references, "workers": workers}
    trained |= {"recipe": _recipe(epochs, patience), "layers": layers, "engine": sweep(engine, address)}
    start = time.perf_counter()
    count, comparison = _compared(items, methods, out, {**judged, **trained}, console)
    _tell(comparison, out, start, console, as_json)
    if json_lines is not None:
        comparison.to_jsonl(json_lines)
    _track(comparison, track or [], out, console)
    if not comparison.complete:
        interrupts.tell(
            f"kept {len(comparison.results)} of {count} methods in {out}; run the same command again to go on"
        )
        raise typer.Exit(interrupts.EXIT)


def _require_places(trackers: list[str], json_lines: Path | None) -> None:
    """Where results shall go besides, they can go, as far as can be told before anything is trained."""
    from cenote.bridges.trackers import require_trackers
    from cenote.core.files import require_place

    require_trackers(trackers)
    if json_lines is not None:
        require_place(json_lines, "json-lines")


def _track(comparison: Comparison, trackers: list[str], out: Path, console: Console) -> None:
    from cenote.bridges.trackers import track

    for tracker in trackers if comparison.complete else ():
        say(console, f"{tracker}: {track(comparison, tracker, out)}")


def _recipe(epochs: int | None, patience: int | None) -> Recipe:
    from cenote.jobs.probe import Recipe

    usual = Recipe()
    return Recipe(epochs=epochs or usual.epochs, patience=patience or usual.patience)


def _read(data: str, labelling: Labelling, layers: str | None, found: dict[str, Any], console: Console) -> TokenDataset:
    """Features that are there."""
    import cenote.features as features

    with console.status(Text(f"reading {data}")):
        return features.read(
            data,
            task=labelling.task,
            label_column=labelling.label,
            group_column=labelling.group,
            split_column=labelling.split,
            seed=labelling.seed,
            layers=None if layers is None else "all",
            **found,
        )


def _extracted(
    raw: RawItems, spec: ModelSpec, out: Path, labelling: Labelling, job: dict[str, Any], console: Console
) -> TokenDataset:
    """Features that a model makes of raw items first."""
    from cenote.jobs.probe.raw import FEATURES, tokens_of_raw

    with extracting(console, len(raw), out / FEATURES) as on_progress:
        return tokens_of_raw(
            raw,
            spec,
            out / FEATURES,
            labelling,
            on_progress=on_progress,
            on_message=lambda text: say(console, text),
            on_extracted=lambda done: tell(done, console),
            **job,
        )


def _compared(
    items: TokenDataset, methods: str, out: Path, job: dict[str, Any], console: Console
) -> tuple[int, Comparison]:
    """How many methods there are to train, and what came out."""
    import cenote.features as features
    from cenote.jobs.probe import compare
    from cenote.jobs.probe.arms import columns_of
    from cenote.jobs.probe.folds import planned
    from cenote.jobs.probe.references import reference_names

    say(console, features.describe(items))
    if told := planned(items, job["folds"], job["repeats"], job["significance"]).told():
        say(console, f"  {told}")
    count = len(columns_of(items, methods, job["layers"])[0])
    count += len(reference_names(items.task)) if job["references"] else 0
    with arms_bar(console, count) as on_method:
        return count, compare(items, methods, out=out, on_method=on_method, **job)


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


def _tell(comparison: Comparison, out: Path, start: float, console: Console, as_json: bool) -> None:
    from cenote.report import write

    page = write(out)
    _tell_results(comparison, console)
    _tell_what_to_use(comparison, out, console)
    say(console, f"{time.perf_counter() - start:.0f} s; report: {page}")
    if as_json:
        emit({**dataclasses.asdict(comparison), "report": page})


def _tell_results(comparison: Comparison, console: Console) -> None:
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
    return "" if test is None else signed(test.difference, 3)


def _adjusted(test: PairTest | None) -> str:
    return "" if test is None else rounded_p(test.p_adjusted)
