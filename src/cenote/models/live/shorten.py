"""Fewer tokens from a block on: states, masks, positions and cache of a running model, together."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cenote.core import InputError
from cenote.core.reduced import Reduced, expanded
from cenote.models.live import places
from cenote.models.live.calls import Place, may_read, real_tokens

Reducer = Callable[..., Reduced]


class Shortening:
    """What became of the prompt's tokens; None before the model ran.

    Attributes:
        sizes: how many originals each token stands for, `[batch, left]`.
        assignment: the token that an original went to, -1 where it was dropped or is padding, `[batch, tokens]`.
        origin: of each token the first original that went to it: its position, `[batch, left]`.
        mask: True = a real token, `[batch, left]`.
    """

    def __init__(
        self, reducers: Mapping[int, Reducer], protect: Bool[Tensor, "batch tokens"] | None, proportional: bool
    ) -> None:
        self.reducers, self.protect, self.proportional = reducers, protect, proportional
        self.thread = threading.get_ident()
        # tokens behind the prompt, and whether this call is of them
        self.decoded, self.decoding = 0, False
        self.forgets()

    def forgets(self) -> None:
        """Another prompt begins."""
        self.sizes: Tensor | None = None
        self.assignment: Tensor | None = None
        self.origin: Tensor | None = None
        self.mask: Tensor | None = None
        self.real: Tensor | None = None
        self.causal = False
        # of a block that shortened: origin, mask and sizes behind it, which caches of later blocks hold
        self.stages: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def expand(self, scores: Float[Tensor, "batch left *channels"]) -> Float[Tensor, "batch tokens *channels"]:
        """Scores or states of the tokens that are left, on the originals; zeros where these were dropped."""
        if self.assignment is None:
            raise InputError("model: nothing was shortened yet; run the model first")
        return expanded(scores, self.assignment)

    def reduce(self, block: int, h: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch left dim"]:
        batch, tokens, _ = h.shape
        everything = torch.arange(tokens, device=h.device).expand(batch, -1)
        if self.origin is None:
            self.origin = self.assignment = everything
            self.mask = self.real if self.real is not None else torch.ones_like(everything, dtype=torch.bool)
            self.sizes = self.mask.to(h.dtype)
            self.assignment = everything.masked_fill(~self.mask, -1)
        assert self.sizes is not None
        assert self.mask is not None
        assert self.assignment is not None
        kept = torch.zeros_like(self.mask)
        if self.protect is not None:
            kept = self._protected(batch).gather(1, self.origin) & self.mask
        reduced = self.reducers[block](h, sizes=self.sizes, mask=self.mask & ~kept)
        to = reduced.assignment.masked_fill(~self.mask | kept, -1)
        left = reduced.tokens.shape[1]
        if reduced.assignment.shape != (batch, tokens) or int(to.max()) >= left:
            raise InputError(
                f"reducer: of block {block} gave an assignment {tuple(reduced.assignment.shape)} onto {left} tokens; expected "
                f"{(batch, tokens)}, numbers below {left}, -1 where dropped"
            )
        # tokens of the reducer first, then those that it must not touch, each at the place of its first original
        to = torch.where(kept, left + everything, to)
        first = h.new_full((batch, left + tokens), tokens, dtype=torch.long)
        first.scatter_reduce_(1, to.clamp(min=0), everything.masked_fill(to < 0, tokens), "amin")
        asked = self.mask & ~kept
        if bool((to == everything)[asked].all()) and left == tokens and torch.equal(reduced.tokens[asked], h[asked]):
            return h
        real = first < tokens
        counts = real.sum(1, keepdim=True)
        most = int(counts.max())
        order = first.argsort(dim=1, stable=True)[:, :most]
        at = torch.arange(most, device=h.device).expand(batch, -1)
        if self.causal:
            order = order.gather(1, (at - (most - counts)).clamp(min=0))
            mask = at >= most - counts
        else:
            mask = at < counts
        item = torch.arange(batch, device=h.device)[:, None]
        number = torch.full_like(first, -1)
        rows, slots = mask.nonzero(as_tuple=True)
        number[rows, order[rows, slots]] = slots
        onto = torch.where(to < 0, to, number.gather(1, to.clamp(min=0)))
        self.assignment = torch.where(
            self.assignment < 0, self.assignment, onto.gather(1, self.assignment.clamp(min=0))
        )
        origin = self.origin.gather(1, first.gather(1, order).clamp(max=tokens - 1))
        sizes = torch.cat([reduced.sizes.to(self.sizes), self.sizes], 1)[item, order]
        self.origin, self.mask, self.sizes = origin, mask, sizes * mask
        self.stages[block] = self.origin, self.mask, self.sizes
        return torch.cat([reduced.tokens.to(h), h], 1)[item, order]

    def _protected(self, batch: int) -> Tensor:
        assert self.protect is not None
        assert self.real is None or self.real.shape[1] == self.protect.shape[1]
        return self.protect.expand(batch, -1)

    def looks(self, h: Tensor, given: Mapping[str, Any], causal: bool) -> None:
        """What the prompt's mask says: which tokens are padding, and whether tokens read later ones."""
        mask = given.get("attention_mask")
        self.causal = causal
        if isinstance(mask, Tensor):
            if mask.dim() == 2:
                self.real = mask.bool()
            elif mask.dim() == 4 and mask.shape[2] == mask.shape[3] == h.shape[1]:
                self.real = real_tokens(mask, len(h))
                self.causal = h.shape[1] > 1 and not bool(may_read(mask)[:, :, :-1].triu(1).any())
            else:
                raise InputError(
                    f"model: a mask {tuple(mask.shape)} for {h.shape[1]} tokens cannot be shortened; use a growing cache"
                )

    def rewritten(self, block: int, h: Tensor, given: dict[str, Any], takes_mask: bool) -> dict[str, Any]:
        """A block's other arguments, for the tokens that are left, and those decoded since."""
        before = [number for number in self.stages if number < block]
        if not before or self.assignment is None:
            return given
        origin, real, sizes = self.stages[max(before)]
        new = dict(given)
        prompt = not self.decoding
        if prompt:
            if isinstance(given.get("position_ids"), Tensor):
                new["position_ids"] = _taken(given["position_ids"][..., None], origin)[..., 0]
            if given.get("position_embeddings") is not None:
                new["position_embeddings"] = tuple(_taken(part, origin) for part in given["position_embeddings"])
        mask = given.get("attention_mask")
        bare = mask is None and bool(real.all())
        if not self.proportional and bare:
            return new
        if not takes_mask:
            raise InputError("model: its blocks take no attention_mask; proportional and uneven shortening need it")
        seen = self.assignment.shape[1]
        total = seen + self.decoded
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if self.proportional:
                raise InputError("proportional: sizes cannot be told to flash attention; load with 'sdpa' or 'eager'")
            new["attention_mask"] = torch.cat([real.to(mask.dtype), mask[:, seen:]], 1)
            return new
        if mask is None:
            allowed = torch.ones(1, 1, h.shape[1] if not prompt else seen, total, dtype=torch.bool, device=h.device)
            allowed = allowed.tril(total - allowed.shape[2]) if self.causal else allowed
            mask = torch.zeros(allowed.shape, device=h.device, dtype=h.dtype)
            mask = mask.masked_fill(~allowed, torch.finfo(h.dtype).min)
        if mask.shape[-1] != total:
            raise InputError(
                f"model: a mask of {mask.shape[-1]} keys after {total} tokens cannot be shortened; windows and static caches "
                f"cannot be decoded with: use_cache=False"
            )
        batch = len(origin)
        mask = mask.expand(batch, *mask.shape[1:])
        item = torch.arange(batch, device=h.device)[:, None]
        behind = torch.arange(seen, total, device=h.device).expand(batch, -1)
        keys = torch.cat([origin, behind], 1)
        mask = mask[item, :, :, keys].permute(0, 2, 3, 1)
        if prompt:
            mask = mask[item, :, origin].transpose(1, 2)
        pad = nn.functional.pad
        hidden = ~pad(real, (0, total - seen), value=True)[:, None, None]
        if mask.dtype == torch.bool and not self.proportional:
            new["attention_mask"] = mask & ~hidden
            return new
        lowest = torch.finfo(h.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=h.dtype, device=h.device).masked_fill(~mask, lowest)
        if self.proportional:
            bias = pad(sizes.clamp(min=1e-6), (0, total - seen), value=1.0).log().to(mask)[:, None, None]
            mask = torch.where(mask > lowest / 2, mask + bias, mask)
        new["attention_mask"] = mask.masked_fill(hidden, lowest)
        return new


@contextmanager
def shortened(
    model: nn.Module,
    reducers: Mapping[int, Reducer],
    *,
    stack: str | None = None,
    protect: Bool[Tensor, "batch tokens"] | None = None,
    proportional: bool = False,
) -> Iterator[Shortening]:
    """Run a model with fewer tokens behind some of its blocks; on leaving it is as it was, also after an exception.

    Survivors keep their positions; with a cache, later blocks hold fewer keys.

    Args:
        model: any module whose blocks read states first.
        reducers: of a block, what reduces the states that it wrote: `reducer(x, sizes=, mask=) -> Reduced`. It must leave out
            tokens where its mask is False.
        stack: path of the list of blocks, where there are several.
        protect: tokens that are never touched, `[batch or 1, tokens]`.
        proportional: keys weigh by how many originals they stand for (`log size` is added to scores).

    Raises:
        InputError: where the blocks cannot be shortened.
    """
    hooked = _checked(model, reducers, stack, protect)
    run = Shortening(dict(reducers), protect, proportional)
    handles: list[RemovableHandle] = []
    try:
        for place, causal in hooked:
            handles += _hooks(run, place, causal)
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _checked(
    model: nn.Module, reducers: Mapping[int, Reducer], stack: str | None, protect: Tensor | None
) -> list[tuple[Place, bool]]:
    counts = places.stacks(model)
    path = next(iter(counts)) if stack is None and len(counts) == 1 else stack
    if path is None or path not in counts:
        raise InputError(f"stack: {stack!r} is none of {', '.join(map(repr, counts)) or 'the model, which has none'}")
    if not reducers or not all(0 <= block < counts[path] for block in reducers):
        raise InputError(f"reducers: expected blocks of 0 to {counts[path] - 1}, got {sorted(reducers)}")
    if protect is not None and (protect.dtype != torch.bool or protect.dim() != 2):
        raise InputError(f"protect: expected a bool tensor [batch, tokens], got {protect.dtype} {tuple(protect.shape)}")
    here = [place for place in places.attentions(model) if place.stack == path]
    if any(place.kind != "self" for place in here):
        raise InputError(f"model: {path} has cross or joint attention, which cannot be shortened; give another stack")
    for place in here:
        if hasattr(place.module, "window_size") or hasattr(place.module, "relative_position_bias_table"):
            raise InputError(f"model: {place.path} attends in windows of a grid, which cannot be shortened")
    causal = any(getattr(place.module, "is_causal", False) for place in here)
    return [(place, causal) for place in places.blocks(model) if place.stack == path]


def _hooks(run: Shortening, place: Place, causal: bool) -> list[RemovableHandle]:
    names = list(inspect.signature(place.module.forward).parameters)

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if threading.get_ident() != run.thread:
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        h = given[names[0]]
        if h.dim() != 3:
            raise InputError(f"model: {place.path} reads states {tuple(h.shape)}; expected [batch, tokens, dim]")
        if place.block == 0:
            cache = next((given[name] for name in ("past_key_values", "cache") if given.get(name) is not None), None)
            before = cache.get_seq_length() if cache is not None else 0
            run.decoding = before > 0
            if before:
                seen = run.assignment.shape[1] if run.assignment is not None else before
                run.decoded = before + h.shape[1] - seen
            else:
                run.decoded = 0
                run.forgets()
                run.looks(h, given, causal)
        if not any(block < place.block for block in run.stages):
            return None
        new = run.rewritten(place.block, h, given, "attention_mask" in names)
        return (), new

    def leaves(_: nn.Module, __: Any, output: Any) -> Any:
        if threading.get_ident() != run.thread or place.block not in run.reducers or run.decoding:
            return None
        h = output if isinstance(output, Tensor) else output[0]
        new = run.reduce(place.block, h)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return [
        place.module.register_forward_pre_hook(enters, with_kwargs=True),
        place.module.register_forward_hook(leaves),
    ]


def _taken(x: Tensor, origin: Int[Tensor, "batch left"]) -> Tensor:
    """`[..., batch or 1, tokens, width]` at these tokens."""
    batch, left = origin.shape
    if x.dim() == 2:
        x = x[None]
    x = x.expand(*x.shape[:-3], batch, *x.shape[-2:])
    index = origin[..., None].expand(*x.shape[:-3], batch, left, x.shape[-1])
    return x.gather(-2, index)
