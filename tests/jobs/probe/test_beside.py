import dataclasses
import html
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.jobs.probe.conftest import make_dataset

from cenote.core import InputError
from cenote.features import TokenDataset
from cenote.jobs.probe import Comparison, Recipe, beside, compare
from cenote.jobs.probe.tested import load
from cenote.report import write_beside

QUICK = Recipe(epochs=3, learning_rates=(1e-2,), patience=3)
DATA = make_dataset(classes=2)


def _noisier(data: TokenDataset) -> TokenDataset:
    """The same items through a worse backbone."""
    assert isinstance(data.x, torch.Tensor)
    noise = torch.randn(data.x.shape, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(data, name="worse", x=0.05 * data.x + noise)


def _run(data: TokenDataset, out: Path, methods: str = "mean,max", **more: object) -> Path:
    compare(data, methods, seeds=2, recipe=QUICK, references=False, out=out, **{"folds": 1, **more})  # type: ignore[arg-type]
    return out


def _order(data: TokenDataset, order: torch.Tensor) -> TokenDataset:
    assert isinstance(data.x, torch.Tensor)
    ids = tuple(data.ids[i] for i in order.tolist())
    return dataclasses.replace(data, x=data.x[order], y=data.y[order], ids=ids, split=data.split[order])


def test_what_was_tested_comes_back(tmp_path: Path) -> None:
    out = _run(DATA, tmp_path / "out")
    found = load(out, Comparison.load(out))
    tested = DATA.indices("test").tolist()
    assert list(found.units.names) == [DATA.ids[i] for i in tested]
    np.testing.assert_array_equal(found.truth, DATA.y[tested].numpy())
    assert {name: s.shape[:2] for name, s in found.scores.items()} == {"mean": (2, 30), "max": (2, 30)}


def test_runs_on_the_same_items_are_paired_in_any_order(tmp_path: Path) -> None:
    data = make_dataset(300, classes=2)
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))
    first, second = _run(data, tmp_path / "good"), _run(_order(_noisier(data), shuffled), tmp_path / "bad")
    found = beside(first, second)
    assert found.apart == ""
    a, b = Comparison.load(first), Comparison.load(second)
    test = found.test_of("mean")
    assert test is not None
    assert test.difference == pytest.approx(b["mean"].metric - a["mean"].metric)
    assert test.interval[1] < 0
    assert f"{a.winner} of good beats {b.winner} of bad by" in found.sentence
    # the same run is no better than itself
    same = beside(first, first)
    assert all(t.difference == 0 and t.p_adjusted == 1 for t in same.tests)
    assert "is not significant (p 1)" in same.sentence
    page = html.unescape(_page(first, second, tmp_path))
    assert found.sentence in page
    assert "paired over the same test items" in page
    assert "Not paired" not in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


def _page(first: Path, second: Path, tmp_path: Path) -> str:
    write_beside(first, second, tmp_path / "both.html")
    return (tmp_path / "both.html").read_text()


def test_folds_are_paired_where_they_are_the_same(tmp_path: Path) -> None:
    made = dataclasses.replace(DATA, split_seed=0)
    other = dataclasses.replace(_noisier(DATA), split_seed=0)
    first, second = _run(made, tmp_path / "a", folds=3), _run(other, tmp_path / "b", folds=3)
    found = beside(first, second)
    assert found.apart == ""
    test = found.test_of("max")
    assert test is not None
    a, b = Comparison.load(first), Comparison.load(second)
    assert test.difference == pytest.approx(b["max"].metric - a["max"].metric)
    third = _run(other, tmp_path / "c", folds=4)
    assert "the same items in other folds" in beside(first, third).apart


def test_what_cannot_be_paired_is_said(tmp_path: Path) -> None:
    out = _run(DATA, tmp_path / "out")
    fewer = _run(make_dataset(60, classes=2), tmp_path / "fewer")
    found = beside(out, fewer)
    assert "they tested other items: 30 and 20, of which" in found.apart
    assert found.tests == ()
    assert "no test says whether the difference could be chance" in found.sentence
    assert "Not paired:" in _page(out, fewer, tmp_path)
    item = int(DATA.indices("test")[3])
    flipped = dataclasses.replace(DATA, y=torch.where(torch.arange(90) == item, 1 - DATA.y, DATA.y))
    labels = beside(out, _run(flipped, tmp_path / "labels")).apart
    assert labels == f"1 of the items that both tested have other labels, 'item{item}' first"
    three = _run(make_dataset(), tmp_path / "three", metric="accuracy")
    assert (
        beside(_run(DATA, tmp_path / "two", metric="accuracy"), three).apart
        == "their classes, labels or targets are others"
    )
    judged = beside(out, _run(DATA, tmp_path / "judged", metric="accuracy"))
    assert judged.apart == "they are judged by AUROC and by accuracy"
    assert judged.sentence.endswith("no difference.")


def test_old_runs_and_scores_of_others_are_told(tmp_path: Path) -> None:
    out, old = _run(DATA, tmp_path / "out"), _run(DATA, tmp_path / "old")
    (old / "tested.safetensors").unlink()
    assert "does not say which items it tested" in beside(out, old).apart
    mixed = _run(DATA, tmp_path / "mixed")
    kept = (mixed / "cells" / "max.safetensors").read_bytes()
    _run(_noisier(DATA), mixed)
    (mixed / "cells" / "max.safetensors").write_bytes(kept)
    assert "the scores of max are of another run" in beside(out, mixed).apart
    with pytest.raises(InputError, match="holds no comparison of probes"):
        beside(out, tmp_path)
    with pytest.raises(InputError, match="is a folder; name a file"):
        write_beside(out, out, tmp_path)


def test_the_command_lays_two_runs_side_by_side(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cenote.cli.app import app

    out = _run(DATA, tmp_path / "out")
    page = tmp_path / "both.html"
    asked = CliRunner().invoke(
        app, ["report", str(out), str(out), "--out", str(page), "--json"], catch_exceptions=False
    )
    assert asked.exit_code == 0
    assert '"not_paired": ""' in asked.stdout
    assert page.is_file()
    assert "leave it out" in str(CliRunner().invoke(app, ["report", str(out), "--out", str(page)]).exception)
    assert "expected one or two folders" in str(CliRunner().invoke(app, ["report", *[str(out)] * 3]).exception)
