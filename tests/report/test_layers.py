"""The map of layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import cenote.report
from cenote.jobs.probe import Comparison, Recipe, compare
from cenote.report.layers import layer_map
from tests.report.factory import make_comparison
from tests.report.test_page import page

NAMES = [f"{m}@{n}" for m in ("mean", "cls", "simpool") for n in (0, 3, 6) if (m, n) != ("simpool", 0)]


def made(names: list[str] = NAMES, stacks: tuple[str, ...] = ("weighted-layer-sum",)) -> Comparison:
    c = make_comparison([*names, *stacks], baseline="mean@6")

    def read(name: str) -> tuple[int, ...]:
        return (3, 6) if name in stacks else (int(name.partition("@")[2] or 6),)

    return dataclasses.replace(c, results=tuple(dataclasses.replace(r, layers=read(r.method)) for r in c.results))


def test_every_pooling_stands_at_its_layers() -> None:
    c = made()
    drawn = layer_map(c)
    assert drawn is not None
    assert drawn.layers == (0, 3, 6)
    rows = {row.name: row for row in drawn.rows}
    assert set(rows) == {"mean", "cls", "simpool", "weighted-layer-sum"}
    assert rows["simpool"].cells[0] is None
    assert rows["weighted-layer-sum"].whole
    for name in ("mean", "cls", "simpool"):
        cells = [cell for cell in rows[name].cells if cell is not None]
        assert [cell.result.method for cell in cells] == [f"{name}@{n}" for n in (0, 3, 6) if f"{name}@{n}" in NAMES]
        assert sum(cell.best for cell in cells) == 1
        assert max(cells, key=lambda cell: cell.result.metric).best
    shown = {cell.result.method: cell for row in drawn.rows for cell in row.cells if cell is not None}
    assert set(shown) == {r.method for r in c.results}
    assert shown[c.winner].strength == 1
    assert shown[c.results[-1].method].strength == 0
    assert [r.method for r in c.results] == sorted(shown, key=lambda n: -shown[n].strength)
    apart = {t.first for t in c.against_winner if t.p_adjusted <= 0.05}
    assert {n for n, cell in shown.items() if cell.close} == set(shown) - apart


def test_one_layer_is_no_map() -> None:
    assert layer_map(make_comparison()) is None
    assert layer_map(made(["mean@6", "cls@6"])) is None
    assert "layers" not in {a.get("id") for a in page(make_comparison()).all("section")}


def test_metrics_that_are_no_numbers_stay_pale() -> None:
    c = made()
    odd = dataclasses.replace(c.results[-1], metric=float("nan"))
    drawn = layer_map(dataclasses.replace(c, results=(*c.results[:-1], odd)))
    assert drawn is not None
    strengths = {cell.result.method: cell.strength for row in drawn.rows for cell in row.cells if cell is not None}
    assert strengths[odd.method] == 0
    assert strengths[c.winner] == 1


def test_the_page_shows_the_map_with_numbers_and_words() -> None:
    c = made()
    built = page(c)
    assert "layers" in {a.get("id") for a in built.all("section")}
    assert any(a.get("href") == "#layers" for a in built.all("a"))
    text = built.text[built.text.index("Which layer") : built.text.index("What the metric costs")]
    for r in c.results:
        assert f"{100 * r.metric:.1f}" in text
    assert "layers 3, 6" in text
    assert "not distinguishable from the best" in text


def test_a_probe_of_an_npz_of_layers_draws_it(tmp_path: Path) -> None:
    y = np.arange(60) % 2
    x = np.random.default_rng(0).normal(size=(60, 3, 4, 5)).astype(np.float32)
    x[:, 1, :, 0] += 3 * y[:, None]
    np.savez(tmp_path / "layers.npz", x=x, y=y)
    data = cenote.features.read(tmp_path / "layers.npz", layers="all")
    out = tmp_path / "out"
    c = compare(data, ["mean", "max"], seeds=1, folds=1, layers="all", out=out, recipe=Recipe((5e-2,), epochs=3))
    drawn = layer_map(c)
    assert drawn is not None
    assert drawn.layers == (1, 2, 3)
    assert c.winner.endswith("@2")
    assert "Which layer" in cenote.report.write(out).read_text("utf-8")


@pytest.mark.parametrize("metric", ["R2", "AUROC"])
def test_other_metrics(metric: str) -> None:
    c = dataclasses.replace(made(), metric_name=metric)
    assert "Which layer" in page(c).text
