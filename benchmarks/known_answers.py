"""What the comparison says of data whose answer is known: docs/tables/known-answers.md.

    python -m benchmarks.known_answers [--runs N] [--only NAME] [--out FOLDER]

Four kinds of data on which a verdict once was wrong, each through `cenote.jobs.probe.compare` with the recipe as it is:

- targets far from zero: `y = 50 + 10 * (mean of the tokens) @ w + noise`, and targets of mean 50 and deviation 1;
  ridge regression on the same means knows the answer;
- noise in groups: 200 items without any signal, in 5 to 50 groups or in none: every winner is a false alarm;
- one split: the same items in ten other splits, and in folds;
- copies in disguise: every patient has one label and gives several items; with and without a column that says so.

The sizes, the seeds and what counts as an alarm were written down before the first run.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.features import TokenDataset, digits, read
from cenote.jobs.probe import Comparison, compare

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
ITEMS, TOKENS, DIM, RUNS = 200, 8, 16, 20
METHODS = ("mean", "max", "abmil", "gem")
GROUPS = (5, 6, 10, 15, 30, 50, None)
SPLITS = 10
PATIENTS = 25


def kept(x: NDArray[np.float32], y: NDArray[Any], **read_by: Any) -> TokenDataset:
    """The data as `cenote probe` reads them from an `.npz`."""
    arrays = {"x": x, "y": y, **{k: read_by.pop(k) for k in ("groups",) if k in read_by}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, **arrays)
        return read(file, **read_by)


def noise(seed: int) -> tuple[NDArray[np.float32], np.random.Generator]:
    """Tokens that know nothing, and where further numbers come from."""
    random = np.random.default_rng(seed)
    return random.standard_normal((ITEMS, TOKENS, DIM)).astype(np.float32), random


def said(comparison: Comparison) -> dict[str, Any]:
    """What of a comparison is kept."""
    return {
        "metric": comparison.metric_name,
        "values": {r.method: r.metric for r in comparison.results},
        "winner": comparison.winner,
        "sentence": comparison.sentence,
        "cautions": list(comparison.cautions),
        "no verdict": comparison.no_verdict,
    }


def calls_a_winner(comparison: Comparison) -> bool:
    """Whether any two methods are called different; references and controls are no methods."""
    aside = {*comparison.references, *comparison.controls}
    return any(p.p_adjusted < 0.05 for p in comparison.pairs if not {p.first, p.second} & aside)


def targets_far_from_zero(_: int) -> list[dict[str, Any]]:
    """R2 of every method, and of ridge regression on the mean."""
    found = []
    for name, scale in (("50 + 10 x w + noise", 10.0), ("mean 50, deviation 1", 0.0)):
        x, random = noise(0)
        weights = random.standard_normal(DIM)
        signal = x.mean(1) @ weights
        if scale:
            y = 50 + scale * signal + 0.1 * random.standard_normal(ITEMS)
        else:
            y = 50 + (signal - signal.mean()) / signal.std() + 0.1 * random.standard_normal(ITEMS)
        data = kept(x, y.astype(np.float32), task="regression")
        found.append({"targets": name, **said(compare(data, list(METHODS), seeds=1, folds=1))})
    return found


def noise_in_groups(runs: int) -> list[dict[str, Any]]:
    """How many of the tables call a winner."""
    found = []
    for groups in GROUPS:
        alarms, without = 0, 0
        for seed in range(runs):
            x, random = noise(seed)
            more = {}
            if groups is not None:
                owners = np.arange(ITEMS) % groups
                more = {"groups": np.array([f"g{o}" for o in owners])}
            y = random.permutation(np.arange(ITEMS) % 2)
            comparison = compare(kept(x, y, **more), list(METHODS), seeds=1, folds=1)
            alarms += calls_a_winner(comparison)
            without += bool(comparison.no_verdict)
        found.append({"groups": groups, "runs": runs, "alarms": alarms, "no verdict": without})
        print(found[-1], flush=True)
    return found


def one_split(_: int) -> list[dict[str, Any]]:
    """How far the metric moves with the split alone, and what folds say of the same items."""
    embedded = digits()
    few = torch.arange(ITEMS)
    images = embedded.token_source.batch(few)[0].numpy()
    y = embedded.y[few].numpy()
    values: dict[str, list[float]] = {m: [] for m in METHODS}
    winners = []
    for seed in range(SPLITS):
        comparison = compare(kept(images, y, seed=seed), list(METHODS), seeds=1, folds=1)
        winners.append(comparison.winner)
        for method in METHODS:
            values[method].append(comparison[method].metric)
    folded = compare(kept(images, y), list(METHODS), seeds=1)
    return [{"splits": SPLITS, "values": values, "winners": winners, "folds": said(folded)}]


def copies_in_disguise(_: int) -> list[dict[str, Any]]:
    """AUROC with and without the column that names the patient."""
    random = np.random.default_rng(0)
    patient = np.arange(ITEMS) % PATIENTS
    mark = random.standard_normal((PATIENTS, 1, DIM))
    x = (mark[patient] * 3 + random.standard_normal((ITEMS, TOKENS, DIM))).astype(np.float32)
    y = random.permutation(np.arange(PATIENTS) % 2)[patient]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with (root / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "label", "patient"])
            for item in range(ITEMS):
                np.save(root / f"i{item:03}.npy", x[item])
                rows.writerow([f"i{item:03}", ("no", "yes")[y[item]], f"p{patient[item]}"])
        for group in (None, "patient"):
            data = read(root, label_column="label", group_column=group)
            comparison = compare(data, list(METHODS), seeds=1, metric="auroc", folds=1)
            found.append({"group": group, **said(comparison)})
    return found


EXAMPLES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "targets far from zero": targets_far_from_zero,
    "copies in disguise": copies_in_disguise,
    "one split": one_split,
    "noise in groups": noise_in_groups,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--only", choices=list(EXAMPLES))
    parser.add_argument("--out", type=Path, default=TABLES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.out / "known-answers.json"
    for name in [given.only] if given.only else EXAMPLES:
        found = EXAMPLES[name](given.runs)
        everything = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        file.write_text(json.dumps({**everything, name: found}, indent=1) + "\n")
        print(name, json.dumps(found, indent=1)[:1500], flush=True)


if __name__ == "__main__":
    main()
