"""What every adapter gives: a model's tokens, its hidden states and its attentions, and how they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError

Kind = Literal["image", "audio", "text"]


class Prepared(NamedTuple):
    """A batch as the model takes it.

    `inputs` are the arguments of its forward, `cut` says how many items were cut to the model's longest input.
    """

    inputs: dict[str, Tensor]
    cut: int = 0


class States(NamedTuple):
    """What one call of a model gives.

    `layers`: chosen hidden states by their numbers, `[batch, tokens, dim]`; `mask`: True = a real token, `None` where all
    are; `attentions`: per block `[batch, heads, tokens, tokens]`, where they were asked for.
    """

    layers: dict[int, Float[Tensor, "batch tokens dim"]]
    mask: Bool[Tensor, "batch tokens"] | None
    attentions: tuple[Float[Tensor, "batch heads tokens tokens"], ...] | None = None


@dataclass(frozen=True)
class Identity:
    """Which weights these are, and which code, where it lies with them; `name` is for people, the rest decides the numbers."""

    name: str
    revision: str | None
    library: str
    model_class: str
    weights_sha256: str
    config_sha256: str
    code_sha256: str | None = None


@dataclass(frozen=True)
class Layout:
    """How a model's tokens lie, found by showing it one sample.

    Attributes:
        kind: what it takes.
        blocks: number of layers; hidden state 0 is the embeddings, the last one the model's output.
        dims: width of each hidden state, `blocks + 1` numbers.
        tokens: of the sample, per hidden state.
        prefix_tokens: leading tokens that are [CLS], registers, a distillation token, a beginning of text.
        grid: `(height, width)` of the other tokens, where they form one.
        heads: of a block, where the model says so.
        parameters: how many.
        sample: in words.
        preprocessing: settings of the preprocessing.
        notes: what had to be guessed, or looks odd.
    """

    kind: Kind
    blocks: int
    dims: tuple[int, ...]
    tokens: tuple[int, ...]
    prefix_tokens: int
    grid: tuple[int, int] | None
    heads: int | None
    parameters: int
    sample: str
    preprocessing: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())


class Backbone(ABC):
    """A frozen model.

    Attributes:
        identity: which one.
        layout: how its tokens lie.
        precision: what it computes in.
        equal_sizes: True where a batch must hold inputs of one length, because the model has no mask for padding.
        libraries: whose versions decide what it is given, besides those that always do.
    """

    identity: Identity
    layout: Layout
    precision: torch.dtype
    equal_sizes = False
    libraries: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, items: Sequence[Any]) -> Prepared:
        """Preprocessed items: `PIL.Image`, `(samples, rate)` or text."""

    @abstractmethod
    def states(self, prepared: Prepared, layers: Sequence[int] | None = None, attentions: bool = False) -> States:
        """Hidden states of a batch.

        Args:
            prepared: by `prepare`.
            layers: numbers from 0 (the embeddings) to `layout.blocks` (the model's output); default: the output alone.
            attentions: also give the attention weights of every block.

        Raises:
            InputError: where there is no such layer, or the model has no attention weights to give.
        """

    def lengths(self, items: Sequence[Any], layer: int) -> list[int]:
        """How many real tokens each item has in a hidden state."""
        states = self.states(self.prepare(items), (layer,))
        x = states.layers[layer]
        return [x.shape[1]] * x.shape[0] if states.mask is None else states.mask.sum(1).tolist()

    def forward(self, prepared: Prepared) -> Any:
        """The model's own forward and nothing else: what extraction is measured against."""
        return self.states(prepared)

    def twin(self) -> Backbone | None:
        """The same model for a second thread, with the same weights in memory; `None` where there is none to be had."""
        return None

    @abstractmethod
    def to(self, device: str) -> Backbone:
        """The same on another device."""

    def __call__(self, items: Sequence[Any], layers: Sequence[int] | None = None, attentions: bool = False) -> States:
        """`states(prepare(items))`."""
        return self.states(self.prepare(items), layers, attentions)


def chosen_layers(wanted: str | int | Sequence[int] | None, layout: Layout) -> tuple[int, ...]:
    """Numbers of hidden states.

    Args:
        wanted: `None` or `"last"`: the model's output; else see `layer_numbers`.
        layout: of the model.

    Raises:
        InputError: where there is no such layer, or the chosen ones differ in width or tokens.

    Example:
        >>> layout = Layout("text", 6, (8,) * 7, (5,) * 7, 1, None, 2, 100, "a text", {})
        >>> chosen_layers("0,4-6", layout), chosen_layers(-1, layout)
        ((0, 4, 5, 6), (6,))
    """
    made = layer_numbers(wanted, range(layout.blocks + 1))
    shapes = {(layout.tokens[n], layout.dims[n]) for n in made}
    if len(shapes) > 1:
        listed = ", ".join(f"layer {n}: {layout.tokens[n]} x {layout.dims[n]}" for n in made)
        raise InputError(f"layers: they differ in tokens x width ({listed}); choose layers of one shape")
    return made


def layer_numbers(wanted: str | int | Sequence[int] | None, held: Sequence[int]) -> tuple[int, ...]:
    """Which of the layers that are there.

    Args:
        wanted: `None` or `"last"`; `"all"`; a number, several, or a text such as `"0,3,-1"`, `"4-8"`, `"-4:"`. Negative
            numbers count from the last one.
        held: the layers that are there, rising.

    Raises:
        InputError: where one is not there, or the text says nothing.

    Example:
        >>> layer_numbers("-2:", range(7)), layer_numbers("0,2-3", [0, 2, 3])
        ((5, 6), (0, 2, 3))
    """
    if wanted is None or wanted == "last":
        return (held[-1],)
    if wanted == "all":
        return tuple(held)
    numbers = (
        [wanted] if isinstance(wanted, int) else _parsed(wanted, held) if isinstance(wanted, str) else list(wanted)
    )
    made = []
    for number in numbers:
        found = held[number] if -len(held) <= number < 0 else number
        if found not in held:
            listed = f"0 to {held[-1]}" if list(held) == list(range(len(held))) else ", ".join(map(str, held))
            raise InputError(f"layers: there is no layer {number}; there are {listed} (0: the embeddings)")
        made.append(found)
    if not made:
        raise InputError(f"layers: {wanted!r} names none; give last, all, or numbers such as 0,4-6,-1")
    return tuple(sorted(set(made)))


def _parsed(text: str, held: Sequence[int]) -> list[int]:
    numbers: list[int] = []
    for part in map(str.strip, text.split(",")):
        first, dash, last = part.rpartition("-") if not part.startswith("-") else ("", "", part)
        try:
            if ":" in part:
                begin, end = (int(edge) if edge else None for edge in part.split(":"))
                numbers += held[slice(begin, end)]
            elif dash and first:
                if int(first) > int(last):
                    raise ValueError(part)
                # all of a range that is long are never needed to say that one is not there
                numbers += range(int(first), min(int(last), max(held[-1], int(first)) + 1) + 1)
            else:
                numbers.append(int(part))
        except ValueError as error:
            raise InputError(f"layers: expected last, all, or numbers such as 0,4-6,-4:, got {text!r}") from error
    return numbers


def to_device(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs on the model's device, real numbers in the model's type."""
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
