"""Pools of one's own, beside those of the catalog."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.jobs.probe.conftest import make_dataset

import cenote
from cenote.core import files
from cenote.core.json_text import json_text
from cenote.jobs.probe import compare, load
from cenote.jobs.probe.recipe import Recipe

QUICK = Recipe(epochs=4, learning_rates=(1e-2,), patience=4)
MODULE = """
import torch
from torch import nn
from cenote.pool import Pool, Pooled


class Norms(Pool):
    \"\"\"Tokens weigh by their norms.\"\"\"

    def __init__(self, dim, power=1.0):
        super().__init__(dim)
        self.power = nn.Parameter(torch.tensor(power))

    def pool(self, tokens):
        weights = tokens.softmax(tokens.values.norm(dim=-1, keepdim=True) * self.power)
        return Pooled(tokens.weighted_sum(weights).squeeze(1), weights)


class Leaks(Pool):
    \"\"\"Reads its batch mates.\"\"\"

    def pool(self, tokens):
        mean = tokens.mean()
        return Pooled(mean - mean.mean(0), None)


class Plain(nn.Module):
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mypackage.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    return tmp_path


def test_a_pool_of_ones_own_is_compared_saved_and_loaded(module: Path) -> None:
    data = make_dataset(classes=2)
    found = compare(data, ["mean", "mypackage.Norms"], seeds=1, recipe=QUICK, references=False, out=module / "out")
    assert {r.method for r in found.results} == {"mean", "mypackage.Norms"}
    assert found["mypackage.Norms"].summary == "Tokens weigh by their norms."
    again = compare(data, [sys.modules["mypackage"].Norms], seeds=1, recipe=QUICK, references=False, out=module / "out")
    assert again["mypackage.Norms"].metric == found["mypackage.Norms"].metric


def test_a_saved_pool_of_ones_own_runs_only_where_its_module_is_imported(module: Path) -> None:
    import mypackage  # type: ignore[import-not-found]

    assert cenote.create("mypackage.Norms", dim=4).out_dim == 4
    del sys.modules["mypackage"]
    with pytest.raises(cenote.InputError, match="the module mypackage is not imported; import it first"):
        cenote.create("mypackage.Norms", dim=4)
    assert mypackage.Norms


def test_a_changed_class_is_measured_again(module: Path) -> None:
    data = make_dataset(classes=2)
    first = compare(data, "mypackage.Norms", seeds=1, recipe=QUICK, references=False, out=module / "out")
    (module / "mypackage.py").write_text(MODULE.replace("* self.power)", "* self.power * 9)"))
    code = (
        "from tests.jobs.probe.test_own_pools import *; "
        "found = compare(make_dataset(classes=2), 'mypackage.Norms', seeds=1, recipe=QUICK, references=False, out='out'); "
        "print(found['mypackage.Norms'].train_loss[0][-1])"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        cwd=module,
        env={"PYTHONPATH": ":".join([str(module), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(again.stdout.split()[-1]) != first["mypackage.Norms"].train_loss[0][-1]


def test_a_pool_that_breaks_its_contract_is_left_out_with_the_reason(module: Path) -> None:
    found = compare(make_dataset(classes=2), ["mypackage.Leaks"], seeds=1, recipe=QUICK, references=False)
    assert "batch mates" in found.skipped["mypackage.Leaks"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("mypackag.Norms", r"mypackag.Norms: the module mypackag cannot be imported \(ModuleNotFoundError"),
        ("mypackage.Norm", "there is no class Norm in mypackage"),
        ("mypackage.Plain", "mypackage.Plain: derives from no base of a room, such as Pool"),
        ([lambda dim: dim], "methods: expected names or classes, which can be built anew for every seed"),
        ([cenote.create("mean", dim=4)], "methods: expected names or classes"),
    ],
)
def test_what_cannot_be_compared_is_told(module: Path, wanted: object, message: str) -> None:
    with pytest.raises(cenote.InputError, match=message):
        compare(make_dataset(classes=2), wanted, seeds=1, recipe=QUICK)  # type: ignore[arg-type]


def test_a_saved_probe_does_not_decide_which_code_runs(module: Path) -> None:
    compare(make_dataset(classes=2), "mean", seeds=1, recipe=QUICK, references=False, out=module / "out")
    place = module / "out" / "best" / "probe.json"
    card = {k: v for k, v in files.read_json(place).items() if k != files.DIGEST} | {"method": "mypackage.Norms"}
    place.write_text(json_text(files.sealed(card)))
    with pytest.raises(cenote.InputError, match="the module mypackage is not imported"):
        load(module / "out" / "best")
    assert "mypackage" not in sys.modules


def test_the_commands_find_a_module_of_this_folder(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from cenote.cli.app import app

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 9, 4)).astype("float32"), np.arange(90) % 2
    # one long token carries the label
    x[np.arange(90), rng.integers(0, 9, 90)] = 9 * np.where(y[:, None], 1, -1) * np.array([1, 1, -1, 0])
    x -= x.mean(1, keepdims=True)
    np.savez(module / "long.npz", x=x, y=y)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(module)])
    monkeypatch.chdir(module)
    trained = ["probe", "long.npz", "--methods", "mypackage.Norms", "--seeds", "1", "--folds", "1", "--out", "out"]
    assert CliRunner().invoke(app, trained, catch_exceptions=False).exit_code == 0
    assert "mypackage" in (module / "out" / "best" / "probe.json").read_text()
    monkeypatch.delitem(sys.modules, "mypackage")
    asked = ["predict", "out/best", "long.npz"]
    assert "cenote predict --own mypackage" in str(CliRunner().invoke(app, asked).exception)
    assert CliRunner().invoke(app, [*asked, "--own", "mypackage"], catch_exceptions=False).exit_code == 0
