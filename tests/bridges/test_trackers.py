"""Trackers, by stand-ins for their clients that keep what they are told."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.jobs.probe.conftest import make_dataset

from cenote.bridges.trackers import curves, numbers, require_trackers, settings, track
from cenote.core import InputError
from cenote.jobs.probe import Comparison, Recipe, compare

Fake = Callable[..., ModuleType]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    recipe = Recipe(epochs=3, learning_rates=(1e-2,), patience=3)
    compare(make_dataset(), "mean,max", seeds=2, folds=1, recipe=recipe, references=True, out=folder)
    return folder


@pytest.fixture
def found(out: Path) -> Comparison:
    return Comparison.load(out)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A module of that name with these members."""

    def make(name: str, **members: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def test_what_is_logged_is_flat_and_finite(found: Comparison) -> None:
    told = settings(found)
    assert told["data.name"] == "toy"
    assert told["recipe.epochs"] == 3
    assert all(isinstance(v, str | int | float | None) for v in told.values())
    measured = numbers(found)
    assert measured["max/metric"] == found["max"].metric
    assert measured["max/latency_ms"] == found["max"].latency_ms
    assert "knn/latency_ms" not in measured
    points = list(curves(found))
    assert ("mean/train_loss/1", 2, found["mean"].train_loss[1][2]) in points
    assert {p.name for p in points} == {
        f"{m}/{c}/{s}" for m in ("mean", "max") for c in ("train_loss", "validation_curve") for s in (0, 1)
    }


class Run:
    """What a run of Weights & Biases is told."""

    url = "https://wandb.example/run"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False

    def log(self, told: dict[str, Any]) -> None:
        self.logged.append(told)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_settings_curves_and_table(out: Path, found: Comparison, fake: Fake) -> None:
    run, began = Run(), {}
    fake("wandb", init=lambda **told: began.update(told) or run, Table=lambda columns, data: (columns, data))
    assert track(found, "wandb", out) == run.url
    assert (began["project"], began["name"], began["config"]["metric"]) == ("cenote", "first", "accuracy")
    assert [told["epoch"] for told in run.logged[:-1]] == [0, 1, 2]
    assert run.logged[1]["max/train_loss/0"] == found["max"].train_loss[0][1]
    columns, data = run.logged[-1]["leaderboard"]
    assert [row[columns.index("method")] for row in data] == [r.method for r in found.results]
    assert run.summary["sentence"] == found.sentence
    assert run.finished


def test_mlflow_gets_parameters_metrics_and_files(out: Path, found: Comparison, fake: Fake) -> None:
    told: dict[str, Any] = {"files": [], "steps": []}

    class Started:
        info = SimpleNamespace(run_id="7")

        def __enter__(self) -> "Started":
            return self

        def __exit__(self, *_: object) -> None:
            told["ended"] = True

    fake(
        "mlflow",
        set_experiment=lambda name: told.update(experiment=name),
        start_run=lambda run_name: told.update(name=run_name) or Started(),
        log_params=lambda params: told.update(params=params),
        log_metrics=lambda metrics: told.update(metrics=metrics),
        log_metric=lambda name, value, step: told["steps"].append((name, value, step)),
        set_tags=lambda tags: told.update(tags=tags),
        log_artifact=lambda path: told["files"].append(Path(path).name),
        get_tracking_uri=lambda: "file:./mlruns",
    )
    assert track(found, "mlflow", out, "mine") == "file:./mlruns, run 7"
    assert (told["experiment"], told["name"], told["ended"]) == ("cenote", "mine", True)
    assert max(map(len, told["params"].values())) <= 500
    assert told["metrics"]["mean/metric"] == found["mean"].metric
    assert ("mean/validation_curve/0", found["mean"].validation_curve[0][0], 0) in told["steps"]
    assert told["tags"]["winner"] == found.winner
    assert "comparison.json" in told["files"]


def test_tensorboard_s_events_lie_beside_the_results(out: Path, found: Comparison, fake: Fake) -> None:
    scalars: list[tuple[str, float, int]] = []
    texts: dict[str, str] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def __enter__(self) -> "SummaryWriter":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def add_text(self, name: str, text: str) -> None:
            texts[name] = text

    fake("tensorboard")
    fake("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    assert track(found, "tensorboard", out) == str(out / "tensorboard" / "first")
    assert ("max/train_loss/1", found["max"].train_loss[1][0], 0) in scalars
    assert ("max/metric", found["max"].metric, 0) in scalars
    assert texts["sentence"] == found.sentence
    assert "    recipe.epochs: 3" in texts["settings"]


def test_what_a_client_raises_is_told_with_what_is_kept(out: Path, found: Comparison, fake: Fake) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("no route to host")

    fake("wandb", init=init)
    with pytest.raises(InputError, match=r"wandb failed \(ConnectionError: no route to host\); the results are in"):
        track(found, "wandb", out)


def test_a_tracker_that_is_not_there_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"track: mlflow cannot be imported .*; pip install mlflow"):
        require_trackers(["mlflow"])


def test_the_command_logs_and_writes_json_lines(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from typer.testing import CliRunner

    from cenote.cli.app import app

    run = Run()
    fake("wandb", init=lambda **_: run, Table=lambda columns, data: (columns, data))
    data = make_dataset(classes=2)
    np.savez(tmp_path / "toy.npz", x=np.asarray(data.x), y=np.asarray(data.y))
    command = [
        "probe",
        str(tmp_path / "toy.npz"),
        "--methods",
        "mean,max",
        "--seeds",
        "1",
        "--epochs",
        "2",
        "--folds",
        "1",
    ]
    command += ["--out", str(tmp_path / "out"), "--no-references"]
    lines = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, [*command, "--track", "wandb", "--json-lines", str(lines)], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"wandb: {run.url}" in done.output
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    found = Comparison.load(tmp_path / "out")
    assert [row["method"] for row in rows] == [r.method for r in found.results]
    assert {row["metric_name"] for row in rows} == {"AUROC"}
    assert rows[0]["metric"] == found.results[0].metric
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused = CliRunner().invoke(app, [*command[:-1], "--out", str(tmp_path / "other"), "--track", "wandb"])
    assert "wandb cannot be imported" in str(refused.exception)
    assert not (tmp_path / "other").exists()
