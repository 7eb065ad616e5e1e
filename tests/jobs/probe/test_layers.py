"""Layers times tokens in one comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cenote.core import Bags, InputError
from cenote.features import LayeredDataset, TokenDataset
from cenote.jobs.probe import Comparison, Recipe, compare, load
from cenote.jobs.probe.arms import columns_of
from cenote.jobs.probe.module import build_probe

QUICK = Recipe(learning_rates=(0.1,), epochs=15, least_steps=4, patience=15)
ITEMS, DIM = 240, 8


def middle(ragged: bool = False) -> TokenDataset:
    """The class shows in layer 2 of 0 to 3, and nowhere else."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(ITEMS) % 2
    lengths = torch.randint(3, 7, (ITEMS,), generator=g) if ragged else torch.full((ITEMS,), 5)
    x = torch.randn(int(lengths.sum()), 4, DIM, generator=g)
    x[:, 2, 0] += 4.0 * y.repeat_interleave(lengths)
    split = (torch.arange(ITEMS) // 2) % 3
    names = tuple(f"i{n}" for n in range(ITEMS))
    tokens = Bags(x.flatten(1), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    held = tokens if ragged else x.view(ITEMS, 5, 4, DIM).transpose(1, 2).contiguous()
    return LayeredDataset("middle", held, y, "binary", ("a", "b"), names, split, prefix_tokens=1, layers=(0, 1, 2, 3))


@pytest.mark.parametrize("ragged", [False, True])
def test_the_layer_with_the_answer_wins(ragged: bool, tmp_path: Path) -> None:
    data = middle(ragged)
    found = compare(data, ["max", "weighted-layer-sum", "max-cls"], layers="all", seeds=2, out=tmp_path, recipe=QUICK)
    names = {r.method for r in found.results if not r.reference}
    assert names == {f"{m}@{n}" for m in ("mean", "max") for n in range(4)} | {"weighted-layer-sum", "max-cls"}
    assert found.baseline == "mean@3"
    assert found.winner in ("mean@2", "weighted-layer-sum")
    assert found["mean@2"].layers == (2,)
    assert found["weighted-layer-sum"].layers == (1, 2, 3)
    assert found["weighted-layer-sum"].metric > found["mean@3"].metric + 0.2
    assert found["mean@2"].metric > 0.9 > 0.7 > found["mean@3"].metric
    assert len(found.against_baseline) == 9 + len(found.references) == 11
    assert Comparison.load(tmp_path) == found

    saved = load(tmp_path / "best")
    view = saved.view(data)
    x, mask = view.batch(torch.arange(12))
    assert saved.scores(x, mask).shape == (12, 2)
    assert saved.attend(x, mask).weights.shape[-1] >= x.shape[-2] - 1
    with pytest.raises(InputError, match="are not there"):
        saved.view(data.only((0, 1)))

    again = compare(data, ["max", "weighted-layer-sum", "max-cls"], layers="all", seeds=2, out=tmp_path, recipe=QUICK)
    assert [r.seconds for r in again.results] == [r.seconds for r in found.results]


def test_one_layer_keeps_plain_names() -> None:
    data = middle()
    columns, baseline, _ = columns_of(data, "mean,max,weighted-layer-sum", None)
    assert [(c.name, c.layers) for c in columns] == [("mean", (3,)), ("max", (3,)), ("weighted-layer-sum", (1, 2, 3))]
    assert baseline == "mean"
    columns, _, _ = columns_of(data, ["mean"], "2")
    every = torch.arange(ITEMS)
    assert torch.equal(columns[0].data.batch(every)[0], data.batch(every)[0][:, 2])
    columns, baseline, _ = columns_of(data, ["mean"], "-2:")
    assert [c.name for c in columns] == ["mean@3", "mean@2"]
    assert baseline == "mean@3"


def test_pools_of_layers_join_where_there_are_layers() -> None:
    data = middle()
    assert "weighted-layer-sum" in [c.name for c in columns_of(data, "fast")[0]]
    assert "weighted-layer-sum" not in [c.name for c in columns_of(data.at(2), "fast")[0]]
    assert columns_of(data.at(2), ["max-cls"])[2] == {"max-cls": "pools several layers, and the data hold one"}
    with pytest.raises(InputError, match="hold one layer"):
        columns_of(data.at(2), "mean", "all")
    with pytest.raises(InputError, match="there is no layer 9"):
        columns_of(data, "mean", "9")


def test_prefix_is_kept_from_pools_that_do_not_read_it() -> None:
    data = middle(ragged=True)
    x, mask = data.batch(torch.arange(5))
    other = x.clone()
    other[:, :, 0] += 5
    probe = build_probe("weighted-layer-sum", data).eval()
    torch.testing.assert_close(probe(x, mask), probe(other, mask))
    weights = probe.attend(x, mask).weights
    assert weights[:, :, 0].eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 1))
    reads = build_probe("max-cls", data).eval()
    assert not torch.equal(reads(x, mask), reads(other, mask))


def test_command_line_names_what_is_missing() -> None:
    from cenote.cli.app import app

    result = CliRunner().invoke(app, ["probe", "digits", "--layers", "all"])
    assert isinstance(result.exception, InputError)
    assert "one layer" in str(result.exception)
