import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli.console import PlainConsole, plain, say
from tests.cli.program import Run

HOSTILE = "a\x1b]0;owned\x07\x1b[31mb\x9b2J\u202ec\r"
SHOWN = "a\\x1b]0;owned\\x07\\x1b[31mb\\x9b2J\\u202ec\\r"


def test_what_terminals_would_obey_is_spelled_out() -> None:
    assert plain(HOSTILE) == SHOWN
    assert plain("half \udcff a name") == "half \\udcff a name"
    for text in ("several\nlines\tand tabs", "Größe, 模型, é", ""):
        assert plain(text) == text


def test_a_console_obeys_itself_alone() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, width=120)
    table = Table(title=Text(HOSTILE))
    table.add_column("name")
    table.add_row(HOSTILE.replace("[", "("))
    console.print(table)
    say(console, HOSTILE, "bold")
    assert "\x1b[1m" in out.getvalue(), "its own style"
    for sequence in ("\x1b]0", "\x1b[31m", "\x07", "\x9b", "\u202e"):
        assert sequence not in out.getvalue()
    assert "\\x1b[31mb\\x9b2J" in out.getvalue()
    assert isinstance(console, Console)


def test_names_of_files_and_classes_in_errors(cenote: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31mb"
    folder.mkdir()
    (folder / "x.npy").write_bytes(b"no array")
    (folder / "labels.csv").write_text("id,label\nx,\x1b[5mcat\n")
    code, out, err = cenote("probe", folder, "--out", tmp_path / "out")
    assert code == 2
    assert "\x1b" not in out + err
    assert "a\\x1b[31mb" in err


@pytest.mark.parametrize("name", ["inf", "nan"])
def test_json_for_machines_holds_no_bare_nan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from cenote.cli.console import emit

    emit({"interval": (float(name), 1.0), "out": Path("a")})
    assert capsys.readouterr().out == '{\n "interval": [\n  null,\n  1.0\n ],\n "out": "a"\n}\n'
