"""Every window pooling in one small convolutional net on MNIST, three seeds, one table: docs/tables/spatial-mnist.md.

python -m benchmarks.spatial_mnist --data-dir ../shared/data [--pools mean,max] [--epochs 3]

The folder holds `mnist10k`, the 10,000 test images and labels of MNIST (IDX, gzip): 0 to 7999 train, 8000 to 9999 test.
What is measured is kept in docs/tables/spatial-mnist.json, so that the poolings may be run one by one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cenote

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
TRAIN, BATCH, LEARNING_RATE = 8000, 64, 2e-3
SEEDS = (0, 1, 2)

Build = Callable[[], nn.Module]

POOLS: dict[str, Build] = {"mean": partial(nn.AvgPool2d, 2), "max": partial(nn.MaxPool2d, 2)}
POOLS |= {m.name: partial(cenote.create, m.name, kernel_size=2) for m in cenote.methods(room="pool", kind="maps")}


class Net(nn.Module):
    """conv16 - pool - conv32 - pool - linear, on 28 x 28 pixels."""

    def __init__(self, pool: Build) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), pool(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), pool()
        )
        self.classifier = nn.Linear(32 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).flatten(1))


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Images `[10000, 1, 28, 28]` in [0, 1] and labels."""

    def idx(pattern: str, header: int) -> np.ndarray:
        (file,) = folder.glob(pattern)
        return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8)[header:]

    x = torch.tensor(idx("*images*.gz", 16)).view(-1, 1, 28, 28).float() / 255
    return x, torch.tensor(idx("*labels*.gz", 8)).long()


def measured(pool: Build, x: Tensor, y: Tensor, seed: int, epochs: int) -> dict[str, float]:
    """Test accuracy of one training, and its CPU seconds."""
    torch.manual_seed(seed)
    net = Net(pool)
    steps = epochs * (TRAIN // BATCH)
    stepper = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps)
    start = time.process_time()
    for _ in range(epochs):
        for part in torch.randperm(TRAIN)[: TRAIN // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(net(x[part]), y[part])
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            schedule.step()
    seconds = time.process_time() - start
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net(part).argmax(1) for part in x[TRAIN:].split(500)])
    return {"accuracy": float((guesses == y[TRAIN:]).double().mean()), "seconds": seconds}


def table(kept: dict[str, Any], epochs: int) -> str:
    """The page."""
    lines = [
        "# Window poolings on MNIST",
        "",
        "One small convolutional net (conv16, pool, conv32, pool, linear) with every window pooling of the catalog, 2 x 2. "
        f"8,000 of MNIST's 10,000 test images to train on ({epochs} epochs, Adam, batches of {BATCH}), the last 2,000 to test "
        "on. Written by",
        "",
        "```bash",
        f"python -m benchmarks.spatial_mnist --data-dir ../shared/data --epochs {epochs}",
        "```",
        "",
        f"Mean over {len(SEEDS)} seeds; one seed's accuracy has a standard error of about 0.3 points, so that neighbours in "
        "this table are not told apart. Seconds are those of one training on one CPU thread.",
        "",
        "| pooling | accuracy | per seed | parameters of one pooling | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    ranked = sorted(kept.items(), key=lambda item: -np.mean([r["accuracy"] for r in item[1]]))
    for name, runs in ranked:
        scores = [r["accuracy"] for r in runs]
        own = sum(p.numel() for p in POOLS[name]().parameters() if p.requires_grad)
        each = ", ".join(f"{s:.4f}" for s in scores)
        seconds = np.mean([r["seconds"] for r in runs])
        lines.append(f"| {name} | {np.mean(scores):.4f} | {each} | {own} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=TABLES)
    given = parser.parse_args()
    folder = given.data_dir / "mnist10k"
    if not folder.is_dir():
        print(f"skipped: no {folder}; name the folder of data with --data-dir")
        return
    torch.set_num_threads(1)
    x, y = read(folder)
    file = given.out / "spatial-mnist.json"
    stored = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    # other settings are other numbers
    kept = stored["runs"] if stored.get("epochs") == given.epochs else {}
    for name in given.pools.split(","):
        kept[name] = [measured(POOLS[name], x, y, seed, given.epochs) for seed in SEEDS]
        print(name, [round(r["accuracy"], 4) for r in kept[name]], f"{kept[name][0]['seconds']:.0f} s", flush=True)
        given.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"epochs": given.epochs, "torch": torch.__version__, "runs": kept}, indent=1) + "\n")
        (given.out / "spatial-mnist.md").write_text(table(kept, given.epochs), "utf-8")


if __name__ == "__main__":
    main()
