"""`cenote explain`: which explanation of your model is faithful on your inputs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli import explain_decoder, interrupts, options
from cenote.cli.console import emit, rounded_p, say, signed, talking
from cenote.cli.leaderboard import leaderboard
from cenote.cli.options import split_names
from cenote.cli.progress import arms_bar
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.features.raw import RawItems
    from cenote.jobs.explain import Audit, Subject
    from cenote.jobs.explain.items import Taken
    from cenote.jobs.explain.one import Looked
    from cenote.models.classifier import Classifier

ITEMS = 200
EMBEDDED = "digits"
FOR, AGAINST = (31, 145, 136), (208, 116, 60)


def explain(
    model: Annotated[
        str, typer.Argument(help="Classifier of transformers, a folder or a name on the hub; digits: the embedded one.")
    ] = EMBEDDED,
    data: Annotated[
        str | None,
        typer.Argument(help="Texts (CSV, TSV, JSONL, txt, Parquet) or a folder of images, as the model takes them."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Explain this one text, by what the audit in --out recommends.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", "--column", help="Of a table: the column with the text or image.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder with a mask for each image: where what it shows is, to score localisation."),
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Of a decoder: what each of its heads does.")] = False,
    concept: Annotated[
        Path | None, typer.Option(help="With --heads: file with a word a line; which heads write about them.")
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(help="Of a decoder: JSON lines with question, choices, answer; does it look at the choices?"),
    ] = None,
    methods: options.Methods = "fast",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of explanations that draw.")] = 2,
    out: options.Out = Path("explain-out"),
    significance: options.Significance = "permutation",
    target: Annotated[
        str | None, typer.Option(help="The class to explain, by name; default: what the model chooses, item by item.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column with the true class, to tell how often the model is right.")
    ] = None,
    id_column: options.Id = None,
    names: options.Names = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many items, the first ones.")] = ITEMS,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out, and list, what cannot be read or is too long.")
    ] = False,
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    as_json: options.Json = False,
) -> None:
    """Audit explanations of a classifier: which is faithful on these inputs, by how much, at what cost."""
    console = talking(as_json)
    from cenote.jobs.explain import audit, digits
    from cenote.jobs.explain.arms import chosen

    _require_one_job(data, text, masks, heads, concept, choices)
    loading = {
        "revision": revision,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
    }
    if heads:
        explain_decoder.heads(model, concept, out, console, as_json, **loading)
        return
    if choices is not None:
        explain_decoder.choices(model, choices, limit, out, console, as_json, **loading)
        return
    if text is None or methods != "fast":
        chosen(methods)
    embedded = model == EMBEDDED and not Path(model).exists()
    if embedded and (text is not None or data is not None):
        raise InputError(f"model: the embedded {EMBEDDED} have their own items; name a classifier for yours")
    labels: tuple[str, ...] | None = None
    subject: Subject
    if embedded:
        subject, name = digits(limit), EMBEDDED
    else:
        if text is None and data is None:
            raise InputError("data: name a table of texts or a folder of images, or give one --text")
        from cenote.models.classifier import load_classifier

        with console.status(Text(f"loading {model}")):
            loaded = load_classifier(model, **loading)  # type: ignore[arg-type]
        if text is not None:
            _explain_one(loaded, text, methods, out, console, as_json)
            return
        assert data is not None
        raw = _listed(data, console, loaded.kind, text_column, names, id_column, limit)
        found = _subject(loaded, raw, label, skip_bad, masks, console)
        subject, labels, name = found.subject, found.labels, f"{loaded.name} on {Path(data).stem}"
    start = time.perf_counter()
    count = len(chosen(methods)) + 4
    with arms_bar(console, count) as on_method:
        audited = audit(
            subject,
            None,
            methods,
            labels=labels,
            target=target,
            seeds=seeds,
            out=out,
            name=name,
            significance=significance,  # type: ignore[arg-type]
            on_method=on_method,
        )
    from cenote.report import write

    page = write(out)
    _tell(audited, console)
    say(console, f"{time.perf_counter() - start:.0f} s; report: {page}")
    if as_json:
        emit({**dataclasses.asdict(audited), "report": page})
    if not audited.complete:
        interrupts.tell(f"kept {len(audited.results)} of {count} in {out}; run the same command again to go on")
        raise typer.Exit(interrupts.EXIT)


def _require_one_job(
    data: str | None,
    text: str | None,
    masks: Path | None,
    heads: bool,
    concept: Path | None,
    choices: Path | None,
) -> None:
    """Each flag asks something else of a model."""
    asked = [name for name, given in (("--text", text), ("--heads", heads), ("--choices", choices)) if given]
    if len(asked) > 1:
        raise InputError(f"{asked[0]}, {asked[1]}: are different questions; ask one after the other")
    if data is not None and asked:
        raise InputError(f"{asked[0]}: takes no data, got {data}; leave one of them out")
    if concept is not None and not heads:
        raise InputError("--concept: is a question about heads; give --heads too")
    if masks is not None and (asked or data is None):
        raise InputError("--masks: are of images; name their folder behind the model")


def _listed(
    data: str, console: Console, kind: str, column: str | None, names: str | None, id_column: str | None, limit: int
) -> RawItems:
    from cenote.features.raw import open_raw

    with console.status(Text(f"listing {data}")):
        raw = open_raw(data, kind=kind, column=column, names=split_names(names), id_column=id_column, limit=limit)
    say(console, f"{len(raw):,} items: {raw.format}")
    return raw


def _subject(
    loaded: Classifier, raw: RawItems, label: str | None, skip_bad: bool, masks: Path | None, console: Console
) -> Taken:
    from cenote.jobs.explain.items import taken

    found = taken(loaded, raw, label, skip_bad, masks)
    for name, why in found.left_out:
        say(console, f"left out {name}: {why}")
    return found


def _explain_one(loaded: Classifier, text: str, methods: str, out: Path, console: Console, as_json: bool) -> None:
    """A heat map and a sentence."""
    from cenote.jobs.explain.one import look, recommended_by
    from cenote.jobs.explain.texts import Texts
    from cenote.models.classifier import TextClassifier

    if loaded.kind != "text":
        raise InputError(f"text: {loaded.name} takes {loaded.kind}; name a folder of images instead")
    names = [recommended_by(out)] if methods == "fast" else [n.strip() for n in methods.split(",")]
    subject = Texts(TextClassifier(loaded), [text], ["text"])
    looks = [look(subject, name) for name in names]
    for found in looks:
        console.print(heat(found))
        say(console, found.sentence)
    if as_json:
        emit({"explanations": [{**dataclasses.asdict(found), "sentence": found.sentence} for found in looks]})


def heat(found: Looked) -> Text:
    """The words, coloured by what they speak for."""
    largest = max(map(abs, found.scores), default=0.0) or 1.0
    drawn = Text()
    for word, score in zip(found.words, found.scores, strict=True):
        share, colour = abs(score) / largest, FOR if score >= 0 else AGAINST
        shade = ",".join(str(round(255 + share * (c - 255))) for c in colour)
        drawn.append(word, f"black on rgb({shade})")
        drawn.append(" ")
    return drawn


def _tell(audit: Audit, console: Console) -> None:
    console.print(table_of(audit, console.width))
    for name, why in audit.skipped.items():
        say(console, f"left out {name}: {why}")
    if audit.order:
        say(console, audit.order)
    console.print(Text(f"\n{audit.sentence}", "bold red" if audit.no_verdict else "bold"))
    if audit.recommended:
        say(console, f"\nuse {audit.recommended}: {audit.reason}", "bold")


def table_of(audit: Audit, width: int) -> Table:
    """The results for a terminal of so many columns, best first."""
    tests = {t.first: t for t in audit.against_baseline}
    difference = f"vs {audit.baseline}"
    results = audit.results
    columns = {
        "explanation": [_named(r.method, audit) for r in results],
        audit.metric_name: [f"{r.metric:.3f}" for r in results],
        difference: [signed(tests[r.method].difference, 3) if r.method in tests else "" for r in results],
        "p adj.": [rounded_p(tests[r.method].p_adjusted) if r.method in tests else "" for r in results],
        "compr.": [f"{r.comprehensiveness:.3f}" for r in results],
        "suff.": [f"{r.sufficiency:.3f}" for r in results],
        "deletion": [f"{r.deletion:+.3f}" for r in results],
        "insertion": [f"{r.insertion:+.3f}" for r in results],
        "infid.": [f"{r.infidelity:.2f}" for r in results],
        "sparsity": [f"{r.sparsity:.2f}" for r in results],
        **(
            {
                "points": [_known(r.pointing, ".2f") for r in results],
                "inside": [_known(r.mass_inside, ".2f") for r in results],
                "IoU": [_known(r.iou, ".2f") for r in results],
            }
            if audit.localised
            else {}
        ),
        "seeds": [_known(r.stability, ".2f") for r in results],
        "random weights": [_known(r.unchanged, ".2f") for r in results],
        "sum off": [_known(r.completeness_error, ".1e") for r in results],
        "ms": [_known(r.ms, ".1f") for r in results],
        "MB": [_known(r.megabytes, ".1f") for r in results],
    }
    return leaderboard(
        columns,
        width,
        title=f"{audit.dataset['name']}: {audit.metric_name} on {audit.tested}",
        caption="p adjusted by Holm's method; * no other is both more faithful and faster; ° control; † struck out",
        luxuries=("sparsity", "sum off", "infid."),
        spared=(
            "MB",
            "seeds",
            "insertion",
            "random weights",
            "deletion",
            "suff.",
            "compr.",
            "ms",
            "p adj.",
            difference,
        ),
    )


def _named(method: str, audit: Audit) -> str:
    marks = ((method in audit.struck, " †"), (method in audit.controls, " °"), (method in audit.pareto, " *"))
    return method + next((mark for holds, mark in marks if holds), "")


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
