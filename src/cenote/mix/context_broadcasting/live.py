"""Context broadcasting in a network that somebody else built, and training with it as the only change.

Source: Nam et al., "Scratching Visual Transformer's Back with Uniform Attention", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import padding_of
from cenote.core.requirements import require_one_of
from cenote.mix.base import Mixer
from cenote.mix.branches import Before, Behind, branches_of, is_causal
from cenote.mix.context_broadcasting.broadcasting import ContextBroadcasting
from cenote.mix.vision import SPOTS, Spot
from cenote.models.live import Place, swapped


@contextmanager
def broadcasting(
    model: nn.Module,
    inputs: Mapping[str, Any],
    make: Callable[[int], Mixer] | None = None,
    *,
    spot: Spot = "mlp end",
    blocks: Collection[int] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Iterator[dict[int, Mixer]]:
    """Run a model with a mixer in each block's branch; on leaving, the model is what it was, also after an exception.

    Args:
        model: in eval mode when this is entered; any transformer whose blocks can be reached.
        inputs: with which it is run once, to see where its branches begin and end.
        make: builds a mixer from the width at the place; default: `ContextBroadcasting`.
        spot: `"attention front"`, `"attention middle"` (before the output's map), `"attention end"`, `"mlp front"`,
            `"mlp middle"`, or `"mlp end"`, before the skip.
        blocks: numbers; None for all.
        mask: True = a real token, of all that runs in this block of code; by default the inputs' `attention_mask`, where it
            tells of padding.

    Returns:
        The mixers by block, to be trained where they have parameters.

    Raises:
        InputError: for a causal model, unless the mixers are causal; where the place cannot be told.

    Source:
        Nam et al. 2023, arXiv 2210.08457; that the end of the MLP is the place is inferred.
    """
    require_one_of(SPOTS, spot=spot)
    mask = padding_of(inputs) if mask is None else mask
    found = branches_of(model, inputs, blocks)
    mixers = {
        number: ContextBroadcasting() if make is None else make(at.neurons if spot == "mlp middle" else at.dim)
        for number, at in found.items()
    }
    if not all(mixer.causal for mixer in mixers.values()) and is_causal(model, inputs):
        raise InputError(
            "model: reads from left to right, and the mean of all tokens would tell it what comes later; give causal mixers, "
            "such as ContextBroadcasting(running=True)"
        )
    places: dict[Place | str, nn.Module | Callable[[nn.Module], nn.Module]] = {}
    for number, at in found.items():
        if spot == "attention front" and not at.norm:
            raise InputError(
                f"spot: block {number} has no norm before its attention; there is no place before it alone"
            )
        paths = {
            "attention front": (at.norm,),
            "attention middle": (at.projection,),
            "attention end": (at.projection,),
            "mlp front": at.up,
            "mlp middle": (at.down,),
            "mlp end": (at.down,),
        }[spot]
        for path in paths:
            places[path] = _standing(mixers[number], spot, mask)
    with swapped(model, places):
        yield mixers


def _standing(mixer: Mixer, spot: Spot, mask: Tensor | None) -> Callable[[nn.Module], nn.Module]:
    if spot in ("attention front", "attention end", "mlp end"):
        return lambda old: Behind(old, mixer, mask)
    return lambda old: Before(mixer, old, mask)
