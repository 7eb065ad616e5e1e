"""Ctrl-C, what machines send instead, and closed pipes, at whatever moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cenote.core.interrupts import uninterrupted

PROGRAM = """
import os, signal, sys

class Presses:
    def find_spec(self, name, path=None, target=None):
        if name == {when!r}:
            try:
                os.kill(os.getpid(), signal.{number})
                # handlers of Python run between its instructions
                for _ in range(1000):
                    pass
            except KeyboardInterrupt:
                # as a library does that tries an import and takes any failure for an answer
                pass

sys.meta_path.insert(0, Presses())
from cenote.cli import main
main()
"""


def program(folder: Path, when: str = "", number: str = "SIGINT") -> Path:
    """A script of the program's name that interrupts itself when a module is imported."""
    path = folder / "cenote"
    path.write_text(PROGRAM.format(when=when, number=number))
    return path


def started(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        # whoever starts the tests in the background may have them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("when", "number"),
    [("torch", "SIGINT"), ("cenote.cli.app", "SIGTERM"), ("cenote.jobs.probe", "SIGINT"), ("torch", "SIGHUP")],
)
def test_ctrl_c_during_an_import_is_one_line_and_exit_code_130(when: str, number: str, tmp_path: Path) -> None:
    run = started(program(tmp_path, when, number), "probe", "digits", "--out", tmp_path / "out")
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out, err) == (130, "", "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_program_that_is_told_to_ignore_ctrl_c_does(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, program(tmp_path, "torch"), "show", "simpool"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert "Keep It SimPool" in out


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"]])
def test_a_reader_that_goes_away_gets_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    with started(program(tmp_path), *arguments) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.read(1)
        run.stdout.close()
        assert run.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_end_waits_where_nothing_may_be_left_half_done(number: signal.Signals) -> None:
    done: list[str] = []

    def heard(*_: object) -> None:
        done.append("heard")

    before = signal.signal(number, heard)
    try:
        with uninterrupted():
            signal.raise_signal(number)
            done.append("inside")
        assert done == ["inside", "heard"]
        assert signal.getsignal(number) is heard
    finally:
        signal.signal(number, before)
