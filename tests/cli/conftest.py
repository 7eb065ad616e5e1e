import signal
import sys

import pytest

from cenote.cli import main
from tests.cli.program import Run


@pytest.fixture
def cenote(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process: `(exit code, stdout, stderr)`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cenote", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code, on_interrupt = 0, signal.getsignal(signal.SIGINT)
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        out, err = capsys.readouterr()
        return code, out, err

    return run
