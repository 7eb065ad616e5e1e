"""Poolings of graphs behind one encoder, ten folds, one table: docs/tables/graphs.md.

python -m benchmarks.graph_table --data-dir ../shared/data [--data MUTAG] [--pools mean,sum] [--epochs 50]

The folder holds `graphs/MUTAG.txt` and `graphs/PROTEINS.txt` in DGCNN's text format. What is measured is kept in
docs/tables/graphs.json fold by fold: a run that was stopped goes on where it was, data sets and poolings may be run one by
one, and `--again` measures anew what is there. Needs the extra `graph`.
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
from cenote.pool.base import similar_lengths
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


class Grouped(Aggregated):
    """Likewise of groups of graphs of similar size: an aggregation that pads a batch to its largest graph gives the same."""

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, size: int) -> Tensor:
        outputs, order = [], []
        for group in similar_lengths(batch.bincount(minlength=size).tolist(), slack=1.0):
            chosen = torch.tensor(sorted(group))
            number = torch.full((size,), -1)
            number[chosen] = torch.arange(len(chosen))
            own = number[batch]
            outputs.append(super().forward(x[own >= 0], edge_index, own[own >= 0], len(chosen)))
            order.append(chosen)
        return torch.cat(outputs)[torch.cat(order).argsort()]


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


def aggregation(name: str) -> tuple[nn.Module, int]:
    return Aggregated(getattr(geometric(), name)()), WIDTH


POOLS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "mean": lambda: aggregation("MeanAggregation"),
    "sum": lambda: aggregation("SumAggregation"),
    "max": lambda: aggregation("MaxAggregation"),
    "PyG SAGPooling": lambda: (Sag(), WIDTH),
    "PyG SetTransformerAggregation": lambda: (
        Grouped(geometric().SetTransformerAggregation(WIDTH, heads=4)),
        WIDTH,
    ),
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


def splits(data: TokenDataset) -> list[tuple[Tensor, Tensor]]:
    """Training and test graphs of each fold."""
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(data)), data.y.numpy())
    return [(torch.as_tensor(train), torch.as_tensor(test)) for train, test in folds]


def accuracy(
    data: TokenDataset, build: Callable[[], tuple[nn.Module, int]], epochs: int, fold: int, train: Tensor, test: Tensor
) -> float:
    """On the test graphs, after the last pass over the training graphs."""
    torch.manual_seed(fold)
    net = Net(data.dim, len(data.classes), build())
    stepper = torch.optim.Adam(net.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, epochs)
    for _ in range(epochs):
        for part in train[torch.randperm(len(train))].split(BATCH):
            stepper.zero_grad()
            F.cross_entropy(net(data.graphs(part)), data.y[part]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            stepper.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        return sum(int((net(data.graphs(p)).argmax(1) == data.y[p]).sum()) for p in test.split(BATCH)) / len(test)


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# Poolings of graphs",
        "",
        f"Two graph convolutions of width {WIDTH}, a pooling, a perceptron, on graphs with one-hot "
        f"node tags. {FOLDS} stratified folds, one training each, judged after the last "
        "pass: no epoch is chosen on the test fold, as some published numbers do. The encoder is the same in every row; "
        "graph-parsing and sparse-hierarchical have further convolutions of their own. SetTransformerAggregation, which pads a "
        "batch to its largest graph, gets the graphs of a batch in groups of similar size: the same for less. Written by",
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
        whole = {pool: run for pool, run in found["runs"].items() if len(run["accuracy"]) == FOLDS}
        for pool, run in sorted(whole.items(), key=lambda item: -np.mean(item[1]["accuracy"])):
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
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--out", type=Path, default=TABLES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.data.split(","):
        path = given.data_dir / "graphs" / f"{name}.txt"
        if not path.is_file():
            print(f"skipped: no {path}; name the folder of data with --data-dir")
            continue
        data = read(path)
        for pool in given.pools.split(","):
            if given.again:
                keep(given.out, name, data, given.epochs, pool, {"accuracy": [], "seconds": 0.0})
            for fold, (train, test) in enumerate(splits(data)):
                run = stored(given.out, name, given.epochs).get(pool, {"accuracy": [], "seconds": 0.0})
                if fold < len(run["accuracy"]):
                    continue
                start = time.process_time()
                right = accuracy(data, POOLS[pool], given.epochs, fold, train, test)
                run = {"accuracy": [*run["accuracy"], right], "seconds": run["seconds"] + time.process_time() - start}
                print(name, pool, fold, f"{right:.3f}", f"{run['seconds']:.0f} s", flush=True)
                keep(given.out, name, data, given.epochs, pool, run)
    write_page(given.out)


def stored(out: Path, name: str, epochs: int) -> dict[str, dict[str, Any]]:
    """What is kept of a data set: pooling -> its run, where it had as many passes."""
    file = out / "graphs.json"
    found = json.loads(file.read_text("utf-8"))["data"].get(name, {}) if file.is_file() else {}
    return found["runs"] if found.get("epochs") == epochs else {}


def keep(out: Path, name: str, data: TokenDataset, epochs: int, pool: str, run: dict[str, Any]) -> None:
    """Write a pooling's run, and the page."""
    file = out / "graphs.json"
    every = json.loads(file.read_text("utf-8")) if file.is_file() else {"data": {}}
    own = sum(p.numel() for p in POOLS[pool]()[0].parameters() if p.requires_grad)
    runs = {**stored(out, name, epochs), pool: {**run, "parameters": own}}
    majority = float(data.y.bincount().max() / len(data))
    every["data"][name] = {"epochs": epochs, "majority": majority, "runs": runs}
    every["torch"] = torch.__version__
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(every, indent=1) + "\n")
    write_page(out)


def write_page(out: Path) -> None:
    """What is kept, as a page."""
    file = out / "graphs.json"
    if file.is_file():
        (out / "graphs.md").write_text(table(json.loads(file.read_text("utf-8"))["data"]), "utf-8")


if __name__ == "__main__":
    main()
