"""Comparisons and attention files as a real run leaves them, made up from a seed."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import cenote.core.files as files
from cenote.catalog import methods as catalog_methods
from cenote.compare import PairTest, verdict
from cenote.compare.pareto import pareto
from cenote.compare.statistics import holm
from cenote.jobs.probe import Comparison, MethodResult

POOLS = list(catalog_methods(room="pool", kind="sets"))
CLASSES = ("heron", "kingfisher", "motmot", "trogon", "jacana")


def method_names(count: int) -> list[str]:
    """`mean` and others: the catalog's own names first, then invented ones."""
    known = ["mean", *(m.name for m in POOLS if m.name != "mean")]
    return [*known, *(f"invented-pooling-{i}" for i in range(count))][:count]


def make_comparison(
    methods: int | list[str] = 9,
    *,
    seeds: int = 3,
    epochs: int = 24,
    metric_name: str = "accuracy",
    classes: tuple[str, ...] = CLASSES,
    seed: int = 0,
    resamples: int = 9999,
    **changes: Any,
) -> Comparison:
    """A comparison whose numbers fit together; `changes` replace fields."""
    names = method_names(methods) if isinstance(methods, int) else methods
    rng = np.random.default_rng(seed)
    level = {n: float(v) for n, v in zip(names, 0.86 + 0.09 * rng.beta(2, 2, len(names)), strict=True)}
    level["mean"] = 0.871
    cost = {n: float(10 ** rng.uniform(-1.6, 0.3)) for n in names} | {"mean": 0.019}
    summaries = {m.name: m.summary for m in POOLS}
    order = sorted(names, key=lambda n: -level[n])
    results = []
    for n in order:
        per_seed = tuple(float(v) for v in level[n] + rng.normal(0, 0.006, seeds))
        mean = float(np.mean(per_seed))
        curves = tuple(
            tuple(float(v) for v in mean - 0.3 * np.exp(-np.arange(1, epochs + 1) / 4) + rng.normal(0, 0.006, epochs))
            for _ in range(seeds)
        )
        level[n] = mean
        results.append(
            MethodResult(
                method=n,
                summary=summaries.get(n, "a pooling made up for this page, with a line of words that is rather long"),
                settings={} if n in ("mean", "max") else {"heads": 4, "query_from": "mean"},
                metric=mean,
                interval=(mean - 0.021, mean + 0.019),
                metric_per_seed=per_seed,
                validation_per_seed=tuple(v + 0.004 for v in per_seed),
                learning_rate=5e-3,
                epochs=tuple(int(np.argmax(c)) + 1 for c in curves),
                parameters=int(10 ** rng.uniform(3, 6.5)),
                multiply_adds=int(10 ** rng.uniform(4, 8.5)),
                latency_ms=cost[n],
                seconds=float(rng.uniform(2, 200)),
                train_loss=tuple(tuple(float(2 * np.exp(-e / 6)) for e in range(epochs)) for _ in range(seeds)),
                validation_curve=curves,
            )
        )
    results.sort(key=lambda r: -r.metric)
    order = [r.method for r in results]

    def paired(pairs: list[tuple[str, str]]) -> tuple[PairTest, ...]:
        differences = [level[a] - level[b] for a, b in pairs]
        raw = [float(np.clip(np.exp(-abs(d) * 260), 2 / (resamples + 1), 1)) for d in differences]
        return tuple(
            PairTest(a, b, d, (d - 0.016, d + 0.016), p, q)
            for (a, b), d, p, q in zip(pairs, differences, raw, holm(raw), strict=True)
        )

    fields: dict[str, Any] = {
        "dataset": {
            "name": "birds of the lake",
            "source": "/data/birds/tokens",
            "task": "multiclass",
            "classes": list(classes),
            "items": {"train": 2400, "val": 400, "test": 812},
            "groups": 310,
            "dim": 384,
            "tokens": [196, 196, 196],
            "prefix_tokens": 1,
            "grid": [14, 14],
            "bytes": 1_090_000_000,
        },
        "metric_name": metric_name,
        "results": tuple(results),
        "skipped": {"fisher-vector": "needs at least 1,000 tokens per class to fit its mixture, got 310"},
        "baseline": "mean",
        "winner": order[0],
        "against_baseline": paired([(n, "mean") for n in order if n != "mean"]),
        "against_winner": paired([(n, order[0]) for n in order[1:]]),
        "pairs": paired([(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]),
        "pareto": tuple(order[i] for i in pareto([level[n] for n in order], [cost[n] for n in order])),
        "sentence": "",
        "localisation": {n: float(rng.uniform(0.45, 0.97)) for n in order if n not in ("mean", "max")},
        "provenance": {
            "when": "2026-05-04T10:11:12+00:00",
            "command": "cenote probe birds --methods all --seeds 3 --out cenote-out",
            "versions": {"cenote": "0.1.0", "python": "3.12.1", "torch": "2.9.0"},
            "machine": "Linux x86_64, 8 CPUs, 8 threads",
            "seeds": list(range(seeds)),
            "recipe": {"learning_rates": [0.001, 0.005, 0.02], "epochs": 40, "patience": 8},
            "data_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "bootstrap_resamples": resamples,
        },
    }
    comparison = Comparison(**(fields | changes))
    return comparison if comparison.sentence else verdict.with_sentence(comparison)


def photograph(side: int = 320, seed: int = 0) -> str:
    """Base64 PNG of something that a JPEG compresses like a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    sky, shore = rng.uniform(90, 220, 3), rng.uniform(30, 120, 3)
    pixels = sky * (1 - y[..., None]) + shore * y[..., None]
    middle, lean = rng.uniform(0.35, 0.65, 2), rng.uniform(-0.6, 0.6)
    bird = ((x - middle[1] + lean * (y - middle[0])) / 0.13) ** 2 + ((y - middle[0]) / 0.24) ** 2 < 1
    pixels[bird] = rng.uniform(20, 255, 3)
    pixels = np.clip(pixels + rng.normal(0, 7, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_attention(
    out: Path,
    comparison: Comparison,
    *,
    items: int = 6,
    grid: tuple[int, int] | None = (14, 14),
    images: bool = True,
    labelled: bool = False,
    ids: list[str] | None = None,
    without: tuple[str, ...] = ("max",),
    seed: int = 0,
) -> None:
    """Both attention files; without a grid the items are bags of different sizes."""
    rng = np.random.default_rng(seed)
    names = [r.method for r in comparison.results]
    classes = comparison.dataset["classes"]
    tokens = [grid[0] * grid[1] if grid else int(rng.integers(5, 700)) for _ in range(items)]
    marks = [(rng.random(n) < 0.06).astype(int) for n in tokens]
    tensors: dict[str, torch.Tensor] = {}
    described = []
    for i, n in enumerate(tokens):
        label = classes[i % len(classes)]
        said = {m: label if rng.random() < 0.85 else classes[(i + 1) % len(classes)] for m in names}
        described.append(
            {
                "id": ids[i] if ids else f"lake/img_{i:04d}.jpg",
                "label": label,
                "tokens": n,
                "image": photograph(seed=i) if images else None,
                "predictions": said,
            }
        )
        for m in names:
            if m in without:
                continue
            tensors[f"{m}/{i}"] = torch.from_numpy(_weights(rng, m, n, grid, marks[i] if labelled else None))
    words = {
        "items": described,
        "grid": None if grid is None else list(grid),
        "prefix_tokens": 1,
        "methods": names,
        "token_labels": [[0, *m.tolist()] for m in marks] if labelled else None,
    }
    keep_attention(out, words, tensors)


def keep_attention(out: Path, words: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Both files as a run writes them; without tensors those that lie there."""
    numbers = out / "attention.safetensors"
    files.write_saved(out / "attention.json", numbers, words, load_file(numbers) if tensors is None else tensors)


def _weights(
    rng: np.random.Generator, method: str, n: int, grid: tuple[int, int] | None, marks: np.ndarray | None
) -> np.ndarray:
    if method == "mean":
        return np.full((1, n), 1 / n, dtype=np.float32)
    heads = int(rng.choice([1, 4, 8]))
    if grid:
        y, x = np.mgrid[: grid[0], : grid[1]]
        middle = rng.uniform(0.25, 0.75, (heads, 2)) * grid
        far = ((y[None] - middle[:, :1, None]) ** 2 + (x[None] - middle[:, 1:, None]) ** 2) / rng.uniform(3, 30)
        w = np.exp(-far).reshape(heads, n) + rng.exponential(0.03, (heads, n))
    else:
        w = rng.exponential(1.0, (heads, n)) ** 2
    if marks is not None:
        w = w + marks * rng.uniform(0, 5)
    return (w / w.sum(1, keepdims=True)).astype(np.float32)


def write_run(out: Path, comparison: Comparison | None = None, **attention: Any) -> Comparison:
    """A whole output folder."""
    comparison = comparison or make_comparison()
    out.mkdir(parents=True, exist_ok=True)
    comparison.save(out)
    write_attention(out, comparison, **attention)
    return comparison
