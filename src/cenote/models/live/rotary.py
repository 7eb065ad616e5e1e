"""By which angles the attention of a running decoder turns queries and keys, so that they can be had as before.

Does not know: pairs of neighbouring channels (those of this library are half a width apart), positions of several axes, and
positions that attention computes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cenote.core import InputError
from cenote.core.rotary import Angles
from cenote.models.live.calls import Place
from cenote.models.live.edits import BlockEdit, Where, require_where

ARGUMENT = "position_embeddings"
"""What blocks of transformers call them."""


class AnglesRecorder(BlockEdit):
    """The angles that each block is called with, of the tokens of the last call; it changes nothing.

    Args:
        at: the blocks.

    Raises:
        InputError: in use, where blocks are told no angles.
    """

    def __init__(self, at: Where | None = None) -> None:
        at = require_where(at)
        self.at = Where(at.blocks, None, at.stack)
        self.found: dict[tuple[str, int], Angles] = {}

    def begins(self) -> None:
        self.found.clear()

    def given(self, place: Place, h: Tensor, given: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        pair = given.get(ARGUMENT)
        if (
            not isinstance(pair, tuple)
            or len(pair) != 2
            or not all(isinstance(x, Tensor) and x.dim() == 3 for x in pair)
        ):
            raise InputError(
                f"model: block {place.path} is told no cosines and sines of rotary positions; queries and keys as they were "
                f"before positions cannot be had. Give a decoder such as Llama, Mistral or Qwen"
            )
        self.found[place.stack, place.block] = Angles(*pair)
        return given

    def of(self, place: Place) -> Angles:
        """Those of the block of this attention, `[batch or 1, queries, width]`."""
        return self.found[place.stack, place.block]
