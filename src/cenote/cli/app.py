"""The `cenote` program: its commands, and how errors reach a person."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import warnings
from typing import Annotated, Any

import typer

from cenote.cli import (
    catalog,
    embed,
    explain,
    extract,
    index,
    interrupts,
    mimic,
    mix,
    models,
    predict,
    probe,
    reduce,
    report,
    search,
    study,
)
from cenote.cli.console import plain
from cenote.core.errors import InputError
from cenote.core.version import __version__

app = typer.Typer(
    name="cenote",
    help="Pool, reduce, mix, explain, steer and select a model's tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("probe")(probe.probe)
app.command("explain")(explain.explain)
app.command("reduce")(reduce.reduce)
app.command("mix")(mix.mix)
app.command("index")(index.index)
app.command("search")(search.search)
app.command("extract")(extract.extract)
app.command("predict")(predict.predict)
app.command("embed")(embed.embed)
app.command("report")(report.report)
app.command("mimic")(mimic.mimic)
app.command("study")(study.study)
app.command("list")(catalog.list_methods)
app.command("show")(catalog.show)
app.add_typer(models.app, name="models")


def _tell_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"cenote {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def cenote(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    """Pool, reduce, mix, explain, steer and select a model's tokens."""


REMEDIES = {
    errno.EACCES: "allow it, or name another",
    errno.EPERM: "allow it, or name another",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.ENAMETOOLONG: "name a shorter one",
}
"""Failures of the machine that a person can do something about, wherever they turn up."""


def _with_flags(message: str) -> str:
    """Arguments of Python that have a shorter name as flags, by that.

    >>> _with_flags("id_column: no column is called 'file'; name one with id_column")
    "--id: no column is called 'file'; name one with --id"
    """
    return re.sub(r"\b(label|id|group|split)_column\b", r"--\1", message).replace("max_item_size", "--max-item-size")


def _at_home(argument: str) -> str:
    """The home folder for a leading `~`, which a shell leaves as it is in `--out=~/tokens`.

    >>> _at_home("--out=tokens"), _at_home("--out=~/tokens") == "--out=" + os.path.expanduser("~/tokens")
    ('--out=tokens', True)
    """
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}"


def _take_any_text(stream: object) -> None:
    """A terminal of few letters, and names of files that are no text, are no reason to fail: letters are escaped there."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _showing(before: Any) -> Any:
    """How warnings are shown: those of cenote that speak to people as one line."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category.__name__ == "UncheckedWarning":
            sys.stderr.write(f"note: {message}\n")
        else:
            before(message, category, *rest, **more)

    return show


def main() -> None:
    """Entry point: exit code 2 and one message for wrong input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        _take_any_text(stream)
    warnings.showwarning = _showing(warnings.showwarning)
    try:
        app(args=[_at_home(argument) for argument in sys.argv[1:]])
    except InputError as error:
        sys.stderr.write(f"error: {plain(_with_flags(str(error)))}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = "the output" if error.filename is None else error.filename
        sys.stderr.write(f"error: {plain(str(where))}: {error.strerror}; {REMEDIES[error.errno]}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        interrupts.tell()
        sys.exit(interrupts.EXIT)
    except SystemExit as end:
        if end.code == interrupts.EXIT:
            interrupts.tell()
        raise
