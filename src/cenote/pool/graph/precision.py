"""Choices that rounding does not turn over: which node joins which, which stays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

TIE = 1e-9


def ranks(scores: Float[Tensor, "rows"], group: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Whole numbers in the order of the scores of each group, equal where scores are equal to rounding.

    Of the sorted scores of a group, neighbours closer than `1e-9` of the group's largest magnitude have one rank. So ties of a
    graph's own symmetry stay ties, however the sums were ordered that its scores were computed by.

    Args:
        scores: in float64; those of less precision are equal only where they are the same number.
        group: a score's rank says nothing about another group's.

    Example:
        >>> ranks(torch.tensor([0.5, 0.1, 0.5 + 1e-13], dtype=torch.float64), torch.tensor([0, 0, 0])).tolist()
        [1, 0, 1]
    """
    if not scores.numel():
        return group
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    largest = scores.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, scores.abs(), "amax")
    tie = TIE * largest[group[order][1:]] if scores.dtype == torch.float64 else 0.0
    steps = (scores[order].diff() > tie).cumsum(0)
    return torch.empty_like(order).index_copy(0, order, nn.functional.pad(steps, (1, 0)))


def in_double(owner: nn.Module, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`, computed in float64 with the owner's parameters, and given back in the arguments' precision.

    In float64 rounding moves scores by some `1e-16`, so that `ranks` decides alike whoever else is in the batch (two scores
    whose distance is `1e-9` to its last digits could still fall either way). Gradients reach the parameters as they are.

    Args:
        owner: whose parameters and buffers the call reads.
        call: a method of the owner or of a part of it.
        arguments: tensors, and tuples of them. The first tensor with fractions says the precision of the result.
    """
    dtype = next((t.dtype for t in _tensors(arguments) if t.is_floating_point()), torch.float64)
    device = next((t.device for t in _tensors(arguments)), torch.device("cpu"))
    if dtype == torch.float64 or device.type == "mps":  # has no float64
        return call(*arguments)
    holder = _Call(owner, call)
    state = dict(chain(holder.named_parameters(), holder.named_buffers()))
    wide = {name: _to(t, torch.float64) for name, t in state.items()}
    result = torch.func.functional_call(holder, wide, _to(arguments, torch.float64))
    with torch.no_grad():
        # running statistics were moved in the copies
        for name, buffer in holder.named_buffers():
            if buffer is not wide[name]:
                buffer.copy_(wide[name])
    return _to(result, dtype)


class _Call(nn.Module):
    """A call as a module, which is what parameters are replaced in."""

    def __init__(self, owner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.owner = owner
        self.call = call

    def forward(self, *arguments: Any) -> Any:
        return self.call(*arguments)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple) else []


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_to(v, dtype) for v in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value
