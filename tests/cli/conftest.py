import signal
import sys

import pytest

from cenote.cli import main
from cenote.cli.interrupts import ENDING
from tests.cli.program import Run


@pytest.fixture
def cenote(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process: `(exit code, stdout, stderr)`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cenote", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code, handlers = 0, {number: signal.getsignal(number) for number in ENDING}
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return code, out, err

    return run
