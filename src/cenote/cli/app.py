"""The `cenote` program: its commands, and how errors reach a person."""

from __future__ import annotations

import errno
import sys

import typer

from cenote.cli import catalog, extract, mimic, models, predict, probe, report, study
from cenote.core.errors import InputError

app = typer.Typer(
    name="cenote",
    help="Pool, reduce, mix, explain, steer and select a model's tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("probe")(probe.probe)
app.command("extract")(extract.extract)
app.command("predict")(predict.predict)
app.command("report")(report.report)
app.command("mimic")(mimic.mimic)
app.command("study")(study.study)
app.command("list")(catalog.list_methods)
app.command("show")(catalog.show)
app.add_typer(models.app, name="models")


def main() -> None:
    """Entry point: exit code 2 and one message for wrong input, 130 after Ctrl-C."""
    try:
        app()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.stderr.write(f"error: a disk is full ({error.filename or 'where the output goes to'}); make room\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
