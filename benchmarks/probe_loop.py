"""`cenote probe` against the same probes trained one by one in a plain loop.

`cenote probe` trains all seeds and learning rates of a method together, and two methods at once where there are two threads.
Its time is that of everything it does: starting processes, testing, the bootstrap. The loop's is that of training and
validation alone, on as many threads as torch takes.

The plain loop is what one would write: build a probe, AdamW with cosine decay, the same batches in the same order, validate
after every epoch, keep the best state. Both run every epoch (no early stop), so that both do the same work; the learning rate
is chosen by the mean validation accuracy over the seeds. The standard recipe has 40 epochs at most; in 10, what is done once
(starting processes, the bootstrap) weighs more. Test accuracies must agree within what seeds differ by.

    python -m benchmarks.probe_loop [--json FILE] [--methods fast] [--seeds 3] [--epochs 10,40] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.timing import machine

from cenote.features import digits
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe import compare
from cenote.jobs.probe.module import Probe, build_probe
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.training import logical_batches, predict


def one_by_one(
    name: str, data: TokenDataset, seeds: tuple[int, ...], recipe: Recipe
) -> tuple[list[Probe], float, list[list[float]]]:
    """Probes at the chosen learning rate, one per seed; that rate; the best validation accuracy per rate and seed."""
    found = {rate: [_trained(name, data, seed, rate, recipe) for seed in seeds] for rate in recipe.learning_rates}
    chosen = max(found, key=lambda rate: sum(accuracy for _, accuracy in found[rate]))
    return [probe for probe, _ in found[chosen]], chosen, [[a for _, a in found[r]] for r in recipe.learning_rates]


def _trained(name: str, data: TokenDataset, seed: int, rate: float, recipe: Recipe) -> tuple[Probe, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = build_probe(name, data)
    items, validation = data.indices("train"), data.indices("val")
    size = recipe.items_per_step(len(items))
    passes = math.ceil(recipe.least_steps / math.ceil(len(items) / size))
    steps = recipe.epochs * passes * math.ceil(len(items) / size)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.Generator().manual_seed(0)
    best, kept = -math.inf, copy.deepcopy(probe)
    for _ in range(recipe.epochs):
        probe.train()
        for _ in range(passes):
            for batch in logical_batches(items, size, order):
                loss = F.cross_entropy(probe(*data.batch(batch)), data.y[batch])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
        accuracy = _accuracy(probe, data, validation, recipe)
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(probe)
    return kept, best


def _accuracy(probe: Probe, data: TokenDataset, items: torch.Tensor, recipe: Recipe) -> float:
    logits = predict(probe, data, items, recipe.tokens_at_once)
    return float((logits.argmax(1) == data.y[items]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--methods", default="fast")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--epochs", default=f"10,{Recipe().epochs}", help="numbers separated by commas (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    runs = [measured(arguments.methods, tuple(range(arguments.seeds)), int(n)) for n in arguments.epochs.split(",")]
    if arguments.json:
        content = {
            "command": f"python -m benchmarks.probe_loop --seeds {arguments.seeds} --epochs {arguments.epochs}",
            "machine": machine(),
            "load_before": round(load, 2),
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def measured(methods: str, seeds: tuple[int, ...], epochs: int) -> dict[str, Any]:
    """Both ways, with so many epochs."""
    data, recipe = digits(), Recipe(epochs=epochs, patience=epochs)
    start = time.perf_counter()
    comparison = compare(data, methods, seeds=seeds, recipe=recipe, references=False)
    ours = time.perf_counter() - start
    test = data.indices("test")
    rows: dict[str, dict[str, Any]] = {}
    print(f"{f'{epochs} epochs':<20} {'together':>9} {'one by one':>11}   test accuracy")
    for result in comparison.results:
        name = result.method
        start = time.perf_counter()
        probes, rate, _ = one_by_one(name, data, seeds, recipe)
        alone = time.perf_counter() - start
        accuracies = [list(result.metric_per_seed), [_accuracy(p, data, test, recipe) for p in probes]]
        rows[name] = {
            "together_s": result.seconds,
            "one_by_one_s": alone,
            "learning_rates": [result.learning_rate, rate],
            "test_accuracy_together": accuracies[0],
            "test_accuracy_one_by_one": accuracies[1],
        }
        means = [100 * sum(a) / len(a) for a in accuracies]
        print(f"{name:<20} {result.seconds:8.2f}s {alone:10.2f}s   {means[0]:.2f} and {means[1]:.2f}", flush=True)
    theirs = sum(row["one_by_one_s"] for row in rows.values())
    print(f"{'all, wall time':<20} {ours:8.2f}s {theirs:10.2f}s   {theirs / ours:.2f} times faster")
    return {"epochs": epochs, "together_s": ours, "one_by_one_s": theirs, "faster": theirs / ours, "methods": rows}


if __name__ == "__main__":
    main()
