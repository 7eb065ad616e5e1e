"""How much faster DINOv2-small is with fewer patches: half of them behind block 6, and a quarter behind block 4.

All ways run in turn in one process, each round in another order; a ratio is of two runs of one round, and of processor seconds,
as others may use the machine meanwhile. What the reducer itself takes stands beside. Blocks are counted from 1, as people do.

    python -m benchmarks.reduce_vit [--models FOLDER] [--json FILE] [--threads N] [--rounds N] [--images N] [--pixels N]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import Spread, machine

import cenote
from cenote.models.live import Shorten, edited

MODEL = "dinov2-small"
PLAIN = "unreduced"
CUTS = {"50 % behind block 6": (5, 0.5, 1.25), "25 % behind block 4": (3, 0.25, 1.9)}
"""Index of the block, the share that is left, and how many times faster it is meant to be."""
ARMS = ("random-drop", "top-attention", "evit", "token-pooling", "token-pooling-means", "dpc-knn", "tome", "ppt", "bat")
ROWS = {"token-pooling": "all", "token-pooling-means": "all"}
WARM_UP = 1


class Timed:
    """A reducer that knows what processor seconds it has taken."""

    def __init__(self, reducer: Any) -> None:
        self.reducer, self.needs, self.seconds = reducer, set(reducer.needs), 0.0

    def __call__(self, x: Any, sizes: Any = None, mask: Any = None, protect: Any = None, **signals: Any) -> Any:
        start = time.process_time()
        found = self.reducer(x, sizes, mask, protect, **signals)
        self.seconds += time.process_time() - start
        return found


def ways(model: Any, pixels: torch.Tensor) -> dict[tuple[str, str], Callable[[], tuple[float, float]]]:
    """Of a cut and an arm: runs the model once, and gives the processor seconds of that and of the reducer in it; entering the
    model, which is done once for all batches, is not counted."""

    def ran() -> float:
        start = time.process_time()
        model(pixel_values=pixels)
        return time.process_time() - start

    def plain() -> tuple[float, float]:
        return ran(), 0.0

    def reduced(name: str, block: int, share: float) -> tuple[float, float]:
        reducer = Timed(cenote.create(name, fraction=share))
        with edited(model, Shorten(reducer, block, protect=1, rows=ROWS.get(name, "first"))):
            return ran(), reducer.seconds

    found: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {(PLAIN, PLAIN): plain}
    for cut, (block, share, _) in CUTS.items():
        for name in ARMS:
            found[cut, name] = lambda name=name, block=block, share=share: reduced(name, block, share)  # type: ignore[misc]
    return found


@torch.no_grad()
def measured(model: Any, pixels: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """One row for each cut and arm."""
    calls = ways(model, pixels)
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in calls}
    own: dict[tuple[str, str], list[float]] = {way: [] for way in calls}
    order = list(calls)
    for turn in range(WARM_UP + rounds):
        random.Random(turn).shuffle(order)
        for way in order:
            whole, reducing = calls[way]()
            if turn >= WARM_UP:
                seconds[way].append(whole)
                own[way].append(reducing)
    rows = []
    plain = seconds[PLAIN, PLAIN]
    for (cut, name), times in seconds.items():
        row: dict[str, Any] = {
            "cut": cut,
            "arm": name,
            "images per second": asdict(Spread.of([len(pixels) / t for t in times])),
            "times as fast": asdict(Spread.of([a / b for a, b in zip(plain, times, strict=True)])),
            "reducer ms": asdict(Spread.of([1e3 * t for t in own[cut, name]])),
        }
        if cut in CUTS:
            row["target"] = CUTS[cut][2]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of DINOv2-small with fewer patches.")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    import transformers

    model = transformers.AutoModel.from_pretrained(given.models / MODEL, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(given.images, 3, given.pixels, given.pixels, generator=generator)
    rows = measured(model, pixels, given.rounds)
    for row in rows:
        speed, ratio, own = row["images per second"], row["times as fast"], row["reducer ms"]
        print(
            f"{row['cut']:>20}  {row['arm']:<22} {speed['median']:7.2f} images/s  {ratio['median']:5.2f}x "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})  reducer {own['median']:7.2f} ms"
        )
    if given.json is not None:
        content = {
            "machine": machine(),
            "model": MODEL,
            "images": given.images,
            "pixels": given.pixels,
            "rounds": given.rounds,
            "rows": rows,
        }
        given.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
