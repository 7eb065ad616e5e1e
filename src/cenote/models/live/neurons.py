"""The neurons of feed-forward parts: what they are as a model runs, and decoding with some of them alone.

Found by shapes, not by names: in a block, beside its attention, maps from the states to the neurons (one, two where one gates
the other, or both in one) and one map back, which reads what the neurons are.

Does not know: several experts in a block, maps that are no matrices of numbers (quantised ones), and feed-forward parts as wide
as the states, whose maps cannot be told from those of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from cenote.core import InputError
from cenote.models.live.calls import Place
from cenote.models.live.edits import BlockEdit, Edit, Where, require_where
from cenote.models.live.places import attentions, blocks
from cenote.models.live.shortening import MASKS
from cenote.models.live.swapped import swapped, told_mask

Choose = Callable[[Tensor, Tensor, int], Tensor]


class FeedForward(NamedTuple):
    """Of a block: paths of the maps to its neurons and of the map back, widths of states and neurons, whether one map gates."""

    up: tuple[str, ...]
    down: str
    dim: int
    neurons: int
    gated: bool


def feed_forwards(model: nn.Module) -> dict[Place, FeedForward]:
    """Those of the blocks that have one whose neurons can be told."""
    everywhere = attentions(model)
    inside = {module for place in everywhere for module in place.module.modules()}
    found = {}
    for place in blocks(model, everywhere):
        one = _of_block(place, inside)
        if one is not None:
            found[place] = one
    return found


def _of_block(place: Place, attention: set[nn.Module]) -> FeedForward | None:
    maps = {
        f"{place.path}.{path}": form
        for path, module in place.module.named_modules()
        if module not in attention and (form := _form(module)) is not None
    }
    downs = [(path, form) for path, form in maps.items() if form[0] != form[1]]
    if not downs:
        return None
    down, (neurons, dim) = downs[-1]
    both = [path for path, form in maps.items() if form == (dim, 2 * neurons)]
    up = [path for path, form in maps.items() if form == (dim, neurons)]
    backs = [path for path, form in maps.items() if form == (neurons, dim)]
    if len(backs) != 1 or (len(up), len(both)) not in ((1, 0), (2, 0), (0, 1)):
        return None
    return FeedForward(tuple(up or both), down, dim, neurons, bool(both) or len(up) == 2)


def _form(module: nn.Module) -> tuple[int, int] | None:
    """Widths of what a map reads and writes; None where it's no map of states."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    # of Conv1D, as in GPT-2, the other way round
    return (weight.shape[0], weight.shape[1]) if hasattr(module, "nf") else None


class _OfNeurons(BlockEdit):
    """Base of the edits that know what neurons are, of prompts."""

    counts_itself = True

    def __init__(self, at: Where | None = None) -> None:
        self.at = require_where(at)
        self.prompt = True
        self.real: dict[Place, Bool[Tensor, "batch tokens"]] = {}
        self.of_block: dict[Place, FeedForward] = {}
        self._run: Any = None
        self._model: nn.Module | None = None

    def parts(self, model: nn.Module) -> tuple[Edit, ...]:
        known = feed_forwards(model)
        wanted = [place for place in blocks(model) if place in self.at]
        without = [place.path for place in wanted if place not in known]
        if without:
            raise InputError(
                f"model: the neurons of {without[0]} cannot be told: expected one feed-forward part, maps of numbers to "
                f"neurons, not as many as the states are wide, and one map back; name other blocks (at=Where(blocks=...))"
            )
        self.of_block, self._model = {place: known[place] for place in wanted}, model
        return (self,)

    def begins(self) -> None:
        self.prompt = True
        self.real.clear()

    def joins(self, run: Any) -> None:
        self._run = run

    def given(self, place: Place, h: Tensor, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if h.shape[-1] != self.of_block[place].dim:
            raise InputError(
                f"model: {place.path} reads states of width {h.shape[-1]}, and its last map writes {self.of_block[place].dim}; "
                f"which of its maps leads to the neurons cannot be told"
            )
        self.prompt = not self._run.decoding
        if self.prompt:
            name = next((name for name in MASKS if isinstance(given.get(name), Tensor)), "")
            real = told_mask(given.get(name), h)
            self.real[place] = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if real is None else real
        return given


class NeuronRecorder(_OfNeurons):
    """What the neurons of feed-forward parts are, as the map back reads them, of the last prompt; the model runs as it would.

    Args:
        at: the blocks.

    Attributes:
        found: of a block, `[batch, tokens, neurons]`.
        real: True = a real token, `[batch, tokens]`.
    """

    def __init__(self, at: Where | None = None) -> None:
        super().__init__(at)
        self.found: dict[Place, Float[Tensor, "batch tokens neurons"]] = {}
        self._handles: list[RemovableHandle] = []

    def begins(self) -> None:
        super().begins()
        self.found.clear()

    def joins(self, run: Any) -> None:
        super().joins(run)
        assert self._model is not None
        for place, known in self.of_block.items():
            module = self._model.get_submodule(known.down)
            self._handles.append(module.register_forward_pre_hook(self._reads(place)))

    def _reads(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def reads(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.prompt or not self._run.hears():
                return
            activations = args[0].detach()
            self.found[place] = activations.view(*self.real[place].shape, -1)
            self._run.counts(self, place, 1)

        return reads

    def ends(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._run = self._model = None


class SlicedNeurons(_OfNeurons):
    """Decoding with some of the neurons alone: those that are chosen when a prompt was read, which all of them read.

    `y = W_down[:, C] (act(W_gate[C] x) * W_up[C] x)`, in every step behind the prompt; biases likewise. Needs a cache:
    without one every step is a prompt. Equal to all neurons with the others set to zero.

    Args:
        choose: from what the neurons were on the prompt `[batch, tokens, neurons]`, which tokens are real, and the number of
            the block, to which neurons are used, bool `[batch, neurons]`.
        at: the blocks.

    Attributes:
        chosen: of a block, bool `[batch, neurons]`.
    """

    def __init__(self, choose: Choose, at: Where | None = None) -> None:
        super().__init__(at)
        self.choose = choose
        self.chosen: dict[Place, Bool[Tensor, "batch neurons"]] = {}
        self._seats: dict[Place, _Seat] = {}
        self._inside = ExitStack()

    def begins(self) -> None:
        super().begins()
        self.chosen.clear()

    def joins(self, run: Any) -> None:
        super().joins(run)
        model = self._model
        assert model is not None
        places: dict[Place | str, nn.Module | Callable[[nn.Module], nn.Module]] = {}
        for place, known in self.of_block.items():
            seat = self._seats[place] = _Seat(self, place)
            places |= {path: _Narrow(model.get_submodule(path), seat, 0) for path in known.up}
            places[known.down] = _Narrow(model.get_submodule(known.down), seat, 1)
        self._inside.enter_context(swapped(model, places))

    def ends(self) -> None:
        self._inside.close()
        self._seats.clear()
        self._run = self._model = None

    def reads(self, place: Place, activations: Tensor) -> None:
        """A prompt came by: which neurons are used behind it."""
        real = self.real[place]
        neurons = activations.shape[-1]
        chosen = self.choose(activations.detach().view(*real.shape, neurons), real, place.block)
        if chosen.dtype != torch.bool or chosen.shape != (len(real), neurons):
            raise InputError(
                f"choose: gave {chosen.dtype} {tuple(chosen.shape)} at {place.path}, expected bool {(len(real), neurons)}"
            )
        if not bool(chosen.any(1).all()):
            raise InputError(f"choose: left no neuron of some item at {place.path}")
        self.chosen[place] = chosen
        self._run.looks(self)
        self._seats[place].narrow(chosen)

    def acts(self, place: Place) -> bool:
        """Whether this call is behind a prompt, in the thread that entered."""
        return not self.prompt and place in self.chosen and self._run is not None and self._run.hears()

    def counts(self, place: Place) -> None:
        self._run.counts(self, place, int((~self.chosen[place]).sum()) or 1)


class _Seat:
    """Of one block: the neurons that are used, `[batch or 1, used]`, and what only fills up."""

    def __init__(self, edit: SlicedNeurons, place: Place) -> None:
        self.edit, self.place = edit, place
        self.used: Int[Tensor, "_batch used"] | None = None
        self.real: Bool[Tensor, "_batch used"] | None = None
        self.weights: dict[int, tuple[Tensor, Tensor | None]] = {}

    def narrow(self, chosen: Bool[Tensor, "batch neurons"]) -> None:
        if bool((chosen == chosen[:1]).all()):
            chosen = chosen[:1]
        counts = chosen.sum(1, keepdim=True)
        most = int(counts.max())
        self.used = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        self.real = torch.arange(most, device=chosen.device) < counts
        self.weights.clear()


class _Narrow(nn.Module):
    """A map to or from the neurons, of those that are used; `axis` 0 = to them, 1 = from them. The old map is no submodule."""

    def __init__(self, old: nn.Module, seat: _Seat, axis: int) -> None:
        super().__init__()
        self._old: tuple[Any] = (old,)
        self._seat, self._axis = seat, axis

    def forward(self, x: Float[Tensor, "*any width"]) -> Float[Tensor, "*any out"]:
        seat, edit, (old,) = self._seat, self._seat.edit, self._old
        if not edit.acts(seat.place):
            if self._axis and edit.prompt and edit._run is not None and edit._run.hears():
                edit.reads(seat.place, x)
            made: Tensor = old(x)
            return made
        if id(self) not in seat.weights:
            seat.weights[id(self)] = self._of_used()
        weight, bias = seat.weights[id(self)]
        if self._axis:
            edit.counts(seat.place)
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        if len(x) != len(weight):
            raise InputError(
                f"model: {seat.place.path} decodes {len(x)} items behind a prompt of {len(weight)}; run their prompt first"
            )
        y = x @ weight.mT
        return y if bias is None else y + bias.view(-1, 1, bias.shape[-1])

    def _of_used(self) -> tuple[Tensor, Tensor | None]:
        """Rows (or columns) of the weight that are used, once for all items where they use the same."""
        (old,), seat = self._old, self._seat
        assert seat.used is not None
        assert seat.real is not None
        weight = old.weight.detach() if isinstance(old, nn.Linear) else old.weight.detach().T
        bias = None if old.bias is None else old.bias.detach()
        used, real = seat.used, seat.real
        neurons = self._seat.edit.of_block[seat.place].neurons
        if not self._axis and weight.shape[0] == 2 * neurons:
            used, real = torch.cat([used, used + neurons], 1), real.repeat(1, 2)
        if self._axis:
            picked = weight[:, used].transpose(0, 1)
            # what fills up adds nothing
            picked = picked if bool(real.all()) else picked.masked_fill(~real[:, None], 0.0)
        else:
            picked = weight[used]
            bias = None if bias is None else bias[used]
        if len(used) > 1:
            return picked.contiguous(), bias
        return picked[0].contiguous(), bias if bias is None or self._axis else bias[0]
