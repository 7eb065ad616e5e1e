"""Poolings of graphs behind one encoder, ten folds, one table: docs/tables/graphs.md.

python -m benchmarks.graph_table --data-dir ../shared/data [--data MUTAG] [--pools mean,sum] [--epochs 50]

The folder holds `graphs/MUTAG.txt` and `graphs/PROTEINS.txt` in DGCNN's text format. What is measured is kept in
docs/tables/graphs.json, so that data sets and poolings may be run one by one. Needs the extra `graph`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core.graphs import Graphs
from cenote.features import read
from cenote.features.dataset import TokenDataset
from cenote.pool import GraphParsingPool, SparseHierarchicalPool
from cenote.pool.graph.base import mean_by
from cenote.pool.graph.geometric import geometric

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
WIDTH, FOLDS, BATCH, LEARNING_RATE = 32, 10, 64, 5e-3
DATA = ("MUTAG", "PROTEINS")


class Aggregated(nn.Module):
    """An aggregation of PyTorch Geometric over the nodes of each graph."""

    def __init__(self, aggregation: nn.Module) -> None:
        super().__init__()
        self.aggregation = aggregation

    def forward(self, x: Tensor, _edge_index: Tensor, batch: Tensor, size: int) -> Tensor:
        return self.aggregation(x, batch, dim_size=size)


class Sag(nn.Module):
    """SAGPool's best half of the nodes, gated, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = geometric().SAGPooling(WIDTH, 0.5)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, size: int) -> Tensor:
        kept, _, _, of_graph, _, _ = self.pool(x, edge_index, batch=batch)
        return mean_by(kept, of_graph, size)


class Ours(nn.Module):
    """A graph pool of cenote."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, size: int) -> Tensor:
        return self.pool(x, edge_index, batch=batch, size=size)


def aggregation(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, int]:
    return Aggregated(getattr(geometric(), name)(*args, **kwargs)), WIDTH


POOLS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "mean": lambda: aggregation("MeanAggregation"),
    "sum": lambda: aggregation("SumAggregation"),
    "max": lambda: aggregation("MaxAggregation"),
    "PyG SAGPooling": lambda: (Sag(), WIDTH),
    "PyG SetTransformerAggregation": lambda: aggregation("SetTransformerAggregation", WIDTH, heads=4),
    "graph-parsing": lambda: (Ours(GraphParsingPool(WIDTH, WIDTH, gnn_layers=1)), WIDTH),
    "sparse-hierarchical": lambda: (Ours(SparseHierarchicalPool(WIDTH, WIDTH)), 2 * WIDTH),
}


class Net(nn.Module):
    """Two graph convolutions, a pooling, a perceptron with one hidden layer."""

    def __init__(self, dim: int, classes: int, pool: tuple[nn.Module, int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([geometric().GCNConv(dim, WIDTH), geometric().GCNConv(WIDTH, WIDTH)])
        self.pool, width = pool
        self.out = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

    def forward(self, graphs: Graphs) -> Tensor:
        x = graphs.values
        for conv in self.convs:
            x = torch.relu(conv(x, graphs.edge_index))
        return self.out(self.pool(x, graphs.edge_index, graphs.set_index(), graphs.batch))


def measured(data: TokenDataset, build: Callable[[], tuple[nn.Module, int]], epochs: int) -> dict[str, Any]:
    """Test accuracy of each fold after the last pass, parameters of the pooling, CPU seconds of all folds."""
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(data)), data.y.numpy())
    start = time.process_time()
    scores = []
    for fold, (train, test) in enumerate(folds):
        torch.manual_seed(fold)
        net = Net(data.dim, len(data.classes), build())
        stepper = torch.optim.Adam(net.parameters(), LEARNING_RATE, weight_decay=1e-4)
        items = torch.as_tensor(train)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, epochs)
        for _ in range(epochs):
            for part in items[torch.randperm(len(items))].split(BATCH):
                stepper.zero_grad()
                F.cross_entropy(net(data.graphs(part)), data.y[part]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                stepper.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            parts = torch.as_tensor(test).split(BATCH)
            right = sum(int((net(data.graphs(p)).argmax(1) == data.y[p]).sum()) for p in parts)
        scores.append(right / len(test))
    own = sum(p.numel() for p in build()[0].parameters() if p.requires_grad)
    return {"accuracy": scores, "parameters": own, "seconds": time.process_time() - start}


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# Poolings of graphs",
        "",
        f"Two graph convolutions of width {WIDTH}, a pooling, a perceptron, on graphs with one-hot "
        f"node tags. {FOLDS} stratified folds, one training each, judged after the last "
        "pass: no epoch is chosen on the test fold, as some published numbers do. The encoder is the same in every row; "
        "graph-parsing and sparse-hierarchical have further convolutions of their own. Written by",
        "",
        "```bash",
    ]
    for name, found in kept.items():
        lines.append(
            f"python -m benchmarks.graph_table --data-dir ../shared/data --data {name} --epochs {found['epochs']}"
        )
    lines += ["```", ""]
    for name, found in kept.items():
        share = found["majority"]
        lines += [
            f"## {name}",
            "",
            f"{found['epochs']} passes. Always the more frequent class: {share:.3f}. The interval is a 95 % t interval over "
            "the folds; folds share training graphs, so that it is rather too narrow. Seconds: CPU, all folds.",
            "",
            "| pooling | accuracy | 95 % interval | parameters of the pooling | seconds |",
            "| --- | --- | --- | --- | --- |",
        ]
        for pool, run in sorted(found["runs"].items(), key=lambda item: -np.mean(item[1]["accuracy"])):
            mean = float(np.mean(run["accuracy"]))
            # Student's t for nine degrees of freedom
            reach = 2.262 * float(np.std(run["accuracy"], ddof=1)) / FOLDS**0.5
            lines.append(
                f"| {pool} | {mean:.3f} | {mean - reach:.3f} to {mean + reach:.3f} | {run['parameters']:,} | "
                f"{run['seconds']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--out", type=Path, default=TABLES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.out / "graphs.json"
    for name in given.data.split(","):
        path = given.data_dir / "graphs" / f"{name}.txt"
        if not path.is_file():
            print(f"skipped: no {path}; name the folder of data with --data-dir")
            continue
        data = read(path)
        majority = float(data.y.bincount().max() / len(data))
        for pool in given.pools.split(","):
            run = measured(data, POOLS[pool], given.epochs)
            print(name, pool, f"{np.mean(run['accuracy']):.3f}", f"{run['seconds']:.0f} s", flush=True)
            # read again: another data set or pooling may have been measured meanwhile
            stored = json.loads(file.read_text("utf-8")) if file.is_file() else {"data": {}}
            found = stored["data"].get(name, {})
            runs = found["runs"] if found.get("epochs") == given.epochs else {}
            stored["data"][name] = {"epochs": given.epochs, "majority": majority, "runs": {**runs, pool: run}}
            stored["torch"] = torch.__version__
            given.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(stored, indent=1) + "\n")
            (given.out / "graphs.md").write_text(table(stored["data"]), "utf-8")


if __name__ == "__main__":
    main()
