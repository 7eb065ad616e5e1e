"""Attention maps of a model as it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import RowRecorder, Where, attentions, edited


@contextmanager
def maps(model: nn.Module, name: str) -> Iterator[list[Float[Tensor, "batch heads tokens tokens"]]]:
    """Attention weights of all blocks, in order, of the one run inside; there on leaving.

    The model runs with the attention function that it was loaded with.

    Raises:
        InputError: where the model has no attention, or one that cannot be reached.
    """
    found: list[Tensor] = []
    if not attentions(model):
        raise InputError(
            f"attentions: {name} gives no attention weights: it has no attention; leave attentions out, or use a transformer"
        )
    recorder = RowRecorder("all", Where(kinds=("self", "joint")))
    with ExitStack() as stack:
        try:
            stack.enter_context(edited(model, recorder))
        except InputError as error:
            raise InputError(
                f"attentions: {name} gives no attention weights ({error}); its hidden states can be had"
            ) from error
        yield found
    found += [rows for steps in recorder.found.values() for rows in steps]
