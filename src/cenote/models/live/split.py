"""A model in two parts: the states that a block reads, and the model's output from such states on.

What stands before the blocks runs in both parts, for masks and positions. Blocks that are left out stand aside: they are
called, and answer with the states; where blocks tell the next ones something more, as those of T5 tell the bias of distances,
the first one is asked for it, for one item and as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live.calls import Place
from cenote.models.live.places import blocks, stacks


def stack_blocks(model: nn.Module, stack: str | None = None) -> list[Place]:
    """The blocks of a model's only list of them, or of the list of this path.

    Raises:
        InputError: where there are several lists, or none of that path.
    """
    counts = stacks(model)
    chosen = stack if stack is not None else next(iter(counts)) if len(counts) == 1 else None
    if chosen not in counts:
        there = ", ".join(map(repr, counts)) or "none"
        raise InputError(f"stack: expected the path of a list of blocks, got {stack!r}; there are: {there}")
    return [place for place in blocks(model) if place.stack == chosen]


def states_before(
    model: nn.Module, inputs: Mapping[str, Any], block: int, stack: str | None = None
) -> Float[Tensor, "batch tokens dim"]:
    """What a block reads; those from it on do not run.

    Args:
        model: any with a list of blocks that hold attention.
        inputs: of its forward.
        block: its number; the number of blocks: what the last one writes.
        stack: path of the list.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> x = torch.ones(1, 2, 8)
        >>> torch.equal(states_before(model, {"src": x}, 0), x)
        True
    """
    places = _numbered(model, block, stack)
    found: list[Tensor] = []

    def reads(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    def wrote(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        raise _Enough

    if block < len(places):
        handle = places[block].module.register_forward_pre_hook(reads, with_kwargs=True)
    else:
        handle = places[-1].module.register_forward_hook(wrote)
    try:
        model(**inputs)
    except _Enough:
        return found[0]
    finally:
        handle.remove()
    raise InputError(f"block: {places[min(block, len(places) - 1)].path} did not run")


def from_states(
    model: nn.Module,
    states: Float[Tensor, "batch tokens dim"],
    inputs: Mapping[str, Any],
    block: int,
    stack: str | None = None,
) -> Any:
    """The model's output, where a block reads these states; those before it do not run.

    Args:
        model: as for `states_before`.
        states: what the block reads, or, for the number of blocks, what the last one writes.
        inputs: of the model's forward, of as many items and tokens; only masks and positions of them matter.
        block, stack: as for `states_before`.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> x = torch.ones(1, 2, 8)
        >>> with torch.enable_grad():
        ...     torch.equal(from_states(model, states_before(model, {"src": x}, 2), {"src": x}, 2), model(x))
        True
    """
    places = _numbered(model, block, stack)
    if block == 0:
        handle = places[0].module.register_forward_pre_hook(_given(states), with_kwargs=True)
        try:
            return model(**inputs)
        finally:
            handle.remove()
    with _aside([place.module for place in places[:block]], states):
        return model(**inputs)


def _given(states: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def reads(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    return reads


class _Enough(Exception):
    """Ends a model's forward where what is wanted is there."""


def _numbered(model: nn.Module, block: int, stack: str | None) -> list[Place]:
    places = stack_blocks(model, stack)
    if not 0 <= block <= len(places):
        raise InputError(f"block: expected a number from 0 to {len(places)}, got {block}")
    return places


@contextmanager
def _aside(modules: Sequence[nn.Module], states: Tensor) -> Iterator[None]:
    """For a while these answer with the states."""
    for number, module in enumerate(modules):
        if "forward" in vars(module):
            raise InputError(f"model: block {number} has a forward of its own on the instance; take that away before")
    told: list[tuple[Any, ...]] = []
    try:
        for module in modules:
            module.forward = _Standing(module.forward, type(module), states, told)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


class _Standing:
    """A block's forward, aside: the states in the form in which the block answers."""

    def __init__(self, forward: Callable[..., Any], kind: type, states: Tensor, told: list[tuple[Any, ...]]) -> None:
        self.forward, self.kind, self.states, self.told = forward, kind, states, told

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kind not in _FORMS:
            # once for each class, as it is called here: what it computes is not used
            with torch.no_grad():
                answered = self.forward(*args, **kwargs)
            more = () if isinstance(answered, Tensor) else tuple(answered[1:])
            tells = any(isinstance(value, Tensor) for value in more)
            _FORMS[self.kind] = None if isinstance(answered, Tensor) else ("tells" if tells else len(more))
        form = _FORMS[self.kind]
        if form is None:
            return self.states
        if form != "tells":
            return (self.states, *[None] * form)
        if not self.told:
            self.told.append(tuple(self.forward(self.states.new_zeros(1, *self.states.shape[1:]))[1:]))
        return (self.states, *self.told[0])


_FORMS: dict[type, int | Literal["tells"] | None] = {}
"""Of classes of blocks: a tensor, a tuple with so many values more that say nothing, or with some that do."""
