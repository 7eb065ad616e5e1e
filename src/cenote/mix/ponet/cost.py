"""What mixing costs as texts get longer: seconds, and the power of the length that they grow with.

Source: Tan et al., "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences", ICLR 2022, section 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.base import Mixer

LENGTHS = (1024, 2048, 4096, 8192)


class Growth(NamedTuple):
    """Of a mixer.

    Attributes:
        seconds: of the fastest of some forward passes, by number of tokens.
        exponent: of the tokens, by least squares of logarithms: 1 where time is linear in them, 2 where it is quadratic.
        largest: numbers in the largest tensor that a pass makes, by number of tokens.
    """

    seconds: dict[int, float]
    exponent: float
    largest: dict[int, int]


@torch.no_grad()
def growth(mixer: Mixer, dim: int, lengths: Sequence[int] = LENGTHS, repeats: int = 3) -> Growth:
    """Time a mixer on texts of growing length, one at a time.

    Args:
        mixer: in eval mode.
        dim: width of the tokens that it takes.
        lengths: two or more numbers of tokens.
        repeats: passes of each, of which the fastest counts.
    """
    require_at_least(1, repeats=repeats)
    if len(set(lengths)) < 2:
        raise InputError(f"lengths: expected two or more, got {list(lengths)}")
    seconds, largest = {}, {}
    for n in lengths:
        x = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(0))
        with _Largest() as made:  # type: ignore[no-untyped-call]
            mixer(x)
        largest[n] = made.numbers
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            mixer(x)
            times.append(time.perf_counter() - begun)
        seconds[n] = min(times)
    xs, ys = [math.log(n) for n in seconds], [math.log(max(s, 1e-9)) for s in seconds.values()]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)
    return Growth(seconds, slope, largest)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """How many numbers the largest tensor has that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return found
