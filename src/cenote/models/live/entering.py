"""Fewer tokens from the first block on: what a projector makes of an image enters a language model only in part.

`Shorten` cuts behind a block; here tokens are taken away before the first one, so that every layer's cache is short. Those that
enter keep their positions; decoded tokens go on at the prompt's length.

Does not know: spans of other edits, which are of the whole prompt; static caches; masks of pairs of tokens; models that hand
features of an image to several blocks.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live.calls import cached
from cenote.models.live.edited import require_module
from cenote.models.live.places import stacks

Choose = Callable[[Tensor, Tensor], Tensor]
FOLLOWS = ("position_ids", "token_type_ids", "mm_token_type_ids")
"""What else is told of each token, on the last axis."""


class Entering:
    """What enters a stack of blocks; None before the model ran.

    Attributes:
        kept: which of the prompt's tokens entered, `[batch, tokens]`.
        rows: which of the projector's rows, `[images, rows]`.
    """

    def __init__(self, choose: Choose, image: Bool[Tensor, "batch tokens"]) -> None:
        self.choose, self.image = choose, image
        self.thread = threading.get_ident()
        self.kept: Tensor | None = None
        self.rows: Tensor | None = None
        self._choosing = False
        self._order: Int[Tensor, "batch left"] | None = None
        self._mask: Bool[Tensor, "batch left"] | None = None
        self._real: Bool[Tensor, "batch tokens"] | None = None

    def projects(self, module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        """The projector ran."""
        if threading.get_ident() != self.thread or self._choosing:
            return
        x, z = args[0], made
        if not isinstance(x, Tensor) or not isinstance(z, Tensor) or x.dim() not in (2, 3):
            raise InputError(f"model: {type(module).__name__} is no map of features [images, tokens, dim] to features")
        x, z = (x[None] if x.dim() == 2 else x), (z[None] if z.dim() == 2 else z)
        # who chooses may run the projector
        self._choosing = True
        try:
            self.rows = self.choose(x, z)
        finally:
            self._choosing = False

    def enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The language model is called: with a prompt, or with tokens behind it."""
        if threading.get_ident() != self.thread:
            return None
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.dim() != 2):
            raise InputError("model: is given a mask of pairs of tokens; use a growing cache (DynamicCache)")
        if cached(given.values()):
            return (), {**given, **self._behind(given)}
        return (), {**given, **self._of_prompt(given)}

    def _of_prompt(self, given: Mapping[str, Any]) -> dict[str, Any]:
        h = given.get("inputs_embeds")
        if not isinstance(h, Tensor):
            raise InputError("model: its language model is not given inputs_embeds, into which features were put")
        batch, tokens = h.shape[:2]
        image = self.image.to(h.device)
        if image.shape[1] != tokens or batch % len(image):
            raise InputError(f"image: is of {list(image.shape)} tokens, and the prompt of {[batch, tokens]}")
        image = image.repeat_interleave(batch // len(image), 0)
        if self.rows is None or self.rows.numel() != int(image.sum()):
            had = "none" if self.rows is None else str(self.rows.numel())
            raise InputError(f"image: has {int(image.sum())} places, and the projector made {had} rows")
        kept = torch.ones_like(image)
        kept[image] = self.rows.flatten()
        mask = given.get("attention_mask")
        self._real = torch.ones_like(kept) if mask is None else mask.bool()
        self.kept = kept & self._real
        order, here = _left_padded(self.kept)
        self._order, self._mask = order, here
        if bool(kept.all()):
            return {}
        positions = given.get("position_ids")
        if positions is None:
            positions = (self._real.cumsum(1) - 1).clamp(min=0)
        new = {
            "inputs_embeds": h[torch.arange(batch, device=h.device)[:, None], order],
            "attention_mask": here.to(torch.long if mask is None else mask.dtype),
            "position_ids": _taken(positions, order),
        }
        for name in FOLLOWS[1:]:
            if isinstance(given.get(name), Tensor):
                new[name] = _taken(given[name], order)
        odd = [n for n, v in given.items() if n not in new and isinstance(v, Tensor) and tokens in v.shape[1:2]]
        if odd:
            raise InputError(
                f"model: its language model is told {odd[0]} of each token, of which nobody knows how it follows"
            )
        return new

    def _behind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if self._mask is None or self._real is None or self.kept is None:
            raise InputError("model: the cache holds a prompt that was not read here; run it inside of this context")
        if bool(self.kept.eq(self._real).all()):
            return {}
        h = given["inputs_embeds"] if isinstance(given.get("inputs_embeds"), Tensor) else given["input_ids"]
        if len(h) != len(self._mask):
            raise InputError(
                f"model: decodes {len(h)} items behind a prompt of {len(self._mask)}; run their prompt first"
            )
        held, tokens = cached(given.values()) or 0, self._mask.shape[1]
        behind = held - tokens + h.shape[1]
        mask = given.get("attention_mask")
        here = self._mask if mask is None else self._mask.to(mask.dtype)
        tail = here.new_ones(len(here), behind) if mask is None else mask[:, -behind:]
        new: dict[str, Any] = {"attention_mask": torch.cat([here, tail], 1)}
        if given.get("position_ids") is None:
            first = self._real.sum(1, keepdim=True) + held - tokens
            new["position_ids"] = first + torch.arange(h.shape[1], device=h.device)
        return new


@contextmanager
def features_entering(
    model: nn.Module,
    projector: nn.Module,
    choose: Choose,
    image: Bool[Tensor, "batch tokens"],
    stack: str | None = None,
) -> Iterator[Entering]:
    """Run a vision-language model of whose image features only some enter the language model; afterwards it is as it was.

    Args:
        model: not compiled.
        projector: a module of it, which maps features to tokens of the language model.
        choose: from what it read `[images, tokens, dim]` and made `[images, rows, width]`, to which rows enter, bool.
        image: which of the prompt's tokens take the rows, in their order.
        stack: path of the language model's list of blocks; None for the last one.

    Returns:
        What entered.

    Raises:
        InputError: for a projector that is not in the model, and where what enters cannot be told.
    """
    require_module(model)
    if projector not in set(model.modules()):
        raise InputError(f"project: {type(projector).__name__} is no module of {type(model).__name__}")
    if not isinstance(image, Tensor) or image.dtype != torch.bool or image.dim() != 2:
        raise InputError("image: expected bool [batch, tokens], such as input_ids == model.config.image_token_id")
    there = list(stacks(model))
    if not there or (stack is not None and stack not in there):
        raise InputError(f"stack: {stack!r} is none of {', '.join(map(repr, there)) or 'the model, which has none'}")
    path = there[-1] if stack is None else stack
    owner = model.get_submodule(path.rpartition(".")[0])
    entering = Entering(choose, image)
    handles = [
        projector.register_forward_hook(entering.projects),
        owner.register_forward_pre_hook(entering.enters, with_kwargs=True),
    ]
    try:
        yield entering
    finally:
        for handle in handles:
            handle.remove()


def _left_padded(kept: Bool[Tensor, "batch tokens"]) -> tuple[Int[Tensor, "batch left"], Bool[Tensor, "batch left"]]:
    """Numbers of the tokens that are kept, padding first, and which are no padding."""
    counts = kept.sum(1, keepdim=True)
    most = int(counts.max())
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, kept.shape[1] - most :]
    at = torch.arange(most, device=kept.device)
    return order, at >= most - counts


def _taken(x: Float[Tensor, "*any tokens"] | Int[Tensor, "*any tokens"], order: Int[Tensor, "batch left"]) -> Tensor:
    x = x.expand(*x.shape[:-2], len(order), x.shape[-1])
    return x.gather(-1, order.expand(*x.shape[:-2], *order.shape))
