"""Pools of one's own, beside those of the catalog."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.jobs.probe.conftest import make_dataset
from torch import nn

import cenote
from cenote.core import files
from cenote.core.json_text import json_text
from cenote.jobs.probe import compare, load
from cenote.jobs.probe.own import described
from cenote.jobs.probe.recipe import Recipe
from cenote.pool import MaxPool, SimPool

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
        ([lambda dim: dim], "methods: expected names, classes, pools"),
        ([("a,b", lambda dim: dim)], "a name has neither comma nor @"),
        ([("mine", lambda dim: dim)], "mine: its function returned int, expected a pool"),
        ([("mine", lambda dim: dim / 0)], "mine: its function raised ZeroDivisionError for tokens of width 8"),
        ([("mine", lambda dim: nn.Linear(dim, dim))], "mine: derives from no base of a room"),
        ([("max", MaxPool(8)), "max"], "methods: max names several"),
        ([MaxPool(8), MaxPool(8)], "methods: MaxPool names several"),
    ],
)
def test_what_cannot_be_compared_is_told(module: Path, wanted: object, message: str) -> None:
    with pytest.raises(cenote.InputError, match=message):
        compare(make_dataset(classes=2), wanted, seeds=1, recipe=QUICK)  # type: ignore[arg-type]


def test_pools_that_are_there_and_functions_are_compared(module: Path) -> None:
    import mypackage

    data, mine = make_dataset(classes=2), mypackage.Norms(8, power=2.0)
    wanted = ["mean", mine, ("half", lambda dim: mypackage.Norms(dim, power=0.5)), ("leaks", mypackage.Leaks(8))]
    arguments = {"seeds": 2, "recipe": QUICK, "references": False}
    found = compare(data, wanted, out=module / "out", **arguments)
    assert {r.method for r in found.results} == {"mean", "Norms", "half"}
    assert found["Norms"].summary == "Tokens weigh by their norms. (mypackage.Norms, a pool of your own)"
    assert found["half"].summary.endswith("(mypackage.Norms, built by a function of your own)")
    assert "batch mates" in found.skipped["leaks"]
    assert "a pool of your own" in cenote.report.render(found)
    # what was given is left as it was, and is no other arm than the class with the same argument
    assert mine.power.item() == 2.0
    named = compare(data, [("half", mypackage.Norms(8, power=0.5))], **arguments)
    assert named["half"].metric_per_seed == found["half"].metric_per_seed
    # the same again is found again, another pool is not
    stamp = (module / "out" / "cells" / "Norms.safetensors").stat().st_mtime_ns
    compare(data, wanted, out=module / "out", **arguments)
    assert (module / "out" / "cells" / "Norms.safetensors").stat().st_mtime_ns == stamp
    compare(data, [mypackage.Norms(8, power=3.0)], out=module / "out", **arguments)
    assert (module / "out" / "cells" / "Norms.safetensors").stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    ("pool", "why"),
    [
        (MaxPool(4), "takes tokens of width 4, and these have 8"),
        (cenote.create("abmilp-positions", dim=8, tokens=4), "was built for 4 tokens, and these data have 6"),
        (cenote.create("cls", dim=8), "reads [CLS], and these data have no prefix tokens"),
        (cenote.create("weighted-layer-sum", dim=8, layers=3), "pools several layers, and the data hold one"),
    ],
)
def test_a_pool_built_for_other_data_is_left_out_with_the_reason(pool: nn.Module, why: str) -> None:
    found = compare(make_dataset(classes=2), [pool], seeds=1, recipe=QUICK, references=False)
    assert why in found.skipped[type(pool).__name__]


def _won(module: Path, pool: object) -> tuple[cenote.jobs.probe.Comparison, Path]:
    """A comparison that such a pool wins, and where its probe lies."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 6, 4)).astype("float32"), np.arange(90) % 2
    # one long token carries the label
    x[np.arange(90), rng.integers(0, 6, 90)] = 9 * np.where(y[:, None], 1, -1) * np.array([1, 1, -1, 0])
    x -= x.mean(1, keepdims=True)
    data = cenote.Dataset.from_arrays(x, y)
    found = compare(data, [pool], seeds=1, folds=1, recipe=QUICK, references=False, out=module / "out")  # type: ignore[list-item]
    assert found.winner == "mine"
    return found, module / "out" / "best"


def test_a_winner_is_rebuilt_from_its_class_and_attributes(module: Path) -> None:
    import mypackage

    found, best = _won(module, ("mine", mypackage.Norms(4, 0.5)))
    assert not any("weights alone" in told for told in found.cautions)
    saved = load(best)
    assert (saved.method, type(saved.probe.pool)) == ("mypackage.Norms", mypackage.Norms)
    # weights are those that were trained
    assert saved.probe.pool.power.item() not in (0.5, 1.0)


def test_a_winner_that_its_class_and_attributes_do_not_rebuild_is_told(module: Path) -> None:
    (module / "mypackage.py").write_text(
        MODULE.replace("self.power = nn", "self.start = power\n        self.power = nn")
    )
    import mypackage

    # nothing says what `start` was
    found, best = _won(module, ("mine", mypackage.Norms(4, 0.5)))
    assert "mypackage.Norms built from {} is another pool than mine" in found.cautions[-1]
    with pytest.raises(cenote.InputError, match=r"build the pool yourself, and load it with cenote\.load"):
        load(best)
    x = torch.randn(3, 6, 4)
    by_hand = load(best, mypackage.Norms(4, 0.5))
    assert by_hand.scores(x).shape == (3, 2)
    with pytest.raises(cenote.InputError, match=r"does not fit probe\.json"):
        load(best, cenote.create("abmil", dim=4))


def test_a_winner_of_the_catalog_s_classes_is_rebuilt_by_name(module: Path) -> None:
    found, best = _won(module, ("mine", lambda dim: cenote.create("gem", dim=dim)))
    assert not any("weights alone" in told for told in found.cautions)
    saved = load(best)
    assert saved.method == "gem"


def test_a_winner_of_a_class_inside_of_a_function_is_told(module: Path) -> None:
    class Inner(cenote.create("gem", dim=4).__class__):  # type: ignore[misc]
        """A class that is found nowhere."""

    found, best = _won(module, ("mine", Inner(4)))
    assert "stands inside of another one or of a function" in found.cautions[-1]
    assert f"cenote.load('{best}', pool=...)" in found.cautions[-1]
    assert load(best, Inner(4)).dim == 4


def test_equal_pools_are_described_alike_and_others_are_not() -> None:
    torch.manual_seed(0)
    first = SimPool(8)
    torch.manual_seed(0)
    assert described(first) == described(SimPool(8))
    torch.manual_seed(1)
    assert described(first) != described(SimPool(8))
    with_function = MaxPool(8)
    with_function.score = lambda x: x  # type: ignore[assignment]
    assert described(with_function) != described(with_function)


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
