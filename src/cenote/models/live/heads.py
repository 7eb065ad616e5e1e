"""Heads scaled or taken out, and something added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.models.live.calls import AttentionCall, Place
from cenote.models.live.edits import AttentionEdit, BlockEdit, Where, require_where


class ScaledHeads(AttentionEdit):
    """Outputs of query heads, before the output projection, times a factor each; gradients reach the factors.

    Args:
        factors: of a block's heads, `[heads]`.
        at: the places, of those blocks.
    """

    def __init__(self, factors: Mapping[int, Float[Tensor, "heads"]], at: Where | None = None) -> None:
        self.factors = _tensors("factors", factors)
        self.at = _in_blocks(at, self.factors)

    def context(
        self, call: AttentionCall, y: Float[Tensor, "batch heads queries width"]
    ) -> Float[Tensor, "batch heads queries width"]:
        factors = self.factors[call.place.block]
        if factors.shape != (call.heads,):
            raise InputError(
                f"factors: {tuple(factors.shape)} for block {call.place.block}, and {call.place.path} has {call.heads} heads"
            )
        return y * factors.to(y).view(1, -1, 1, 1)


class AblatedHeads(AttentionEdit):
    """Query heads that give zeros, as if their columns of the output projection were zero.

    Args:
        heads: pairs of block and head, both from 0.
        at: the places, of those blocks.
    """

    def __init__(self, heads: Iterable[tuple[int, int]], at: Where | None = None) -> None:
        self.heads: dict[int, list[int]] = {}
        for pair in heads:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(n, Integral) for n in pair):
                raise InputError(f"heads: expected pairs of block and head, such as [(0, 3)], got {pair!r} among them")
            block, head = pair
            self.heads.setdefault(block, []).append(head)
        self.at = _in_blocks(at, self.heads)

    def context(
        self, call: AttentionCall, y: Float[Tensor, "batch heads queries width"]
    ) -> Float[Tensor, "batch heads queries width"]:
        chosen = self.heads[call.place.block]
        if not all(0 <= head < call.heads for head in chosen):
            raise InputError(
                f"heads: {chosen} of block {call.place.block}, and {call.place.path} has {call.heads} heads"
            )
        return y.index_fill(1, y.new_tensor(chosen).long(), 0.0)


class AddedStates(BlockEdit):
    """Something added to the residual stream behind blocks: to state i + 1 of block i.

    Args:
        vectors: for a block `[dim]`, or anything that broadcasts to `[batch, tokens, dim]`.
        at: the blocks, of those numbers.
    """

    def __init__(self, vectors: Mapping[int, Float[Tensor, "*any dim"]], at: Where | None = None) -> None:
        self.vectors = _tensors("vectors", vectors)
        self.at = _in_blocks(at, self.vectors)

    def leaves(self, place: Place, h: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        vector = self.vectors[place.block]
        missing = h.dim() - vector.dim()
        if missing < 0 or any(own not in (1, of) for own, of in zip(vector.shape, h.shape[missing:], strict=True)):
            raise InputError(
                f"vectors: {tuple(vector.shape)} for block {place.block}, and the states of {place.path} are {tuple(h.shape)}"
            )
        return h + vector.to(h)


def _tensors(name: str, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Of each block a tensor of finite numbers."""
    if not isinstance(given, Mapping):
        raise InputError(f"{name}: expected a tensor for each block, such as {{0: tensor}}, got {type(given).__name__}")
    for block, tensor in given.items():
        if not isinstance(block, Integral):
            raise InputError(f"{name}: expected numbers of blocks, got {block!r}")
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: expected a tensor for block {block!r}, got {type(tensor).__name__}")
        if not tensor.isfinite().all():
            raise InputError(f"{name}: of block {block!r} hold NaN or infinite numbers; see where they were computed")
    return dict(given)


def _in_blocks(at: Where | None, blocks: Iterable[int]) -> Where:
    """These places, of these blocks alone."""
    at = require_where(at)
    named = set(blocks)
    return Where(named if at.blocks is None else named & set(at.blocks), at.kinds, at.stack)
