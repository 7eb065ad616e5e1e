"""Token-aware pooling and the diversification loss on a vision transformer that somebody else trained.

Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.mix.base import GridMixer
from cenote.mix.branches import Before, branches_of
from cenote.mix.tap_adl.diversification import attention_diversification
from cenote.mix.tap_adl.pooling import TokenAwarePooling
from cenote.models.live import Place, recorded, swapped


class Diversified(NamedTuple):
    """What a model gave, and the diversification loss of its attention, with a graph."""

    output: Any
    loss: Float[Tensor, ""]


@contextmanager
def pooled_before_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    make: Callable[[int], GridMixer] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 1,
    blocks: Collection[int] | None = None,
) -> Iterator[dict[int, GridMixer]]:
    """Run a model whose blocks pool their tokens before attention; weights stay, what is added to is not pooled.

    Args:
        model: in eval mode when this is entered; its norms stand before attention.
        inputs: with which it is run once, to see where.
        make: builds a mixer of the grid from the width; default: `TokenAwarePooling` of four scales.
        grid: rows and columns of patches; None for a square.
        prefix: tokens before them, which are left alone: the class token, registers.
        blocks: numbers; None for all.

    Returns:
        The mixers by block, to be trained.

    Raises:
        InputError: where no norm stands before attention.
    """
    found = branches_of(model, inputs, blocks)
    mixers: dict[int, GridMixer] = {}
    places: dict[Place | str, nn.Module | Callable[[nn.Module], nn.Module]] = {}
    for number, at in found.items():
        if not at.norm:
            raise InputError(
                f"model: block {number} has no norm before its attention; so its tokens cannot be pooled for that alone"
            )
        mixer = TokenAwarePooling(at.dim, grid=grid, prefix=prefix) if make is None else make(at.dim)
        mixers[number], places[at.norm] = mixer, _before(mixer)
    with swapped(model, places):
        yield mixers


def diversified(model: nn.Module, inputs: Mapping[str, Any], threshold: float = 2.0) -> Diversified:
    """Run a model, and the attention diversification loss of all its blocks; nothing of it stays behind.

    Args:
        model: any whose attention can be reached.
        inputs: of its forward.
        threshold: as of `attention_diversification`.
    """
    with recorded(model, "rows", rows="all", detach=False) as found:
        output = model(**inputs)
    return Diversified(output, attention_diversification([steps[0] for steps in found["rows"].values()], threshold))


def _before(mixer: GridMixer) -> Callable[[nn.Module], nn.Module]:
    return lambda norm: Before(mixer, norm)
