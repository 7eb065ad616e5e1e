"""Poolings of bags on MUSK-1, ten folds, three seeds, one table: docs/tables/musk.md.

python -m benchmarks.musk_bags --data-dir ../shared/data [--pools mean,abmil]

The folder holds `musk/musk1.data`: 92 bags of 476 instances with 166 numbers (C4.5 format: bag, instance, numbers, class).
What is measured is kept in docs/tables/musk.json, so that the poolings may be run one by one.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core import Bags
from cenote.pool import (
    ABMIL,
    MIDAM,
    BagScorer,
    MaxPool,
    MeanPool,
    MIDAMAttention,
    MIDAMAttentionLoss,
    MIDAMLoss,
    MIDAMSmoothedMax,
    MIDAMSmoothedMaxLoss,
    MIDAMTrainer,
    Pool,
)

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
FOLDS, SEEDS, HIDDEN = 10, (0, 1, 2), 64
STEPS, LEARNING_RATE, DECAY = 200, 1e-3, 1e-3
MIDAM_STEPS, MIDAM_RATE, INSTANCES, TAU, GAMMA = 500, 0.05, 4, 0.5, 0.5

POOLS: dict[str, Callable[[], Pool]] = {
    "mean": lambda: MeanPool(HIDDEN),
    "max": lambda: MaxPool(HIDDEN),
    "abmil": lambda: ABMIL(HIDDEN, HIDDEN, gated=False),
    "abmil, gated": lambda: ABMIL(HIDDEN, HIDDEN),
}
MODES: dict[str, tuple[Callable[[int], BagScorer], Callable[[int], MIDAMLoss]]] = {
    "midam, smoothed max": (
        lambda dim: MIDAMSmoothedMax(nn.Sequential(nn.Linear(dim, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)), TAU),
        lambda bags: MIDAMSmoothedMaxLoss(bags, TAU, gamma=GAMMA),
    ),
    "midam, attention": (
        lambda dim: MIDAMAttention(nn.Sequential(nn.Linear(dim, HIDDEN), nn.Tanh()), HIDDEN, HIDDEN),
        lambda bags: MIDAMAttentionLoss(bags, gamma=GAMMA),
    ),
}


def read(file: Path) -> tuple[list[Tensor], Tensor]:
    """The bags and their labels."""
    bags: dict[str, list[list[float]]] = {}
    labels: dict[str, int] = {}
    with file.open(newline="") as rows:
        for name, _, *numbers, label in csv.reader(rows):
            bags.setdefault(name, []).append([float(n) for n in numbers])
            labels[name] = int(float(label.rstrip(".")))
    return [torch.tensor(bag) for bag in bags.values()], torch.tensor(list(labels.values()))


class Net(nn.Module):
    """A layer on each instance, a pooling, a linear classifier."""

    def __init__(self, dim: int, pool: Pool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dim, HIDDEN), nn.Tanh())
        self.pool = pool
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, bags: Bags) -> Tensor:
        return self.out(self.pool(bags.replace(self.encoder(bags.values)))).squeeze(1)


def whole_bags(pool: Callable[[], Pool], bags: Sequence[Tensor], y: Tensor, test: Sequence[Tensor]) -> Tensor:
    """Trained on all bags at every step with binary cross-entropy; scores of the test bags."""
    net = Net(bags[0].shape[1], pool())
    stepper = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=DECAY)
    joined = Bags.from_list(bags)
    for _ in range(STEPS):
        stepper.zero_grad()
        F.binary_cross_entropy_with_logits(net(joined), y.float()).backward()
        stepper.step()
    with torch.no_grad():
        return net(Bags.from_list(test))


def sampled_bags(mode: str, bags: Sequence[Tensor], y: Tensor, test: Sequence[Tensor], seed: int) -> Tensor:
    """Trained on a few instances of some bags at every step for the AUROC; exact scores of the test bags."""
    build, build_loss = MODES[mode]
    model = build(bags[0].shape[1])
    optimiser = MIDAM(model.parameters(), build_loss(len(bags)), MIDAM_RATE, weight_decay=DECAY)
    trainer = MIDAMTrainer(model, optimiser, bags, y, INSTANCES, seed=seed)
    trainer.fit(MIDAM_STEPS)
    # in attention mode the loss sees the sigmoid of the score
    scores = trainer.scores(test)
    scores = torch.sigmoid(scores) if mode == "midam, attention" else scores
    return scores - (trainer.loss.a + trainer.loss.b).detach() / 2


def measured(name: str, bags: list[Tensor], y: Tensor) -> dict[str, Any]:
    """AUROC and accuracy of every fold of every seed, and CPU seconds."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    found: dict[str, Any] = {"auroc": [], "accuracy": []}
    start = time.process_time()
    for seed in SEEDS:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(np.zeros(len(y)), y.numpy())
        per_fold: list[tuple[float, float]] = []
        for train, test in folds:
            instances = torch.cat([bags[i] for i in train])
            mean, spread = instances.mean(0), instances.std(0).clamp(min=1e-6)
            seen, unseen = ([(bags[i] - mean) / spread for i in part] for part in (train, test))
            torch.manual_seed(seed)
            if name in POOLS:
                scores = whole_bags(POOLS[name], seen, y[train], unseen)
            else:
                scores = sampled_bags(name, seen, y[train], unseen, seed)
            right = (scores > 0).long() == y[test]
            per_fold.append((float(roc_auc_score(y[test].numpy(), scores.numpy())), float(right.double().mean())))
        for key, values in zip(("auroc", "accuracy"), zip(*per_fold, strict=True), strict=True):
            found[key].append(list(values))
    return {**found, "seconds": time.process_time() - start}


def table(kept: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Poolings of bags on MUSK-1",
        "",
        f"92 bags, 2 to 40 instances of 166 numbers, standardised on the training folds. {FOLDS} stratified folds, "
        f"{len(SEEDS)} seeds of folds and initialisation. Mean, maximum and ABMIL see whole bags at every step ({STEPS} steps, "
        f"cross-entropy); MIDAM sees {INSTANCES} instances of 16 bags per step ({MIDAM_STEPS} steps, its AUC objective). "
        "One set of settings, chosen beforehand, none tuned on these data. Written by",
        "",
        "```bash",
        "python -m benchmarks.musk_bags --data-dir ../shared/data",
        "```",
        "",
        "Means over folds and seeds; behind them, the smallest and largest mean of a seed. Each fold tests 9 or 10 bags, so "
        "that neighbours in this table are not told apart. Seconds: CPU, all folds and seeds.",
        "",
        "| pooling | AUROC | per seed | accuracy | per seed | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in sorted(kept.items(), key=lambda item: -np.mean(item[1]["auroc"])):
        cells = []
        for key in ("auroc", "accuracy"):
            seeds = np.mean(run[key], axis=1)
            cells += [f"{seeds.mean():.3f}", f"{seeds.min():.3f} to {seeds.max():.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {run['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pools", default=";".join([*POOLS, *MODES]), help="names separated by semicolons")
    parser.add_argument("--out", type=Path, default=TABLES)
    given = parser.parse_args()
    data = given.data_dir / "musk" / "musk1.data"
    if not data.is_file():
        print(f"skipped: no {data}; name the folder of data with --data-dir")
        return
    torch.set_num_threads(1)
    bags, y = read(data)
    file = given.out / "musk.json"
    for name in given.pools.split(";"):
        run = measured(name, bags, y)
        print(
            name,
            f"{np.mean(run['auroc']):.3f}",
            f"{np.mean(run['accuracy']):.3f}",
            f"{run['seconds']:.0f} s",
            flush=True,
        )
        kept = json.loads(file.read_text("utf-8"))["runs"] if file.is_file() else {}
        kept[name] = run
        given.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"torch": torch.__version__, "runs": kept}, indent=1) + "\n")
        (given.out / "musk.md").write_text(table(kept), "utf-8")


if __name__ == "__main__":
    main()
