"""`cenote explain` of a decoder: what its heads do, and whether it looks at listed answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli.console import emit, say
from cenote.cli.leaderboard import leaderboard
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.jobs.explain.choices import Choices
    from cenote.jobs.explain.heads import Heads

SHOWN = 10


def heads(model: str, concept: Path | None, out: Path, console: Console, as_json: bool, **loading: Any) -> None:
    """The head atlas."""
    from cenote.jobs.explain.heads import heads as looked
    from cenote.models.decoder import load_decoder
    from cenote.report.decoder import write_heads

    words = None
    if concept is not None:
        if not concept.is_file():
            raise InputError(f"concept: there is no file {concept}; name one with a word a line")
        try:
            words = concept.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"concept: {concept} is no UTF-8 text ({error.reason})") from None
    with console.status(Text(f"looking at the heads of {model}")):
        decoder = load_decoder(model, **loading)
        found = looked(decoder, words, concept_name=concept.stem if concept is not None else "")
    found.save(out)
    console.print(heads_table(found, console.width))
    _end(found, write_heads(found, out), console, as_json)


def choices(
    model: str, questions: Path, limit: int, out: Path, console: Console, as_json: bool, **loading: Any
) -> None:
    """The audit of choices."""
    from cenote.jobs.explain.choices import choices as audited
    from cenote.jobs.explain.choices import questions as read
    from cenote.models.decoder import load_decoder
    from cenote.report.decoder import write_choices

    asked = read(questions, limit)
    with console.status(Text(f"asking {model}")):
        found = audited(load_decoder(model, **loading), asked)
    found.save(out)
    console.print(choices_table(found, console.width))
    for note in found.notes:
        say(console, note)
    _end(found, write_choices(found, out), console, as_json)


def heads_table(found: Heads, width: int) -> Table:
    """The strongest heads of each kind."""
    rows = [
        (name, f"{head.layer}", f"{head.head}", f"{head.score:.2f}", "")
        for name, kind in found.kinds.items()
        for head in kind.found[:SHOWN]
    ]
    if found.concept is not None:
        rows += [
            (found.concept.name, f"{head.layer}", f"{head.head}", f"{head.score:+.2f}", ", ".join(words[:3]))
            for head, words in found.concept.best[:SHOWN]
        ]
    columns = ("kind", "layer", "head", "score", "words")
    named = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    return leaderboard(
        named if found.concept is not None else {n: c for n, c in named.items() if n != "words"},
        width,
        title=f"heads of {found.model}",
        caption=f"at most {SHOWN} of each kind; all of them in heads.json",
        spared=("words",),
    )


def choices_table(found: Choices, width: int) -> Table:
    """A row per style."""
    rules = list(found.styles[0].accuracies)
    columns = {
        "choices": [s.name for s in found.styles],
        "probability on them": [f"{s.attentiveness:.3f}" for s in found.styles],
        "unaffectable": [f"{s.percent_unaffectable:.0f} %" for s in found.styles],
        "right": [f"{s.accuracies['raw']:.3f}" for s in found.styles],
        **{f"right, {rule}": [f"{s.accuracies[rule]:.3f}" for s in found.styles] for rule in rules if rule != "raw"},
    }
    return leaderboard(
        columns,
        width,
        title=f"{found.model}: {len(found.styles[0].items):,} questions",
        caption="unaffectable: no other wording of the answers can change what is picked",
        spared=[name for name in reversed(columns) if name.startswith("right, ")] + ["unaffectable"],
    )


def _end(found: Heads | Choices, page: Path, console: Console, as_json: bool) -> None:
    console.print(Text(f"\n{found.sentence}", "bold"))
    say(console, f"report: {page}")
    if as_json:
        emit({**dataclasses.asdict(found), "sentence": found.sentence, "report": page})
