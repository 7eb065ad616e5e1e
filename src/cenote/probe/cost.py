"""What a probe costs: numbers to learn, products per item, time per item."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from cenote.core import Bags
from cenote.features.dataset import TokenDataset
from cenote.probe.module import Probe

ITEMS_PER_CALL = 32
CALLS = 15


def parameters(probe: Probe) -> int:
    """Trained numbers of pool and classifier."""
    return sum(p.numel() for p in probe.parameters() if p.requires_grad)


def multiply_adds(probe: Probe, data: TokenDataset) -> int:
    """Multiply-adds in matrix products, convolutions and attention for one item of median length."""
    # the counter's module hooks cannot stand tensors that want a gradient while gradients are off
    without_gradients = copy.deepcopy(probe).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        without_gradients(_typical(data, 1))
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency_ms(probe: Probe, data: TokenDataset) -> float:
    """Median milliseconds per item of median length, in calls of 32 items (fewer where they are huge)."""
    items = max(1, min(ITEMS_PER_CALL, 65536 // max(int(data.lengths().median()), 1)))
    x = _typical(data, items)
    probe.eval()
    probe(x)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        probe(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / items * 1e3


def _typical(data: TokenDataset, items: int) -> torch.Tensor | Bags:
    lengths = data.lengths()
    middle = int(lengths.argsort()[len(lengths) // 2])
    return data.copies(middle, items)
