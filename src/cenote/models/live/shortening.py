"""What is left of a prompt in a shortened stack of blocks, and what its blocks are told of it.

Whatever a block is given of tokens goes by its name: masks and biases of keys, or of pairs of queries and keys; numbers of
positions; rotations. What it is told is made anew from what the model gave, so that what blocks hand on to each other is never
taken twice.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.reduced import Reduced, expanded
from cenote.models.live import transformers
from cenote.models.live.calls import Place, may_read, real_tokens

Reducer = Callable[..., Reduced]
MASKS = ("attention_mask", "attn_mask", "mask", "src_key_padding_mask")
PAIRS = re.compile("mask|bias|alibi")
TURNS = re.compile("position_emb|pos_emb|rotary|rope|freqs|^cos$|^sin$")


@runtime_checkable
class Cut(Protocol):
    """What shortens behind a block: of its arguments see `Shorten`."""

    block: int
    stack: str | None
    reducer: Reducer
    needs: set[str]
    signals: dict[str, Tensor]
    proportional: bool
    uneven: bool
    restore: int | None

    def untouched(self, real: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which of the prompt's tokens the reducer must not touch."""

    def reads(self) -> dict[str, Tensor]:
        """What was read in the block's attention."""


class Stage(NamedTuple):
    """What is left behind a cut."""

    origin: Int[Tensor, "batch left"]
    mask: Bool[Tensor, "batch left"]
    sizes: Float[Tensor, "batch left"]
    assignment: Int[Tensor, "batch tokens"]


class Shortening:
    """What became of a prompt's tokens in one stack of blocks; None before the model ran.

    Attributes:
        counts: of a block that shortened: how many real tokens came to it, and how many it left, all items together.
    """

    def __init__(self, blocks: Sequence[Place], attention: Sequence[Place], causal: bool, crossed: bool) -> None:
        self.blocks, self.attention, self.is_causal, self.crossed = blocks, attention, causal, crossed
        self.stack = blocks[0].stack
        self.thread = threading.get_ident()
        self.cuts: list[Cut] = []
        # tokens behind the prompt, and whether this call is of them
        self.decoded, self.decoding = 0, False
        self.queries = 0
        self.dtype = torch.float32
        self.cache: Any = None
        self.forgets()

    def forgets(self) -> None:
        """Another prompt begins."""
        self.counts: dict[int, tuple[int, int]] = {}
        self.now: Stage | None = None
        self.last: Stage | None = None
        self.real: Tensor | None = None
        self.causal = self.is_causal
        # of a block: what stands behind it, None where all tokens are back
        self.stages: dict[int, Stage | None] = {}
        # states on the originals when they were last seen, for putting back
        self.seen: Tensor | None = None
        # what a block was given instead of what, by the identity of the new
        self.made: dict[int, tuple[Tensor | None, Any]] = {}
        self.gathered: dict[tuple[int, str, int], Tensor | None] = {}

    @property
    def sizes(self) -> Float[Tensor, "batch left"] | None:
        """How many originals each token stands for."""
        return self.last and self.last.sizes

    @property
    def assignment(self) -> Int[Tensor, "batch tokens"] | None:
        """The token that an original went to, -1 where it was dropped or is padding."""
        return self.last and self.last.assignment

    @property
    def origin(self) -> Int[Tensor, "batch left"] | None:
        """Where each token stands: at the first original that went to it; at the last in a causal stack, where it would
        otherwise be read by tokens that must not know all of it."""
        return self.last and self.last.origin

    @property
    def mask(self) -> Bool[Tensor, "batch left"] | None:
        """True = a real token: items of which more is left fill up the others, on the left in a causal stack."""
        return self.last and self.last.mask

    def expand(self, scores: Float[Tensor, "batch left *channels"]) -> Float[Tensor, "batch tokens *channels"]:
        """Scores or states of the tokens that are left, on the originals; zeros where these were dropped.

        Raises:
            InputError: where nothing was shortened yet.
        """
        if self.last is None:
            raise InputError("model: nothing was shortened yet; run the model first")
        return expanded(scores, self.last.assignment)

    def lets_go(self) -> None:
        """The last cut left: nothing of the model is kept."""
        self.blocks, self.attention, self.cache, self.seen = (), (), None, None
        self.made.clear()
        self.gathered.clear()

    def at(self, block: int) -> Stage | None:
        """What this block reads; None where it reads all tokens."""
        before = [number for number in self.stages if number < block]
        return self.stages[max(before)] if before else None

    def spans_at(self, place: Place, spans: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        own = place.stack == self.stack
        stage = self.at(place.block if own else len(self.blocks))
        if stage is None or (not own and place.kind != "cross"):
            return spans
        batch, tokens = stage.assignment.shape
        followed: dict[str, Tensor] = {}
        for name, span in spans.items():
            if span.shape[1] != tokens or batch % len(span):
                followed[name] = span
                continue
            span = span.to(stage.origin.device).repeat_interleave(batch // len(span), 0)
            index = stage.assignment.masked_fill(stage.assignment < 0, stage.origin.shape[1])
            inside = torch.zeros(batch, stage.origin.shape[1] + 1, dtype=torch.long, device=index.device)
            followed[name] = inside.scatter_reduce(1, index, span.long(), "amax")[:, :-1].bool()
        return followed

    def arrives(self, h: Tensor, given: Mapping[str, Any]) -> None:
        """The first block is called: with a prompt, or with tokens behind it."""
        if h.dim() != 3:
            raise InputError(f"model: {self.stack} reads states {tuple(h.shape)}; expected [batch, tokens, dim]")
        self.cache = next((value for value in given.values() if hasattr(value, "get_seq_length")), None)
        if getattr(self.cache, "is_compileable", False):
            raise InputError(
                f"model: a {type(self.cache).__name__} holds as many places in each layer; use a growing cache (DynamicCache)"
            )
        before = int(self.cache.get_seq_length()) if self.cache is not None else 0
        self.decoding, self.queries = before > 0, h.shape[1]
        self.made.clear()
        self.gathered.clear()
        if not before:
            self.forgets()
            self.decoded = 0
            self._looks(h, given)
            self.dtype = h.dtype
            everything = torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
            real = torch.ones_like(everything, dtype=torch.bool) if self.real is None else self.real
            self.now = Stage(everything, real, real.float(), everything.masked_fill(~real, -1))
            return
        seen = self.now.assignment.shape[1] if self.now is not None else before + 1
        self.decoded = before + h.shape[1] - seen
        fits = self.now is not None and before >= seen and len(self.now.assignment) == len(h)
        for block, stage in self.stages.items():
            if fits and stage is not None and block + 1 < len(self.blocks):
                expected = before - seen + stage.origin.shape[1]
                fits = int(self.cache.get_seq_length(self._layer(block + 1))) == expected
        if not fits:
            raise InputError(
                f"model: the cache holds {before} tokens of {len(h)} items that were not shortened here; run their prompt "
                f"inside of this context, with an empty cache"
            )

    def _looks(self, h: Tensor, given: Mapping[str, Any]) -> None:
        """What the prompt's mask says: which tokens are padding, and whether tokens read later ones."""
        name = next((name for name in MASKS if isinstance(given.get(name), Tensor)), None)
        if name is None:
            return
        mask: Tensor = given[name]
        tokens = h.shape[1]
        if name == "src_key_padding_mask" and not mask.is_floating_point():
            raise InputError("src_key_padding_mask: of True for padding cannot be shortened; give numbers, 0 and -inf")
        if mask.dim() == 2 and mask.shape[1] == tokens:
            self.real = may_read(mask)
        elif mask.dim() == 4 and mask.shape[3] == tokens and mask.shape[2] in (1, tokens):
            if mask.shape[2] == 1 and tokens > 1:
                self.real = may_read(mask)[:, :, 0].any(1).expand(len(h), -1)
            else:
                self.real = real_tokens(mask, len(h))
                if not self.real.any():
                    raise InputError(
                        f"model: by its mask no token of {self.stack} reads itself: True means hidden there, which cannot be "
                        f"shortened; load the model with another attn_implementation, or reduce before it"
                    )
                self.causal = tokens > 1 and not bool(may_read(mask)[:, :, :-1].triu(1).any())
        else:
            raise InputError(
                f"model: a mask {tuple(mask.shape)} for {tokens} tokens cannot be shortened; use a growing cache "
                f"(DynamicCache) and a mask of the tokens or of pairs of them"
            )

    def reduce(self, cut: Cut, h: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch left dim"]:
        """The tokens of the reducer, and those that it must not touch, in the order of the prompt."""
        assert self.now is not None
        now, block = self.now, cut.block
        batch, tokens, dim = h.shape
        everything = torch.arange(tokens, device=h.device).expand(batch, -1)
        kept = now.mask & self._followed(cut.untouched(self._real())).bool()
        asked = now.mask & ~kept
        signals = cut.reads() | {name: self._signal(name, value) for name, value in cut.signals.items()}
        reduced = cut.reducer(
            h, sizes=now.sizes, mask=asked, **{name: value for name, value in signals.items() if name in cut.needs}
        )
        number = self._fits(block, reduced, batch, tokens, dim)
        to = reduced.assignment.masked_fill(~asked, -1)
        # tokens of the reducer first, then those that it must not touch
        to = torch.where(kept, number + everything, to)
        stands = self._ends_of(to, number + tokens, everything)
        same = bool((to == everything)[asked].all()) and number == tokens
        same = same and torch.equal(reduced.sizes[asked].to(now.sizes), now.sizes[asked])
        if same and torch.equal(reduced.tokens[asked], h[asked]):
            self.counts[block] = (int(now.mask.sum()), int(now.mask.sum()))
            return h
        real = stands < tokens
        counts = real.sum(1, keepdim=True)
        most = int(counts.max())
        if not most:
            raise InputError(f"reducer: of block {block} left no token")
        order = stands.argsort(dim=1, stable=True)[:, :most]
        at = torch.arange(most, device=h.device).expand(batch, -1)
        if self.causal:
            order = order.gather(1, (at - (most - counts)).clamp(min=0))
            mask = at >= most - counts
        else:
            mask = at < counts
            if not mask.all() and not (cut.uneven or cut.restore is not None or self.crossed):
                raise InputError(
                    f"reducer: of block {block} left {int(counts.min())} to {most} tokens of the items, and what stands behind "
                    f"{self.stack} would take what fills up for tokens; let it keep as many of each, put tokens back "
                    f"(restore=-1), or give uneven=True and read the mask of what is left"
                )
        item = torch.arange(batch, device=h.device)[:, None]
        slot = torch.full_like(stands, -1)
        rows, slots = mask.nonzero(as_tuple=True)
        slot[rows, order[rows, slots]] = slots
        onto = torch.where(to < 0, to, slot.gather(1, to.clamp(min=0)))
        assignment = torch.where(now.assignment < 0, now.assignment, onto.gather(1, now.assignment.clamp(min=0)))
        origin = now.origin.gather(1, stands.gather(1, order).clamp(max=tokens - 1))
        sizes = torch.cat([reduced.sizes.to(now.sizes), now.sizes], 1)[item, order]
        if any(other.restore is not None for other in self.cuts):
            self.seen = self._put_back(h)
        self.now = self.last = self.stages[block] = Stage(origin, mask, sizes * mask, assignment)
        self.gathered.clear()
        self.counts[block] = (int(now.mask.sum()), int(mask.sum()))
        return torch.cat([reduced.tokens.to(h), h], 1)[item, order]

    def restored(self, block: int, h: Float[Tensor, "batch left dim"]) -> Float[Tensor, "batch tokens dim"]:
        """All tokens in their places: copies of what they went to; dropped ones as they were last seen."""
        assert self.now is not None
        if self.now is not self.last:
            return h
        h = self._put_back(h)
        real, everything = self._real(), torch.arange(h.shape[1], device=h.device).expand(len(h), -1)
        self.now = Stage(everything, real, real.float(), everything.masked_fill(~real, -1))
        self.stages[block] = None
        self.seen = None
        return h

    def _put_back(self, h: Tensor) -> Tensor:
        assert self.now is not None
        if self.seen is None:
            return h
        known = (self.now.assignment >= 0)[..., None]
        return torch.where(known, expanded(h, self.now.assignment), self.seen)

    def _real(self) -> Bool[Tensor, "batch tokens"]:
        assert self.now is not None
        return torch.ones_like(self.now.assignment, dtype=torch.bool) if self.real is None else self.real

    def _followed(self, x: Shaped[Tensor, "batch tokens"]) -> Shaped[Tensor, "batch left"]:
        """The largest of what the originals of a token have."""
        assert self.now is not None
        number = self.now.origin.shape[1]
        index = self.now.assignment.masked_fill(self.now.assignment < 0, number)
        made = torch.zeros(len(x), number + 1, dtype=torch.long, device=x.device)
        return made.scatter_reduce(1, index, x.long(), "amax")[:, :-1]

    def _signal(self, name: str, value: Tensor) -> Tensor:
        """What the user gave of the prompt's tokens, of those that are left."""
        assert self.now is not None
        batch, tokens = self.now.assignment.shape
        if value.dim() < 2 or value.shape[1] != tokens or batch % len(value):
            raise InputError(
                f"signals: {name!r} is of shape {tuple(value.shape)}; expected [batch, tokens, ...] for {batch} items of "
                f"{tokens} tokens"
            )
        value = value.to(self.now.origin.device).repeat_interleave(batch // len(value), 0)
        return value[torch.arange(batch, device=value.device)[:, None], self.now.origin]

    def _fits(self, block: int, reduced: object, batch: int, tokens: int, dim: int) -> int:
        """How many tokens the reducer gave, where what it gave is of one piece."""
        if not isinstance(reduced, Reduced) or not all(isinstance(part, Tensor) for part in reduced[:3]):
            raise InputError(
                f"reducer: of block {block} gave {type(reduced).__name__}, expected Reduced(tokens, sizes, assignment) of "
                f"tensors"
            )
        if reduced.tokens.dim() != 3 or reduced.tokens.shape[2] != dim:
            raise InputError(
                f"reducer: of block {block} gave tokens {tuple(reduced.tokens.shape)}, expected [batch, left, {dim}]"
            )
        number, to = reduced.tokens.shape[1], reduced.assignment
        if to.is_floating_point() or to.dtype == torch.bool:
            raise InputError(f"reducer: of block {block} gave an assignment of {to.dtype}, expected whole numbers")
        if to.shape != (batch, tokens) or int(to.max()) >= number or int(to.min()) < -1:
            raise InputError(
                f"reducer: of block {block} gave an assignment {tuple(to.shape)} onto {number} tokens; expected "
                f"{(batch, tokens)}, numbers below {number}, -1 where dropped"
            )
        if len(reduced.tokens) != batch or reduced.sizes.shape != (batch, number):
            raise InputError(
                f"reducer: of block {block} gave tokens {tuple(reduced.tokens.shape)} with sizes {tuple(reduced.sizes.shape)}; "
                f"expected {batch} items and one size for each token"
            )
        return number

    def _ends_of(self, to: Tensor, number: int, everything: Tensor) -> Int[Tensor, "batch number"]:
        """The token at which each new one stands; beyond the last where nothing went to it."""
        tokens = everything.shape[1]
        beyond = everything.new_full((len(to), number), tokens)
        if not self.causal:
            return beyond.scatter_reduce(1, to.clamp(min=0), everything.masked_fill(to < 0, tokens), "amin")
        found = torch.full_like(beyond, -1)
        found = found.scatter_reduce(1, to.clamp(min=0), everything.masked_fill(to < 0, -1), "amax")
        return torch.where(found < 0, beyond, found)

    def rewritten(self, place: Place, given: Mapping[str, Any], takes: Sequence[str]) -> Mapping[str, Any]:
        """A block's other arguments, for the tokens that are left and those decoded since."""
        stage = self.at(place.block)
        if stage is None:
            if not self.made:
                return given
            return {name: self._original(value) for name, value in given.items()}
        new = {name: self._of_left(name, value, stage, place) for name, value in given.items()}
        name = next((name for name in MASKS if name in takes), None)
        proportional = any(cut.proportional for cut in self.cuts if cut.block < place.block)
        mask = self._mask(stage, place, name, new.get(name) if name else None, proportional)
        if mask is not None and name is None:
            raise InputError(
                f"model: {place.path} takes no mask, which proportional and uneven shortening need; keep as many tokens of "
                f"each item, with proportional=False"
            )
        if name is not None and mask is not new.get(name):
            old = given.get(name)
            if mask is not None:
                self.made[id(mask)] = (mask, self._original(old))
            new[name] = mask
        return new

    def _original(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._original, value))
        made = self.made.get(id(value))
        return made[1] if made is not None else value

    def _of_left(self, name: str, value: Any, stage: Stage, place: Place) -> Any:
        if isinstance(value, (tuple, list)) and value and all(isinstance(part, Tensor) for part in value):
            return type(value)(self._of_left(name, part, stage, place) for part in value)
        if not isinstance(value, Tensor):
            return value
        value = self._original(value)
        if value is None:
            return None
        key = (id(value), name, id(stage))
        if key not in self.gathered:
            new = self._picked(name, value, stage, place)
            self.gathered[key] = new
            # kept where there is no new one too: while it lives, nothing else has its identity
            self.made[id(value if new is None else new)] = (new, value)
        return self.gathered[key]

    def _picked(self, name: str, value: Tensor, stage: Stage, place: Place) -> Tensor | None:
        tokens = stage.assignment.shape[1]
        if PAIRS.search(name):
            return self._pairs(name, value, stage, place)
        if self.decoding or name == "cache_position":
            return value
        if name == "position_ids":
            return _taken(value[..., None], stage.origin)[..., 0]
        if TURNS.search(name):
            return self._turns(name, value, stage)
        if tokens in (value.shape[-2:] if value.dim() > 2 else value.shape[-1:]):
            raise InputError(
                f"model: {place.path} is given {name} of shape {tuple(value.shape)} for {tokens} tokens, which cannot be "
                f"shortened; reduce before the model"
            )
        return value

    def _turns(self, name: str, value: Tensor, stage: Stage) -> Tensor:
        """Rotations of the tokens that are left; some models have none for [CLS] and registers."""
        if value.dim() > 3 and value.shape[-3] != len(stage.origin):
            raise InputError(f"model: {self.stack} is given {name} {tuple(value.shape)}, which cannot be shortened")
        prefix = stage.assignment.shape[1] - value.shape[-2]
        at_front = torch.arange(max(prefix, 0), device=stage.origin.device)
        if prefix < 0 or stage.origin.shape[1] < prefix or not bool((stage.origin[:, :prefix] == at_front).all()):
            raise InputError(
                f"model: {self.stack} is given {name} {tuple(value.shape)} for {stage.assignment.shape[1]} tokens; the first "
                f"{max(prefix, 0)} must stay where they are: protect={max(prefix, 0)}"
            )
        origin = (stage.origin[:, prefix:] - prefix).clamp(min=0)
        if value.dim() > 2:
            return _taken(value, origin)
        if bool((origin == origin[:1]).all()):
            return value[origin[0]]
        # it was to be spread over items and heads
        return _taken(value, origin)[:, None]

    def _pairs(self, name: str, value: Tensor, stage: Stage, place: Place) -> Tensor | None:
        """A mask or bias of keys, or of pairs of queries and keys, of those that are left; None where it is of other keys."""
        batch, tokens = stage.assignment.shape
        total = tokens + self.decoded
        if name == "src_mask" or value.dim() not in (2, 3, 4):
            raise InputError(f"model: {place.path} is given {name} {tuple(value.shape)}, which cannot be shortened")
        if value.shape[-1] != total:
            # made for a layer behind the cut, or of a window's keys: read from positions instead
            if self.decoding and name in MASKS:
                return None
            raise InputError(
                f"model: {place.path} is given {name} {tuple(value.shape)} after {total} tokens, which cannot be shortened; "
                f"use a growing cache (DynamicCache)"
            )
        behind = torch.arange(tokens, total, device=value.device).expand(batch, -1)
        keys = torch.cat([stage.origin, behind], 1)
        item = torch.arange(batch, device=value.device)[:, None]
        if value.dim() == 2:
            return value.expand(batch, -1)[item, keys]
        flat = value.dim() == 3
        heads = _heads(self._self_attention(place.block).module)
        if flat and len(value) in (1, batch):
            value = value[:, None]
        elif flat and len(value) == batch * heads:
            value = value.view(batch, heads, *value.shape[1:])
        elif flat:
            raise InputError(
                f"model: {place.path} is given {name} {tuple(value.shape)} for {batch} items of {heads} heads, which cannot be "
                f"shortened"
            )
        value = value.expand(batch, *value.shape[1:])
        value = value[item, :, :, keys].permute(0, 2, 3, 1)
        if not self.decoding and value.shape[2] == tokens:
            value = value[item, :, stage.origin].transpose(1, 2)
        return value.flatten(0, 1) if flat else value

    def _mask(self, stage: Stage, place: Place, name: str | None, mask: Any, proportional: bool) -> Any:
        """The block's mask with what fills up hidden, and sizes where keys weigh by them; None where all may be read."""
        module = self._self_attention(place.block).module
        window, tokens = _window(module), stage.assignment.shape[1]
        limited = self.queries > 1 or (window is not None and tokens + self.decoded > window)
        if mask is None and bool(stage.mask.all()) and not proportional and not (self.decoding and limited):
            return None
        # a cache of a sliding window holds the last keys only
        total = stage.origin.shape[1] + self.decoded
        held = self._held(place.block, total)
        key = (id(mask), f"mask {window} {held} {proportional}", id(stage))
        if key not in self.gathered:
            real = nn.functional.pad(stage.mask, (0, self.decoded), value=True)
            if mask is not None:
                made = mask
            elif name == "src_key_padding_mask":
                made = torch.zeros(real.shape, dtype=self.dtype, device=real.device)
            else:
                made = self._from_positions(stage, window)
                if transformers.implementation_of(module) != "sdpa":
                    made = _added(made, self.dtype)
            made = self._told(made, real, stage.sizes if proportional else None)
            self.gathered[key] = made[..., -held:]
        return self.gathered[key]

    def _from_positions(self, stage: Stage, window: int | None) -> Bool[Tensor, "batch 1 queries keys"]:
        """Which keys the queries of this call may read, padding left aside."""
        tokens = stage.assignment.shape[1]
        behind = torch.arange(tokens, tokens + self.decoded, device=stage.origin.device)
        keys = torch.cat([stage.origin, behind.expand(len(stage.origin), -1)], 1)
        queries = keys[:, -self.queries :] if self.decoding else keys
        apart = queries[:, :, None] - keys[:, None]
        may = apart >= 0 if self.causal or self.decoding else torch.ones_like(apart, dtype=torch.bool)
        return (may & (apart < window) if self.decoding and window is not None else may)[:, None]

    def _told(self, mask: Tensor, real: Bool[Tensor, "batch keys"], sizes: Tensor | None) -> Tensor:
        """A mask that hides what fills up, with sizes where they are given."""
        flat = mask.dim() == 2
        if flat and not mask.is_floating_point():
            if sizes is not None:
                raise InputError(
                    "proportional: a mask of tokens alone tells no sizes; load the model with 'sdpa' or 'eager'"
                )
            return mask * real.to(mask.dtype)
        if not flat:
            real = real[:, None, None]
        if mask.dtype == torch.bool and sizes is None:
            return mask & real
        mask = _added(mask, self.dtype)
        if sizes is not None:
            bias = nn.functional.pad(sizes, (0, self.decoded), value=1.0).clamp(min=1e-6).log().to(mask)
            mask = torch.where(may_read(mask), mask + (bias if flat else bias[:, None, None]), mask)
        return mask.masked_fill(~real, torch.finfo(mask.dtype).min)

    def crosses(self, place: Place, given: Mapping[str, Any], takes: Sequence[str], queries: int) -> Mapping[str, Any]:
        """What a block of another stack is given, where it reads states that came out of this one."""
        states, stage = given.get("encoder_hidden_states"), self.at(len(self.blocks))
        if stage is None or not isinstance(states, Tensor) or states.shape[1] != stage.origin.shape[1]:
            return given
        if len(states) % len(stage.mask):
            raise InputError(f"model: {place.path} reads {len(states)} items, and {len(stage.mask)} were shortened")
        proportional = any(cut.proportional for cut in self.cuts)
        bare = bool(stage.mask.all()) and not proportional
        if "encoder_attention_mask" not in takes:
            if bare:
                return given
            raise InputError(
                f"model: {place.path} takes no encoder_attention_mask; keep as many tokens of each item, or put them back "
                f"(restore=-1)"
            )
        if bare:
            return {**given, "encoder_attention_mask": None}
        mask = stage.sizes.clamp(min=1e-6).log() if proportional else torch.zeros_like(stage.sizes)
        mask = mask.to(states.dtype).masked_fill(~stage.mask, torch.finfo(states.dtype).min)
        mask = mask.repeat_interleave(len(states) // len(stage.mask), 0)[:, None, None]
        return {**given, "encoder_attention_mask": mask.expand(-1, -1, queries, -1)}

    def _self_attention(self, block: int) -> Place:
        return next(place for place in self.attention if place.block == block)

    def _layer(self, block: int) -> int:
        found = next((place.module for place in self.attention if place.block == block), None)
        number = getattr(found, "layer_idx", None)
        return number if isinstance(number, int) else block

    def _held(self, block: int, total: int) -> int:
        """How many keys this block will read."""
        if not self.decoding:
            return total
        layers = getattr(self.cache, "layers", None)
        layer = layers[self._layer(block)] if layers else None
        if layer is None or not getattr(layer, "is_sliding", False):
            return total
        stored = min(int(layer.keys.shape[-2]), int(layer.sliding_window) - 1)
        return min(total, stored + self.queries)


def _heads(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    for owner in (module, config):
        for name in ("num_heads", "n_heads", "num_attention_heads", "n_head"):
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    return 1


def _window(module: nn.Module) -> int | None:
    """How many of the last keys a query reads, where it doesn't read all."""
    owner = module if hasattr(module, "sliding_window") else getattr(module, "config", None)
    found: object = getattr(owner, "sliding_window", None)
    return found if isinstance(found, int) else None


def _added(mask: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """A mask as what is added to scores."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~may_read(mask), torch.finfo(dtype).min)


def _taken(x: Tensor, origin: Int[Tensor, "batch left"]) -> Tensor:
    """`[..., batch or 1, tokens, width]` at these tokens."""
    batch, number = origin.shape
    if x.dim() == 2:
        x = x[None]
    x = x.expand(*x.shape[:-3], batch, *x.shape[-2:])
    index = origin[..., None].expand(*x.shape[:-3], batch, number, x.shape[-1])
    return x.gather(-2, index)
