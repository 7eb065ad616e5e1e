"""PoNet's mixer in the place of self-attention of an encoder that somebody else built.

Source: Tan et al., "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.mix.base import Mixer
from cenote.mix.branches import branches_of, is_causal
from cenote.mix.ponet.mixer import PoNetMixer
from cenote.models.live import Place, as_mixer, attentions, swapped


class PoNetPlace(Mixer):
    """A `PoNetMixer` where attention stood, which keeps the global weights of its last call.

    Attributes:
        mixer: with the parameters.
        weights: of the global view; None before the first call.
    """

    def __init__(self, mixer: PoNetMixer, segments: Tensor | None = None, special: Tensor | None = None) -> None:
        super().__init__()
        self.mixer, self.segments, self.special = mixer, segments, special
        self.weights: Tensor | None = None

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        found = self.mixer.view(x, mask, self.segments, self.special)
        self.weights = found.weights
        return found.output


@contextmanager
def ponet_for_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    make: Callable[[int, int, bool], PoNetMixer] | None = None,
    *,
    segments: Int[Tensor, "batch tokens"] | None = None,
    special: Bool[Tensor, "batch tokens"] | None = None,
    blocks: Collection[int] | None = None,
) -> Iterator[dict[int, PoNetPlace]]:
    """Run an encoder with PoNet's mixer for attention; skips, norms and perceptrons stay; on leaving it is what it was.

    Args:
        model: in eval mode when this is entered; not causal.
        inputs: with which it is run once, to see where attention begins and ends.
        make: builds a mixer from width, heads, and whether a last map belongs into attention's place (it does not where the
            model has one behind); default: `PoNetMixer` with these, in 64 segments of equal length.
        segments, special: of the texts that run in this block of code, as of `PoNetMixer.view`.
        blocks: numbers; None for all.

    Returns:
        What stands in the blocks, by number: its `mixer` to be trained, its `weights` `[batch, heads, tokens]`.

    Raises:
        InputError: for a causal model: the global and the segment view look ahead.
    """
    if is_causal(model, inputs):
        raise InputError(
            "model: reads from left to right; PoNet's global and segment views look ahead, so it cannot be"
        )
    found = branches_of(model, inputs, blocks)
    places = {place.block: place for place in attentions(model) if place.kind == "self"}
    standing: dict[int, PoNetPlace] = {}
    modules: dict[Place | str, nn.Module | Callable[[nn.Module], nn.Module]] = {}
    for number, at in found.items():
        place = places[number]
        out = at.projection.startswith(f"{place.path}.")
        heads = _heads(place.module)
        mixer = PoNetMixer(at.dim, heads, out=out) if make is None else make(at.dim, heads, out)
        standing[number] = PoNetPlace(mixer, segments, special)
        modules[place] = as_mixer(standing[number])
    with swapped(model, modules):
        yield standing


def _heads(attention: nn.Module) -> int:
    config = getattr(attention, "config", None)
    for holder, name in (
        (attention, "num_attention_heads"),
        (attention, "num_heads"),
        (config, "num_attention_heads"),
    ):
        number = getattr(holder, name, None)
        if isinstance(number, int):
            return number
    return 1
