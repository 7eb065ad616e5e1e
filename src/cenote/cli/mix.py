"""`cenote mix`: with which policy and budget of keys a decoder still gives its answers, and what is saved."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli import interrupts, options
from cenote.cli.console import clock, emit, rounded_p, say, signed, sized, talking
from cenote.cli.leaderboard import leaderboard
from cenote.cli.progress import arms_bar
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.jobs.mix import PolicyFrontier

TINY = "tiny-decoder"
EMBEDDED = {"facts": 160, "length": 280}
"""What is asked of it: its pages are not long, and it was made for contexts that are not."""
SMALL = (32, 64, 128)


def mix(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A causal decoder: a folder of transformers or a name on the hub; default: the embedded one."
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Argument(help="Prose of the kind that the model reads, UTF-8; empty lines divide texts.")
    ] = None,
    out: options.Out = Path("mix-out"),
    methods: Annotated[
        str,
        typer.Option(
            help="fast, all, or names of KV policies separated by commas (see cenote list); your own: mypackage.MyPolicy."
        ),
    ] = "fast",
    budgets: Annotated[
        str | None,
        typer.Option(
            help="How many keys one key head may read or keep; default 128,512; of the embedded decoder 32,64,128."
        ),
    ] = None,
    facts: Annotated[
        int | None, typer.Option(min=1, help="How many are planted and asked for; default 24, embedded 160.")
    ] = None,
    loss: Annotated[
        float | None, typer.Option(min=0, help="Share of the facts that may be lost; default 0.02.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a context, and of a text; default 1000, embedded 280.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the facts and their places.")] = 0,
    significance: options.Significance = "permutation",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be compared and the minutes it takes; write nothing.")
    ] = False,
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    as_json: options.Json = False,
) -> None:
    """Let a decoder read or keep fewer keys in every way: which facts it still tells, what is saved, could it be chance."""
    console = talking(as_json)
    start = time.perf_counter()
    given = {"facts": facts, "length": length, "loss": loss}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    from cenote.compare.words import counted
    from cenote.jobs.mix import arms
    from cenote.jobs.mix.job import LENGTH

    options.import_from_here(*methods.split(","))
    sizes = _budgets(budgets) if budgets is not None else SMALL if model is None else arms.BUDGETS
    # before a model takes its time to load
    arms.tried(methods, sizes, length or (EMBEDDED["length"] if model is None else LENGTH))
    if model is None:
        decoder, tokenizer, told = _embedded(device, console)
        asked = {**EMBEDDED, **asked}
    else:
        told = _read(texts)
        decoder, tokenizer = _loaded(
            model,
            console,
            revision=revision,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    name = TINY if model is None else model
    say(console, f"{name}: {counted(len(told), 'text')}")
    if dry_run:
        asked.pop("loss", None)
        _plan(decoder, tokenizer, told, methods, sizes, {**asked, "seed": seed}, console, as_json)
        return
    from cenote.jobs.mix import compare_policies

    with arms_bar(console, arms.count(methods, sizes)) as on_method:
        found = compare_policies(
            decoder, tokenizer, told, methods, sizes,
            seed=seed, out=out, name=Path(name).name, significance=significance, on_method=on_method,  # type: ignore[arg-type]
            **asked,
        )  # fmt: skip
    _show(found, out, start, console, as_json)
    if not found.complete:
        interrupts.tell(f"kept what is finished in {out}; run the same command again to go on")
        raise typer.Exit(interrupts.EXIT)


def _show(found: PolicyFrontier, out: Path, start: float, console: Console, as_json: bool) -> None:
    from cenote.report import write

    page = write(out)
    console.print(table_of(found, console.width))
    for name, why in found.skipped.items():
        say(console, f"left out {name}: {why}")
    console.print(Text(f"\n{found.sentence}", "bold red" if found.no_verdict else "bold"))
    say(console, f"\nuse {found.recommended}: {found.reason}", "bold")
    say(console, f"{time.perf_counter() - start:.0f} s; report: {page}")
    if as_json:
        emit({**dataclasses.asdict(found), "verdict": found.verdict, "report": page})


def _budgets(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--budgets: expected whole numbers separated by commas, such as 128,512, got {text!r}"
        ) from None


def _read(path: Path | None) -> list[str]:
    """The texts of a file."""
    if path is None:
        raise InputError("texts: name a file of prose that the model reads, UTF-8, with empty lines between texts")
    if not path.is_file():
        raise InputError(f"texts: there is no file {path}; name one with prose, UTF-8, with empty lines between texts")
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"texts: {path} is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    told = [" ".join(part.split()) for part in content.replace("\r\n", "\n").split("\n\n")]
    told = [text for text in told if text]
    if not told:
        raise InputError(f"texts: {path} is empty; give prose of the kind that the model reads")
    return told


def _loaded(model: str, console: Console, **loading: Any) -> tuple[Any, Any]:
    from cenote.models.decoder import load_decoder

    with console.status(Text(f"loading {model}")):
        found = load_decoder(model, **loading)
    return found.model, found.tokenizer


def _embedded(device: str, console: Console) -> tuple[Any, Any, list[str]]:
    """The decoder that comes with the package, its tokenizer, and pages that it has not seen."""
    from cenote.features.manuals import unseen_texts
    from cenote.models.tiny_decoder import tiny_decoder

    with console.status("loading the embedded decoder"):
        return *tiny_decoder(device), list(unseen_texts())


def _plan(
    decoder: Any,
    tokenizer: Any,
    texts: list[str],
    methods: str,
    budgets: tuple[int, ...],
    asked: dict[str, Any],
    console: Console,
    as_json: bool,
) -> None:
    from cenote.compare.words import counted
    from cenote.jobs.mix import benched
    from cenote.jobs.mix.arms import arms
    from cenote.jobs.mix.plan import planned

    bench = benched(decoder, tokenizer, texts, **asked)
    made, skipped = arms(bench, methods, budgets)
    with console.status("timing a sample"):
        plan = planned(bench, made, skipped)
    for arm in plan.arms:
        say(console, f"  {arm.name}: {clock(arm.seconds)}")
    for name, why in plan.skipped.items():
        say(console, f"left out {name}: {why}")
    say(
        console,
        f"{counted(len(plan.arms), 'arm')} on {counted(plan.facts, 'fact')} in {counted(plan.contexts, 'context')} and "
        f"{counted(plan.texts, 'text')} of {plan.length:,} tokens; about {clock(plan.seconds)} on this machine",
    )
    if as_json:
        emit(dataclasses.asdict(plan))


def table_of(found: PolicyFrontier, width: int) -> Table:
    """The results for a terminal of so many columns, best first."""
    tests = {t.first: t for t in found.against_baseline}
    results = found.results
    columns = {
        "policy": [_named(r.method, found) for r in results],
        "facts": [f"{found.told(r)}/{found.dataset['facts']}" for r in results],
        "vs dense": [signed(100 * tests[r.method].difference, 0) if r.method in tests else "" for r in results],
        "p adj.": [rounded_p(tests[r.method].p_adjusted) if r.method in tests else "" for r in results],
        "memory": [found.memory(r) for r in results],
        "keys read": [f"{r.keys:,.0f}" for r in results],
        "share": [f"{100 * r.share:.0f} %" for r in results],
        "cache": [sized(r.bytes) for r in results],
        "perplexity": [f"{r.perplexity:.4g}" for r in results],
        "agree": [f"{r.agreement:.2f}" for r in results],
        "prefill s": [f"{r.prefill_s:.2g}" for r in results],
        "ms/token": [f"{r.ms:.3g}" for r in results],
        "x loaded": [f"{r.over_loaded:.2f}" for r in results],
        "x exact": [f"{r.over_exact:.2f}" for r in results],
    }
    return leaderboard(
        columns,
        width,
        title=f"{found.dataset['name']}: {found.tested}",
        caption="vs dense in points, p adjusted by Holm's method; * no other tells more and reads less; ° control, "
        "^ best choice; x: times as fast as loaded, as the exact path",
        luxuries=("prefill s", "agree"),
        spared=("cache", "x loaded", "p adj.", "keys read", "ms/token", "vs dense"),
    )


def _named(method: str, found: PolicyFrontier) -> str:
    marks = ((method in found.controls, " °"), (method in found.references, " ^"), (method in found.pareto, " *"))
    return method + "".join(mark for holds, mark in marks if holds)
