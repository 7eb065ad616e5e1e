"""What a probe costs: numbers to learn, products per item, time per item."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from cenote.core import Bags
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe.module import Probe

ITEMS_PER_CALL = 32
CALLS = 15


def parameters(probe: Probe) -> int:
    """Trained numbers of pool and classifier."""
    return sum(p.numel() for p in probe.parameters() if p.requires_grad)


def multiply_adds(probe: Probe, data: TokenDataset) -> int:
    """Multiply-adds in matrix products, convolutions and attention for one item of median length."""
    without_gradients = copy.deepcopy(probe).eval().requires_grad_(False)
    with OperationCounter() as counter:
        without_gradients(_typical(data, 1))
    return counter.operations // 2


class OperationCounter(TorchDispatchMode):
    """Counts what `torch.utils.flop_counter.FlopCounterMode` counts; that one loads torch's compiler, which takes a second.

    Two for a multiply-add, in `operations`.

    Args:
        others: how to count operations that torch does not count, given their arguments' shapes.
    """

    def __init__(self, others: Mapping[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._counts = {**flop_registry, **{op: shape_wrapper(count) for op, count in (others or {}).items()}}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # to be skipped, a mode must know the compiler
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        count = self._counts.get(func.overloadpacket)
        if count is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.operations += 0 if count is None else count(*args, **kwargs, out_val=out)
        return out


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
