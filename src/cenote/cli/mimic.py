"""`cenote mimic`: vectors for rare words from a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from cenote.cli.console import PlainConsole, say
from cenote.core.errors import InputError


def mimic(
    vectors: Annotated[Path, typer.Argument(help="Word vectors that are there: word2vec or GloVe text format.")],
    text: Annotated[Path, typer.Argument(help="Text file, one sentence a line: the words' contexts.")],
    out: Annotated[Path, typer.Option(help="File to write, in word2vec text format.")] = Path("rare-words.txt"),
    words: Annotated[
        Path | None,
        typer.Option(help="Text file with the words that get a vector, one a line; default: all of TEXT without one."),
    ] = None,
    at_least: Annotated[
        int, typer.Option(min=1, help="Without --words: only words that stand so many times in TEXT.")
    ] = 1,
    together: Annotated[bool, typer.Option("--together", help="Write the vectors that were there as well.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder for the trained model; one that lies there already is used instead of training."),
    ] = None,
    most_vectors: Annotated[
        int | None, typer.Option(min=1, help="Read only so many of VECTORS, the first ones.")
    ] = None,
    least_count: Annotated[int, typer.Option(min=1, help="Train on words that stand so many times in TEXT.")] = 100,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of a word in one training step.")] = 20,
    kept_contexts: Annotated[int, typer.Option(min=1, help="Contexts that are kept of a word.")] = 100,
    combinator: Annotated[
        str, typer.Option(help="How letters and contexts are joined: gated, single, form or context.")
    ] = "gated",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the frequent words.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order and sampled contexts.")] = 0,
) -> None:
    """Give rare words a vector, made of their letters and contexts, by mimicking the vectors of frequent words."""
    from cenote.pool.sequence.attentive_mimicking.mimic import Mimic, read_words, train_mimic, words_without_vector
    from cenote.pool.sequence.attentive_mimicking.word_contexts import contexts_of
    from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors

    console = PlainConsole()
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out: {out} cannot be written; name a file in a folder that exists")
    trained = model is not None and (model / "mimic.json").is_file()
    with console.status(Text(f"reading {vectors}")):
        known = WordVectors.read(vectors, most_vectors)
        wanted = None if words is None else read_words(words)
    say(console, f"{len(known):,} vectors of width {known.dim}: {vectors}")
    with console.status(Text(f"reading {text}")):
        wanted = words_without_vector(text, known, at_least) if wanted is None else wanted
    if trained:
        assert model is not None
        made = Mimic.load(model)
        if made.known.words != known.words or not made.known.vectors.equal(known.vectors):
            raise InputError(f"--model: {model} was trained with other vectors than {vectors}; name an empty folder")
        say(console, f"not trained again: model of {model}")
    else:
        columns = (TextColumn("training"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("training", total=1.0)
            made = train_mimic(
                known,
                text,
                combinator=combinator,  # type: ignore[arg-type]
                least_count=least_count,
                contexts=contexts,
                kept_contexts=kept_contexts,
                epochs=epochs,
                seed=seed,
                on_progress=lambda share: progress.update(bar, completed=share),
            )
        say(console, f"loss {made.losses[0]:.4g} in the first epoch, {made.losses[-1]:.4g} in the last")
        if model is not None:
            made.save(model)
    with console.status(f"{len(wanted):,} words"):
        found = contexts_of(wanted, text, known.number, kept_contexts, seed=seed)
        new = made.infer(found)
    both = known.joined(new) if together else new
    both.save(out)
    alone = sum(not c for c in found.values())
    say(
        console,
        f"{len(new):,} words, {alone:,} of them from their letters alone, as the text shows them in no context: {out}",
    )
