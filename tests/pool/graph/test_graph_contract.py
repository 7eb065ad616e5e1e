"""Every graph pool of the catalog keeps the contract, and so do its options."""

import subprocess
import sys

import pytest
import torch

import cenote
from cenote.pool import GraphParsingPool, GraphPool, SparseHierarchicalPool
from cenote.testing import check_graph_pool

pytest.importorskip("torch_geometric")

METHODS = [m.name for m in cenote.methods(room="pool", kind="graphs")]


@pytest.mark.parametrize("name", METHODS)
def test_pool_keeps_its_contract(name: str) -> None:
    check_graph_pool(cenote.create(name, dim=4, hidden=8))


OPTIONS: dict[str, GraphPool] = {
    "parsing, all options": GraphParsingPool(
        4, hidden=6, gnn_layers=1, second_gnn=2, deepset_layers=2, self_loops=True, activate_last=False, conv="gin"
    ),
    "parsing, levels, attention": GraphParsingPool(4, hidden=6, gnn_layers=1, conv="gat", readout="levels"),
    "top-k, a number": SparseHierarchicalPool(4, hidden=8, k=3, gate="sigmoid"),
    "top-k, least score": SparseHierarchicalPool(4, hidden=8, blocks=2, min_score=0.1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_keep_it(name: str) -> None:
    check_graph_pool(OPTIONS[name])


@pytest.mark.parametrize("seed", [2, 33, 35])
def test_a_graph_whose_nodes_all_chose_themselves_is_done(seed: int) -> None:
    """With these weights a graph stops joining while its batch mates go on."""
    torch.manual_seed(seed)
    options = {"gnn_layers": 1, "second_gnn": 2, "deepset_layers": 2, "self_loops": True, "activate_last": False}
    check_graph_pool(GraphParsingPool(4, hidden=6, conv="gin", **options))


def test_torch_geometric_is_imported_where_it_is_used_and_missed_by_name() -> None:
    program = (
        "import sys, cenote.pool\n"
        "assert 'torch_geometric' not in sys.modules\n"
        "sys.modules['torch_geometric'] = None\n"
        "try: cenote.create('graph-parsing', dim=4)\n"
        "except cenote.InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cenote[graph]" in done.stdout
