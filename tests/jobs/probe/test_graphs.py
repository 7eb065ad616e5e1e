"""Graphs through the probe: graph pools and set pools in one leaderboard."""

import sys
from pathlib import Path

import pytest
import torch

from cenote.cli import main
from cenote.core import InputError
from cenote.core.graphs import Graphs
from cenote.features import digits, read
from cenote.jobs.probe import Comparison, Recipe, compare, load
from cenote.jobs.probe.arms import chosen_methods
from cenote.jobs.probe.module import Probe
from cenote.jobs.probe.training import pieces
from cenote.pool import SparseHierarchicalPool
from cenote.pool.graph.base import GraphPool

pytest.importorskip("torch_geometric")

RECIPE = Recipe(learning_rates=(5e-3,), epochs=10, patience=10, batch_size=16)


@pytest.fixture
def rings(tmp_path: Path) -> Path:
    """Of twelve nodes, one ring or two: only the edges tell."""
    lines = ["48"]
    for i in range(48):
        lines.append(f"12 {i % 2}")
        size = 12 if i % 2 else 6
        for n in range(12):
            start = n // size * size
            lines.append(f"0 2 {start + (n + 1) % size} {start + (n - 1) % size}")
    path = tmp_path / "rings.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_one_leaderboard(rings: Path, tmp_path: Path) -> None:
    data = read(rings)
    out = tmp_path / "out"
    result = compare(data, ["max", "graph-parsing", "sparse-hierarchical"], seeds=1, folds=1, recipe=RECIPE, out=out)
    assert set(result.references) == {"knn", "logistic-regression"}
    assert {r.method for r in result.results if not r.reference} == {
        "mean",
        "max",
        "graph-parsing",
        "sparse-hierarchical",
    }
    assert result.baseline == "mean"
    assert result["mean"].metric == pytest.approx(0.5, abs=0.01)
    assert result["graph-parsing"].metric > 0.9
    assert result.winner == "graph-parsing"
    assert all(r.latency_ms > 0 and r.multiply_adds > 0 for r in result.results if not r.reference)
    assert Comparison.load(out).winner == "graph-parsing"
    again = compare(data, ["graph-parsing"], seeds=1, folds=1, recipe=RECIPE, out=out)
    assert again["graph-parsing"].seconds == result["graph-parsing"].seconds

    saved = load(out / "best")
    assert isinstance(saved.probe.pool, GraphPool)
    seen = saved.view(read(rings, labelled=False))
    scores = torch.cat([saved.scores(seen.copies(i)) for i in range(len(seen))])
    # what was chosen is the order of the scores, AUROC
    assert scores[data.y == 1, 1].min() > scores[data.y == 0, 1].max()
    with pytest.raises(InputError, match="no edges"):
        saved.view(digits())


def test_fast_and_all_hold_graph_pools_for_graphs_alone() -> None:
    for wanted in ("fast", "all"):
        assert "graph-parsing" in chosen_methods(wanted, edges=True)
        assert "graph-parsing" not in chosen_methods(wanted)
    assert chosen_methods(["sparse-hierarchical"]) == ("mean", "sparse-hierarchical")


def test_without_edges_graph_pools_are_skipped_and_say_why() -> None:
    result = compare(digits(), ["graph-parsing"], seeds=1, recipe=Recipe((1e-2,), epochs=1, batch_size=512))
    assert "edges between tokens" in result.skipped["graph-parsing"]


def test_graphs_are_not_cut_by_length(rings: Path) -> None:
    data = read(rings).with_edges()
    parts = [part.tolist() for _, part in pieces(data, torch.arange(48), 12 * 20)]
    assert [len(p) for p in parts] == [20, 20, 8]
    x, mask = data.batch(torch.tensor([3, 1]))
    assert isinstance(x, Graphs)
    assert mask is None


def test_a_graph_probe_takes_graphs_alone() -> None:
    probe = Probe(SparseHierarchicalPool(3, hidden=4, blocks=1), 2)
    with pytest.raises(InputError, match="takes Graphs, got Tensor"):
        probe(torch.ones(1, 4, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("graphs\n", "line 1 must be the number of graphs"),
        ("1\n2 0\n0 1 1\n0 1 7\n", "graph 0, node 1 (line 4): neighbour 7"),
    ],
)
def test_the_command_names_what_is_wrong_and_exits_with_2(
    tmp_path: Path,
    content: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "wrong.txt").write_text(content)
    monkeypatch.setattr(sys, "argv", ["cenote", "probe", str(tmp_path / "wrong.txt"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
