from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import cenote
from cenote.catalog.names import places
from cenote.cli.app import app
from cenote.cli.catalog import show
from tests.cli.program import Run

runner = CliRunner()


def test_list_prints_every_system_and_every_name_on_one_line_each() -> None:
    done = runner.invoke(app, ["list"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    for s in cenote.systems():
        assert any(f" {s.slug} " in line and f" {s.row} " in line for line in lines), s.slug
    for m in cenote.methods():
        assert any(line.startswith(f"│ {m.name} ") for line in lines), m.name


def test_list_of_one_room_leaves_the_others_out() -> None:
    lines = runner.invoke(app, ["list", "--room", "steer"]).stdout
    for s in cenote.systems():
        assert (f" {s.slug} " in lines) == (s.room == "steer"), s.slug


def test_show_of_a_slug() -> None:
    shown = runner.invoke(app, ["show", "simpool"]).stdout
    for expected in (
        "Keep It SimPool",
        "arXiv 2309.06891",
        "billpsomas/simpool",
        "cenote.pool.attention.simpool.SimPool",
    ):
        assert expected in shown


def test_show_says_what_a_user_should_know_about_the_method() -> None:
    assert "pending patent applications" in runner.invoke(app, ["show", "localist-framework"]).stdout


@pytest.mark.parametrize(
    "every", [8, pytest.param(1, marks=pytest.mark.thorough("a thousand names, a tenth of a second each"))]
)
def test_show_knows_every_slug_method_and_class(every: int, capsys: pytest.CaptureFixture[str]) -> None:
    for s in cenote.systems()[::every]:
        show(s.slug)
        assert f" {s.row} " in capsys.readouterr().out, s.slug
    for m in cenote.methods()[::every]:
        for name in (m.name, m.path.rpartition(".")[2]):
            show(name)
            shown = capsys.readouterr().out
            assert m.path in shown, name
            assert m.slug is None or f" {m.slug} " in shown, name
    for name, path in list(places().items())[::every]:
        show(name)
        shown = capsys.readouterr().out
        assert "systems match" not in shown, name
        assert path in shown, name


def test_show_of_a_method_of_no_system() -> None:
    shown = runner.invoke(app, ["show", "abmil-plain"]).stdout
    for expected in ("without the gate", "cenote.pool.attention.abmil.ABMIL", "abmil, abmil-plain"):
        assert expected in shown


def test_list_and_show_for_machines() -> None:
    listed = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert [s["slug"] for s in listed["systems"]] == [s.slug for s in cenote.systems()]
    assert [m["name"] for m in listed["methods"]] == [m.name for m in cenote.methods()]
    shown = json.loads(runner.invoke(app, ["show", "simpool", "--json"]).stdout)
    simpool = cenote.find("simpool")[0]
    assert (shown["row"], shown["status"], shown["built_by_name"]) == (7, simpool.status, ["simpool"])
    told = shown["parts"]
    assert told["all"] == len(simpool.parts) == told["present"] + told["missing"] + told["answered"]
    assert [p["name"] for p in told["list"] if p["state"] == "missing"] == list(simpool.missing)
    assert shown in listed["systems"]
    mean = json.loads(runner.invoke(app, ["show", "mean", "--json"]).stdout)
    assert (mean["name"], mean["class"]) == ("mean", "cenote.pool.basic.mean.MeanPool")
    several = json.loads(runner.invoke(app, ["show", "token pooling", "--json"]).stdout)
    assert "colbert-token-pooling" in several["systems"]


def test_show_of_words_lists_what_matches() -> None:
    shown = runner.invoke(app, ["show", "token pooling"]).stdout
    assert "systems match" in shown
    assert "colbert-token-pooling" in shown
    assert "simpool" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "simpol"], "did you mean simpool"),
        (["show", "zzzz"], "`cenote list` prints all"),
        (["list", "--room", "cellar"], "no system lives in 'cellar'"),
    ],
)
def test_wrong_names_end_in_one_message_and_exit_code_2(cenote: Run, arguments: list[str], message: str) -> None:
    code, _, err = cenote(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
