import dataclasses
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cenote.study.harness.runner as runner
from cenote import InputError
from cenote.catalog import systems
from cenote.cli.app import app
from cenote.cli.study import parse_rows
from cenote.study.harness import UNDECIDED, Size, Verdict, above
from cenote.study.harness.pages import EARLIER, NOT_KNOWN, scoreboard

CALLS: list[tuple[str, int, str]] = []
WITHOUT = next(s.slug for s in systems() if s.study is None)


def _fake(slug: str):
    def run(seed: int, size: Size) -> Verdict:
        CALLS.append((slug, seed, size))
        if slug == "ggem":
            raise RuntimeError("out of memory")
        check = above("a difference", [0.2, 0.21, 0.22], expected=0.1)
        return Verdict(
            slug=slug,
            claim=f"claim of {slug} | with a bar",
            rule="Refuted if not.",
            holds=check.holds,
            effect=check.effect,
            interval=check.interval,
            seeds=(seed, seed + 1, seed + 2),
            checks=(check,),
            table=[{"arm": "ours", "mean": 0.21, "per seed": [0.2, 0.21, 0.22]}],
            figure=lambda figure: figure.subplots().plot([1, 2]),
            size=size,
            seconds=1.0,
            provenance={"source": f"code of {slug}"},
        )

    return run


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    CALLS.clear()
    monkeypatch.setattr(runner, "study_of", _fake)
    monkeypatch.setattr(
        runner, "source_digest", lambda module: f"code of {module.__name__.rpartition('.')[2].replace('_', '-')}"
    )
    return CALLS


def test_all_keeps_what_is_finished(fakes: list[tuple[str, int, str]], tmp_path: Path) -> None:
    first = runner.run_all(tmp_path, "small", rows=[7, 17, 28])
    assert first.ran == ("simpool", "set-transformer")
    assert first.failed == {"ggem": "RuntimeError: out of memory"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{slug}.{kind}" for slug in first.ran for kind in ("json", "md", "svg")
    )
    again = runner.run_all(tmp_path, "small", rows=[7, 17, 28])
    assert again.kept == first.ran
    assert [c[0] for c in fakes].count("simpool") == 1
    assert [c[0] for c in fakes].count("ggem") == 2
    # another seed, another size, or being told to: run again
    assert runner.run_all(tmp_path, "small", seed=9, rows=[7]).ran == ("simpool",)
    assert runner.run_all(tmp_path, "full", seed=9, rows=[7]).ran == ("simpool",)
    assert runner.run_all(tmp_path, "full", seed=9, rows=[7], fresh=True).ran == ("simpool",)


@pytest.mark.parametrize(("provenance", "mark"), [({"source": "other code"}, EARLIER), ({"cenote": "0.1"}, NOT_KNOWN)])
def test_what_earlier_code_measured_is_run_again_and_marked_until_then(
    provenance: dict[str, str], mark: str, fakes: list[tuple[str, int, str]], tmp_path: Path
) -> None:
    for slug in ("simpool", "set-transformer", "ggem"):
        runner.write(dataclasses.replace(_fake("simpool")(0, "small"), slug=slug, provenance=provenance), tmp_path)
    assert mark not in (tmp_path / "set-transformer.md").read_text()
    fakes.clear()
    # ggem fails: its old result stays, and says that it is old
    walk = runner.run_all(tmp_path, "small", rows=[7, 17])
    assert (walk.ran, walk.kept, set(walk.failed)) == (("simpool",), (), {"ggem"})
    assert set(walk.earlier) == {"ggem", "set-transformer"}
    kept = runner.read(tmp_path)
    for slug, verdict in kept.items():
        written = (tmp_path / f"{slug}.md").read_text()
        # nobody says that code has changed which is not known
        assert ("has changed since." in written) == (slug != "simpool" and mark == EARLIER), slug
        assert (mark in written) == (slug != "simpool") == (not runner.is_current(verdict)), slug
    board = scoreboard(kept, "studies", walk.earlier)
    marked = next(line for line in board.splitlines() if line.startswith(mark))
    assert re.findall(r"[\w-]+", marked.rpartition(":")[2]) == ["ggem", "set-transformer"]
    assert scoreboard(kept, "studies") == board.replace(f"\n{marked}\n", "")


def test_half_a_result_is_not_a_result(fakes: list[tuple[str, int, str]], tmp_path: Path) -> None:
    runner.run_all(tmp_path, "small", rows=[7])
    (tmp_path / "simpool.json").unlink()
    assert runner.run_all(tmp_path, "small", rows=[7]).ran == ("simpool",)


def test_broken_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "simpool.json").write_text('{"slug": "simpool"}')
    with pytest.raises(InputError, match=r"simpool\.json: is not a result .* delete it"):
        runner.read(tmp_path)


def test_same_result_same_picture(tmp_path: Path) -> None:
    verdict = _fake("simpool")(0, "small")
    runner.write(verdict, tmp_path / "a")
    runner.write(verdict, tmp_path / "b")
    assert (tmp_path / "a/simpool.svg").read_bytes() == (tmp_path / "b/simpool.svg").read_bytes()


def test_cli_writes_the_scoreboard(fakes: list[tuple[str, int, str]], tmp_path: Path) -> None:
    out = tmp_path / "docs" / "studies"
    done = CliRunner().invoke(app, ["study", "--all", "--rows", "7,28", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "2 run, 0 kept, 0 failed" in done.output
    board = (tmp_path / "docs" / "scoreboard.md").read_text()
    assert "Of 2 studies, 2 hold, 0 do not hold, 0 are not decidable" in board
    assert "[simpool](studies/simpool.md)" in board
    assert r"claim of simpool \| with a bar" in board
    waiting = next(line for line in board.splitlines() if line.startswith("Not run yet: "))
    assert {"adaptive-noise-pooling", "efficient-probing", "ggem", "attsets"} <= set(re.findall(r"[\w-]+", waiting))
    assert "simpool" not in waiting
    # rows of a second walk join those of the first
    CliRunner().invoke(app, ["study", "--all", "--rows", "16", "--out", str(out)])
    assert "Of 3 studies, 3 hold" in (tmp_path / "docs" / "scoreboard.md").read_text()


def test_cli_reports_a_failed_study_and_goes_on(fakes: list[tuple[str, int, str]], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["study", "--all", "--rows", "16-17,23", "--out", str(tmp_path / "studies")])
    assert done.exit_code == 1
    assert "2 run, 0 kept, 1 failed" in done.output
    assert "ggem: RuntimeError: out of memory" in done.output


def test_cli_runs_one_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "study_of", _fake)
    done = CliRunner().invoke(app, ["study", "simpool", "--seed", "5", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "simpool: holds" in done.output
    assert runner.read(tmp_path)["simpool"].seeds == (5, 6, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simpol"], "'simpol' is no system; did you mean simpool"),
        ([WITHOUT], f"'{WITHOUT}' has no study yet"),
        (["zzzzzzzz"], "is no system; there are: "),
        ([], "give the name of one system, or --all"),
        (["simpool", "--all"], "give the name of one system, or --all"),
        (["simpool", "--size", "large"], "--size: expected one of smoke, small, full, got 'large'"),
        (["simpool", "--rows", "7"], "belong to --all"),
        (["--all", "--rows", "7;9"], "--rows: expected numbers and ranges"),
        (["--all", "--rows", "500"], "no study belongs to [500]; rows with a study: "),
    ],
)
def test_cli_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import cenote.cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cenote", "study", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cenote.cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_rows() -> None:
    assert parse_rows("7,9, 16-18") == [7, 9, 16, 17, 18]
    for wrong in ("", "a", "1-", "-3", "1-b"):
        with pytest.raises(InputError, match="--rows"):
            parse_rows(wrong)


def test_undecided_is_counted(tmp_path: Path) -> None:
    verdict = dataclasses.replace(_fake("simpool")(0, "small"), holds=UNDECIDED, seconds=120.0)
    board = scoreboard({"simpool": verdict}, "studies")
    assert "0 hold, 0 do not hold, 1 are not decidable at this scale" in board
    assert "Together they took 2 CPU minutes." in board
