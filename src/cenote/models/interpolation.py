"""Rotary positions of a decoder pressed together, so that a longer text fits into those that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_positive

BUFFER = "inv_freq"
"""What modules of transformers call how fast each pair of channels turns."""


@contextmanager
def interpolated(model: nn.Module, factor: float) -> Iterator[None]:
    """Within the block position p counts as `p / factor`; afterwards the model is what it was.

    Args:
        model: a decoder with rotary positions.
        factor: new length by old; 1 changes nothing.

    Raises:
        InputError: where the model has no such positions.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023).
    """
    require_positive(factor=factor)
    found: list[tuple[nn.Module, Tensor]] = [
        (module, value) for module in model.modules() if (value := module._buffers.get(BUFFER)) is not None
    ]
    if not found:
        raise InputError(f"model: {type(model).__name__} has no rotary positions; give a decoder such as Llama")
    try:
        for module, speed in found:
            module._buffers[BUFFER] = speed / factor
        yield
    finally:
        for module, speed in found:
            module._buffers[BUFFER] = speed
