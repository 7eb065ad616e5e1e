import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cenote.cli.probe import table_of
from cenote.jobs.probe import Comparison
from tests import tiny
from tests.cli.program import Run

QUICK = ["--methods", "mean,abmil", "--seeds", "1", "--epochs", "3", "--folds", "1"]


@pytest.fixture
def bags(tmp_path: Path) -> Path:
    """A folder of .npy bags with labels.csv."""
    folder = tmp_path / "bags"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [("id", "label", "patient")]
    for i in range(60):
        x = rng.normal(size=(int(rng.integers(2, 9)), 6)).astype(np.float32)
        x[0, 0] += 4 * (i % 2)
        np.save(folder / f"slide{i}.npy", x)
        rows.append((f"slide{i}", "tumour" if i % 2 else "normal", f"p{i // 4}"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_probe_then_predict_then_report(cenote: Run, bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = cenote("probe", bags, *QUICK, "--group", "patient", "--out", out)
    assert code == 0
    assert "60 items" in text
    assert "abmil" in text
    assert (out / "report.html").stat().st_size > 1000
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["dataset"]["groups"] == 15

    # the finished cells again, for a machine: JSON and nothing else on standard output
    code, text, said = cenote("probe", bags, *QUICK, "--group", "patient", "--out", out, "--json")
    found = json.loads(text)
    assert code == 0
    assert "60 items" in said
    assert found.pop("report") == str(out / "report.html")
    assert found["results"] == comparison["results"]
    code, text, said = cenote("report", out, "--json")
    assert (code, json.loads(text)) == (0, {"report": str(out / "report.html")})
    assert "report.html" in said

    predictions = tmp_path / "p.csv"
    code, text, said = cenote("predict", out / "best", bags, "--out", predictions, "--json")
    assert code == 0
    assert "60 predictions" in said
    told = json.loads(text)
    assert told["out"] == str(predictions)
    with predictions.open() as file:
        assert [p["prediction"] for p in told["predictions"]] == [r["prediction"] for r in csv.DictReader(file)]
    assert all(p["scores"].keys() == {"normal", "tumour"} for p in told["predictions"])
    assert "60 predictions" in cenote("predict", out / "best", bags, "--out", predictions)[1]
    rows = list(csv.DictReader(predictions.read_text().splitlines()))
    assert len(rows) == 60
    assert {r["prediction"] for r in rows} <= {"tumour", "normal"}
    for row in rows:
        assert float(row["score normal"]) + float(row["score tumour"]) == pytest.approx(1, abs=1e-4)
        looked = [int(n) for n in row["tokens looked at"].split()]
        assert looked
        assert max(looked) < len(np.load(bags / f"{row['id']}.npy"))

    (out / "report.html").unlink()
    assert cenote("report", out)[0] == 0
    assert (out / "report.html").exists()


def test_predict_takes_raw_data_where_the_probe_came_from_raw_data(cenote: Run, tmp_path: Path) -> None:
    model, table = tiny.bert(tmp_path / "bert"), tmp_path / "texts.tsv"
    lines = [f"{'a b' if i % 2 else 'c d'} {'efghijkl'[i % 8]}\t{'ab'[i % 2]}" for i in range(40)]
    table.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    out, new = tmp_path / "out", tmp_path / "new.tsv"
    command = ["--backbone", model, "--methods", "mean", *QUICK[2:], "--layers", "1", "--no-references"]
    assert cenote("probe", table, *command, "--out", out)[0] == 0
    new.write_text("text\na b\nc d\n")
    code, text, said = cenote("predict", out / "best", new, "--out", tmp_path / "p.csv", "--json")
    assert code == 0, said
    assert [p["id"] for p in json.loads(text)["predictions"]] == ["0", "1"]
    code, text, _ = cenote("embed", out / "best", new, "--out", tmp_path / "v.parquet", "--json")
    told = json.loads(text)
    assert (code, told["items"], told["width"], told["layers"]) == (0, 2, 32, [1])
    assert told["model"]["name"] == str(model)
    code, _, err = cenote("embed", out / "best", new, "--out", tmp_path / "v.csv")
    assert code == 2
    assert "ends in .parquet or .npy" in err
    # a store of the last layer alone: how to make one of the layer that is read, or to go on
    assert cenote("extract", new, "--backbone", model, "--out", tmp_path / "last")[0] == 0
    code, _, err = cenote("predict", out / "best", tmp_path / "last", "--out", tmp_path / "p.csv")
    assert code == 2
    assert f"cenote extract --backbone {model} --layers 1" in err
    assert cenote("predict", out / "best", tmp_path / "last", "--out", tmp_path / "p.csv", "--force")[0] == 0
    code, _, err = cenote("predict", out / "best", tmp_path / "last", "--out", tmp_path / "p.csv", "--limit", "1")
    assert code == 2
    assert "limit: " in err


def test_errors_name_flags_as_they_are_typed(cenote: Run, bags: Path, tmp_path: Path) -> None:
    for flag in ("--label", "--group"):
        code, _, err = cenote("probe", bags, flag, "stage", "--out", tmp_path / "out")
        assert code == 2
        assert err.startswith(f"error: {flag}: there is no column 'stage'")


def test_labels_of_tokens_are_found_by_weights(cenote: Run, bags: Path, tmp_path: Path) -> None:
    (bags / "token_labels").mkdir()
    for i in range(1, 60, 2):
        np.save(bags / "token_labels" / f"slide{i}.npy", np.arange(len(np.load(bags / f"slide{i}.npy"))) == 0)
    code, text, _ = cenote("probe", bags, "--methods", "mean,max", *QUICK[2:], "--out", tmp_path / "out")
    assert code == 0
    assert "token labels: 30 tokens matter, in 30 of 60 items" in text
    assert "weights find the labelled tokens (AUROC within items): max 0." in text
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["localisation"]
    assert found["mean"] == 0.5
    assert found["max"] > 0.5
    assert 'id="localisation"' in (tmp_path / "out" / "report.html").read_text()


def test_cautions_references_and_what_to_use_are_told(cenote: Run, bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = cenote("probe", bags, *QUICK, "--out", out)
    assert code == 0
    assert "caution: column 'patient' holds 15 values for 60 items" in text
    assert "knn †" in text
    found = Comparison.load(out)
    assert f"use {found.recommended}: {found.reason}" in text
    assert f"cenote predict {out / 'recommended'} DATA" in text
    code, _, _ = cenote("predict", out / "recommended", bags, "--out", tmp_path / "p.csv")
    assert code == 0
    code, text, _ = cenote("probe", bags, *QUICK, "--no-references", "--group", "patient", "--out", out)
    assert code == 0
    assert "knn" not in text
    assert "caution: column" not in text
    assert Comparison.load(out).references == ()


def test_running_again_resumes(cenote: Run, bags: Path, tmp_path: Path) -> None:
    cenote("probe", bags, *QUICK, "--out", tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").iterdir()}
    cenote("probe", bags, *QUICK, "--out", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").iterdir()} == stamps


def test_small_data_are_folded_and_that_is_said(cenote: Run, bags: Path, tmp_path: Path) -> None:
    command = ("probe", bags, "--methods", "mean,max", "--seeds", "1", "--epochs", "2", "--group", "patient")
    code, text, _ = cenote(*command, "--out", tmp_path / "out")
    assert code == 0
    told = "a single split would test 12 items, fewer than 200 (--folds 1 forces it)"
    assert f"5 folds of about 12 test items: {told}" in text
    assert "AUROC on 60 items in 5 folds" in text
    assert "p of the corrected resampled t test, adjusted by Holm's method" in text
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["provenance"]["folds_because"] == told
    assert told in (tmp_path / "out" / "report.html").read_text()
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 20
    # the same folder serves one split as well
    code, text, _ = cenote(*command, "--folds", "1", "--out", tmp_path / "out")
    assert "AUROC on 12 test items" in text
    assert "folds" not in text


def test_a_split_column_and_folds_do_not_go_together(cenote: Run, bags: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader((bags / "labels.csv").read_text().splitlines()))
    lines = [f"{r['id']},{r['label']},{('train', 'val', 'test')[i // 2 % 3]}" for i, r in enumerate(rows)]
    (bags / "labels.csv").write_text("\n".join(["id,label,split", *lines]) + "\n")
    code, _, err = cenote("probe", bags, *QUICK[:-2], "--folds", "5", "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("error: folds: the data come with a split of their own")
    assert not (tmp_path / "out").exists()


def _damage(name: str, bags: Path) -> None:
    labels = bags / "labels.csv"
    item = bags / "slide7.npy"
    match name:
        case "dims":
            np.save(item, np.ones((3, 5), np.float32))
        case "missing":
            item.unlink()
        case "nan":
            np.save(item, np.full((3, 6), np.nan, np.float32))
        case "empty":
            np.save(item, np.ones((0, 6), np.float32))
        case "unreadable":
            item.write_bytes(item.read_bytes()[:90])
        case "one class":
            labels.write_text(labels.read_text().replace("tumour", "normal"))
        case "objects":
            np.save(item, np.array([{}], dtype=object), allow_pickle=True)
        case "no labels":
            labels.unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("dims", "slide7"),
        ("missing", "slide7"),
        ("nan", "slide7"),
        ("empty", "slide7"),
        ("unreadable", "slide7"),
        ("objects", "slide7"),
        ("one class", "normal"),
        ("no labels", "labels.csv"),
    ],
)
def test_wrong_files_are_named_with_exit_code_2(
    cenote: Run, bags: Path, tmp_path: Path, damage: str, named: str
) -> None:
    _damage(damage, bags)
    code, out, err = cenote("probe", bags, *QUICK, "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("error: ")
    assert named in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["probe", "/no/such/place"], "/no/such/place"),
        (["probe", "--methods", "simpol"], "did you mean simpool"),
        (["probe", "--metric", "R2"], "'R2' does not fit a multiclass task"),
        (["probe", "--significance", "t-test"], "significance: expected permutation or wilcoxon, got 't-test'"),
        (["probe", "--task", "regression", "--grid", "4by4"], "--grid: expected HEIGHTxWIDTH"),
        (["probe", "--backbone", "a-model"], "name a folder or file of raw images, sounds or texts; digits are tokens"),
        (["predict", "/no/such/best", "digits"], "holds no saved probe"),
        (["report", "/no/such/out"], "/no/such/out"),
        (["show", "simpol-nonsense"], "no system matches"),
        (["study", "simpol"], "simpol"),
    ],
)
def test_wrong_arguments_are_named_with_exit_code_2(
    cenote: Run, tmp_path: Path, arguments: list[str], named: str
) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "probe" else []
    code, _, err = cenote(*arguments, *out)
    assert code == 2
    assert named in " ".join(err.split())


@pytest.mark.parametrize("arguments", [["probe", "--seeds", "0"], ["probe", "--no-such-option"], ["nonsense"]])
def test_usage_errors_exit_with_2(cenote: Run, arguments: list[str]) -> None:
    assert cenote(*arguments)[0] == 2


def test_predicting_tokens_of_another_width_is_named(cenote: Run, bags: Path, tmp_path: Path) -> None:
    cenote("probe", bags, *QUICK, "--out", tmp_path / "out")
    code, _, err = cenote("predict", tmp_path / "out" / "best", "digits", "--out", tmp_path / "p.csv")
    assert code == 2
    assert "width 64" in err
    assert not (tmp_path / "p.csv").exists()


def test_ctrl_c_keeps_what_is_done_and_says_so(bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from cenote.cli import main; main()", "probe", str(bags), "--seeds", "2"]
    command += ["--epochs", "300", "--patience", "300", "--methods", "mean,abmil,simpool,gem", "--out", str(out)]
    command += ["--folds", "1"]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        # whoever starts the tests in the background may have them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 600
    while not (out / "cells" / "mean.safetensors").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=600)
    assert run.returncode == 130
    assert "interrupted: kept" in err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    assert not json.loads((out / "comparison.json").read_text())["complete"]
    assert (out / "report.html").exists()


def test_a_narrow_terminal_gets_a_table_of_fewer_columns(cenote: Run, bags: Path, tmp_path: Path) -> None:
    cenote("probe", bags, "--out", tmp_path / "out", "--methods", "mean,max", *QUICK[2:])
    found = Comparison.load(tmp_path / "out")
    for width, last in ((120, "train s"), (80, "ms/item"), (48, "p adj."), (32, "AUROC")):
        table = table_of(found, width)
        assert [c.header for c in table.columns][-1] == last
        text = io.StringIO()
        Console(width=width, file=text).print(table)
        assert "…" not in text.getvalue()


def test_a_full_disk_behind_the_output_is_told(
    cenote: Run, bags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cenote.cli.probe.say", full)
    code, _, err = cenote("probe", bags, "--out", tmp_path / "out", *QUICK)
    assert (code, err) == (2, "error: the output: No space left on device; make room\n")
