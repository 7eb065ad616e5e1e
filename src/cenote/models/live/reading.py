"""Reading only some of the keys that a decoder keeps, and forgetting others: the seat of KV policies.

A policy says which keys each key head reads for a new token; here they are gathered, counted and attended to, exactly. The
prompt is read as the model was loaded, unless a policy acts there too. What is kept beside a layer follows the cache through
beams, and lives with it, so that two generations never share any.

What it does not know: sliding windows (such layers keep and read no more than that already), layers that read another layer's
keys, encoder-decoders, padding that is not on the left, compiled models, other edits' recorders of what was not read.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError, grouped, routing
from cenote.core.requirements import require_at_least
from cenote.models.live.calls import AttentionCall, Place, may_read
from cenote.models.live.edited import edited, require_module
from cenote.models.live.edits import AttentionEdit, Where
from cenote.models.live.places import attentions
from cenote.models.live.transformers import implementation_of

Phase = Literal["prefill", "decode"]
ROWS = 256
"""Queries of a prompt whose weights are shown at once."""


class Layout(NamedTuple):
    """Of a model: how many layers attend, heads of queries and of keys, and how wide these are."""

    layers: int
    heads: int
    kv_heads: int
    width: int


class Reads(NamedTuple):
    """Which keys are read, of each key head, or of each query head.

    Attributes:
        numbers: of the keys among those that are held, `[batch, heads, most]`.
        valid: False where a number only fills up a head that reads fewer.
    """

    numbers: Int[Tensor, "batch heads most"]
    valid: Bool[Tensor, "batch heads most"]

    @classmethod
    def of(cls, chosen: Bool[Tensor, "batch heads keys"]) -> Reads:
        """Those that are True."""
        return cls(*routing.packed(chosen))


class Held:
    """What a layer holds when a query reads, that query's own key the last.

    Attributes:
        keys, values: `[batch, kv_heads, keys, width]`.
        scale: of attention's products.
        per_key, notes: what a policy keeps beside the layer, see `StoreLayer`.
        start: how many tokens of padding stand before each item, `[batch]`; None where there are none.
        seen: how many tokens were stored up to this query, padding and forgotten ones among them.
    """

    def __init__(
        self,
        keys: Float[Tensor, "batch kv_heads keys width"],
        values: Float[Tensor, "batch kv_heads keys value_width"],
        scale: float,
        *,
        seen: int,
        start: Int[Tensor, "batch"] | None = None,
        numbers: Int[Tensor, "batch kv_heads keys"] | None = None,
        per_key: dict[str, Tensor] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.keys, self.values, self.scale = keys, values, scale
        self.seen, self.start, self.numbers = seen, start, numbers
        self.per_key = {} if per_key is None else per_key
        self.notes = {} if notes is None else notes
        self._positions: Tensor | None = None

    @property
    def count(self) -> int:
        """How many keys a head holds, padding and what only fills up among them."""
        return self.keys.shape[2]

    @property
    def positions(self) -> Int[Tensor, "batch kv_heads keys"]:
        """Of each key among the item's real tokens, from 0, whatever was forgotten; negative for padding and filling."""
        if self._positions is None:
            batch, kv_heads, keys = self.keys.shape[:3]
            device = self.keys.device
            numbers = torch.arange(keys, device=device) if self.numbers is None else self.numbers
            before = 0 if self.start is None else self.start.view(-1, 1, 1)
            found = (numbers - before).expand(batch, kv_heads, keys)
            self._positions = found if self.numbers is None else found.masked_fill(self.numbers < 0, -1)
        return self._positions

    @property
    def real(self) -> Bool[Tensor, "batch kv_heads keys"]:
        """False for padding and for what only fills up."""
        return self.positions >= 0

    @property
    def last(self) -> Int[Tensor, "batch 1 1"]:
        """The query's own position."""
        before = torch.zeros(len(self.keys), dtype=torch.long, device=self.keys.device)
        return (self.seen - 1 - (before if self.start is None else self.start)).view(-1, 1, 1)

    @property
    def whole(self) -> bool:
        """Whether every key that is held is real, and none was forgotten."""
        return self.start is None and self.numbers is None

    def until(self, back: int) -> Held:
        """What was held so many tokens ago."""
        if not back:
            return self
        cut = slice(0, self.count - back)
        return Held(
            self.keys[:, :, cut], self.values[:, :, cut], self.scale,
            seen=self.seen - back,
            start=self.start,
            numbers=None if self.numbers is None else self.numbers[:, :, cut],
            per_key={name: x[:, :, cut] for name, x in self.per_key.items()},
            notes=self.notes,
        )  # fmt: skip


@runtime_checkable
class Policy(Protocol):
    """What the seat asks of a policy; see `cenote.mix.policies.KVPolicy`. One with a number `refresh_every` has the keys and
    values of that many tokens computed anew, reading everything, whenever so many have come."""

    @property
    def acts(self) -> Collection[Phase]:
        """When."""

    @property
    def forgets(self) -> bool:
        """Whether it takes keys out of the cache."""

    @property
    def watches(self) -> bool:
        """Whether it is shown weights."""

    def begin(self, layout: Layout) -> Any:
        """What is kept of one generation."""

    def read(self, layer: int, q: Tensor, held: Held, state: Any) -> Reads | None:
        """Which keys one query of each head reads; None for all."""

    def choose(self, layer: int, q: Tensor, held: Held, state: Any) -> Tensor | None:
        """The same for several queries, of which the last is that of the last key, as a mask; None for all."""

    def seen(self, layer: int, weights: Tensor, held: Held, state: Any) -> None:
        """What some queries took of the keys that are held."""

    def forget(self, layer: int, held: Held, state: Any) -> Tensor | None:
        """Which keys stay, `[batch, kv_heads, keys]`; None for all."""


class Reading:
    """What was read while a policy was on.

    Attributes:
        read: of each layer, how many keys its key heads read for new tokens, all items together; those of several query heads
            of a group count once.
        held: and how many real ones they had seen by then, what was forgotten since among them: what reading all would have
            been.
        most: of each layer, the most that one key head of one item read for one token.
        caches: how many caches, which is how many generations, were read from.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.read: Counter[int] = Counter()
        self.held: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.caches = 0
        self._last: Any = None

    @property
    def share(self) -> float:
        """Of the keys that reading all would have read; 1 where no token was decoded."""
        total = sum(self.held.values())
        return sum(self.read.values()) / total if total else 1.0

    @property
    def nbytes(self) -> int:
        """Of the cache that was read from last, room for more among them; 0 where it is gone."""
        from cenote.models.live.store import nbytes

        cache = self._last() if self._last is not None else None
        return 0 if cache is None else nbytes(cache)

    def counts(self, layer: int, read: Sequence[int], seen: int) -> None:
        """One token more of each item was read for: of each item and key head how many keys; and what there were, of all."""
        self.read[layer] += sum(read)
        self.held[layer] += seen
        self.most[layer] = max(self.most[layer], *read)


@contextmanager
def reading(model: nn.Module, policy: Policy, prompt: int | None = None) -> Iterator[Reading]:
    """Let a decoder read and keep what a policy says, in `generate` and in every forward; afterwards it is as it was.

    Args:
        model: a decoder of transformers.
        policy: see `cenote.mix.policies.KVPolicy`.
        prompt: how many tokens, padding included, are the prompt, where it comes in several calls or together with what is
            behind it, as drafts do; by default the prompt is what comes with the first call.

    Returns:
        What was read.

    Raises:
        InputError: for a model or a cache that a policy cannot act on, by name.
    """
    if prompt is not None:
        require_at_least(0, prompt=prompt)
    from cenote.models.live.store import cache_argument

    require_module(model)
    cache_argument(model)
    places = _self_attention(model)
    run = Reading(len(places))
    seat = _Seat(model, policy, places, run, prompt)
    with seat.hooked(), edited(model, seat):
        yield run


class _Seat(AttentionEdit):
    """The edit that asks a policy, and keeps what it keeps by the cache."""

    def __init__(
        self, model: nn.Module, policy: Policy, places: Mapping[nn.Module, Place], run: Reading, prompt: int | None
    ) -> None:
        self.called = type(policy).__name__
        self.at = Where(kinds=["self"], stack=next(iter(places.values())).stack)
        self.model, self.policy, self.run, self.given_prompt = model, policy, run, prompt
        self.layers = {module: _layer(place) for module, place in places.items()}
        self.thread = threading.get_ident()
        self.names = list(inspect.signature(model.forward).parameters)
        # what is kept of one generation lives as long as its cache
        self.kept: weakref.WeakKeyDictionary[Any, _Generation] = weakref.WeakKeyDictionary()
        self.now: _Generation | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handle = self.model.register_forward_pre_hook(self._enters, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def ends(self) -> None:
        for cache in list(self.kept):
            _leave(cache, True)
        self.kept.clear()
        self.now = None

    def _enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        from cenote.models.live.store import shows_weights, with_store

        if module is not self.model or threading.get_ident() != self.thread:
            return None
        if self.now is not None and self.now.refreshing:
            return None
        given, cache = with_store(self.model, {**dict(zip(self.names, args, strict=False)), **kwargs})
        if cache is None and self.given_prompt is None:
            raise InputError(
                "use_cache: is False, and without a cache nobody can tell a prompt from what is behind it; decode with one, or "
                "say how many tokens the prompt has (prompt=)"
            )
        before = 0 if cache is None else int(cache.get_seq_length())
        generation = None if cache is None or not before else self.kept.get(cache)
        if generation is None:
            generation = _Generation(before)
            if cache is not None:
                _require_keys(cache, self.policy.forgets)
                self.kept[cache] = generation
                self.run.caches += 1
                self.run._last = weakref.ref(cache)
        if self.given_prompt is None and before < generation.prompt(None):
            raise InputError(
                "prompt: tokens of the first call were taken back, so that not all of them were the prompt; say how many "
                "tokens it has (prompt=) where drafts come with it"
            )
        generation.comes(cache, given)
        x = _input(given)
        if cache is not None and x is not None:
            # before anything is stored, so that the cache can still be given one token at a time
            self._require_one(x.shape[1], before, generation)
        generation.shows = shows_weights(self.model, given)
        if cache is not None:
            _leave(cache, False)
        self.now = generation
        every = getattr(self.policy, "refresh_every", None)
        if every is not None and cache is not None and before >= generation.prompt(self.given_prompt):
            self._refresh(cache, before, given, every)
        return (), given

    def _refresh(self, cache: Any, before: int, given: Mapping[str, Any], every: int) -> None:
        """Where so many tokens came since it was last done, and not all was read for them, compute keys and values anew."""
        from cenote.models.live.store import cache_argument

        assert self.now is not None
        words = given.get("input_ids")
        if not isinstance(words, Tensor):
            raise InputError("refresh_every: needs input_ids, and the model is called without")
        # beside a layer, so that beams reorder them
        notes = cache.layers[0].notes
        recent, at = notes.get("recent tokens"), notes.get("recent positions")
        due = recent is not None and recent.shape[1] >= every
        if due and self.now.left_out:
            mask = given.get("attention_mask")
            told = {} if mask is None else {"attention_mask": mask[:, :before]}
            if at is not None:
                told["position_ids"] = at
            cache.crop(-recent.shape[1])
            self.now.looked_at.clear()
            self.now.refreshing = True
            try:
                with torch.no_grad():
                    self.model(input_ids=recent, use_cache=True, **{cache_argument(self.model): cache}, **told)
            finally:
                self.now.refreshing = self.now.left_out = False
        if due:
            recent, at, notes = None, None, cache.layers[0].notes
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            positions = positions.expand(len(words), -1)
            notes["recent positions"] = positions if at is None else torch.cat([at, positions], 1)
        notes["recent tokens"] = words if recent is None else torch.cat([recent, words], 1)

    def inputs(self, call: AttentionCall) -> AttentionCall:
        """With masks of the keys that are left, where some were forgotten."""
        held = self._held(call)
        if held.numbers is None:
            return call
        _require_mask_alone(call)
        real, group = held.real, call.heads // call.k.shape[1]
        if call.queries == 1 and bool(real.all()):
            return call.replace(allowed=None, bias=None)

        def allowed(rows: Int[Tensor, "batch rows"]) -> Bool[Tensor, "batch _heads _rows keys"]:
            assert held.numbers is not None
            mine = rows + (held.seen - call.queries)
            may = real[:, :, None] & (held.numbers[:, :, None] <= mine[:, None, :, None])
            return may.repeat_interleave(group, 1)

        return call.replace(allowed=allowed, bias=None)

    def attends(self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]) -> Tensor:
        generation, layer = self._now(call), self.layers[call.place.module]
        if generation.refreshing:
            return fused(call)
        if not generation.begun:
            layout = Layout(self.run.layers, call.heads, call.k.shape[1], call.q.shape[3])
            generation.state, generation.begun = self.policy.begin(layout), True
        prompt = generation.prompt(self.given_prompt)
        held = self._held(call)
        first = min(max(0, prompt - (held.seen - call.queries)), call.queries)
        if first < call.queries or "prefill" in self.policy.acts or self.policy.watches or self.policy.forgets:
            generation.require_finite(call, held, layer)
        if first == call.queries:
            return self._of_prompt(call, fused, layer, held, generation)
        if generation.layer(layer) is not None:
            self._require_one(call.queries, held.seen - call.queries, generation)
        if call.queries > 1:
            return self._of_several(call, fused, layer, held, generation, first)
        return self._of_one(call, fused, layer, held, generation)

    def _of_prompt(
        self,
        call: AttentionCall,
        fused: Callable[[AttentionCall], Tensor],
        layer: int,
        held: Held,
        generation: _Generation,
    ) -> Tensor:
        if "prefill" in self.policy.acts:
            chosen = self.policy.choose(layer, call.q, held, generation.state)
            y = fused(call if chosen is None else _masked(call, chosen))
        else:
            y = fused(call)
        if self.policy.watches:
            for start in range(0, call.queries, ROWS):
                rows = torch.zeros(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
                rows[:, start : start + ROWS] = True
                weights = call.only(rows).weights()
                if held.start is not None:
                    # padding reads itself, which nobody should count
                    asked = torch.arange(start, min(start + ROWS, call.queries), device=weights.device)
                    of = asked + (held.seen - call.queries) >= held.start[:, None]
                    weights = weights * of[:, None, :, None]
                self.policy.seen(layer, weights, held, generation.state)
        # a prompt in pieces is kept until it is whole
        if self.policy.forgets and held.seen >= generation.prompt(self.given_prompt):
            self._forget(layer, held, generation)
        return y

    def _of_one(
        self,
        call: AttentionCall,
        fused: Callable[[AttentionCall], Tensor],
        layer: int,
        held: Held,
        generation: _Generation,
    ) -> Tensor:
        if self.policy.forgets and self._forget(layer, held, generation):
            stored = generation.layer(layer)
            _require_mask_alone(call)
            call = self.inputs(call.replace(k=stored.keys, v=stored.values, allowed=None, bias=None))
            held = self._held(call)
        reads = self.policy.read(layer, call.q, held, generation.state)
        kv_heads = call.k.shape[1]
        seen = kv_heads * (call.batch * held.seen - generation.padding)
        if reads is None:
            every = [held.count] * (call.batch * kv_heads)
            self.run.counts(layer, every if held.whole else held.real.sum(2).flatten().tolist(), seen)
            if self.policy.watches:
                self.policy.seen(layer, call.weights(), held, generation.state)
            return fused(call)
        if generation.shows and implementation_of(call.place.module) == "eager":
            raise InputError(
                f"output_attentions: {type(self.policy).__name__} reads some keys alone, and there are no weights of others; "
                f"decode without"
            )
        generation.left_out = True
        numbers, valid = reads
        if not held.whole:
            # whatever a policy says, padding is not read
            group = numbers.shape[1] // held.real.shape[1]
            valid = valid & held.real.repeat_interleave(group, 1).gather(2, numbers)
        counts = valid.sum(2)
        each = counts.flatten().tolist()
        apart = numbers.shape[1] == kv_heads
        read = each if apart else routing.counted(numbers, valid, kv_heads, held.count).flatten().tolist()
        self.run.counts(layer, read, seen)
        return _read(call, numbers, None if min(each) == numbers.shape[2] > 0 else valid)

    def _of_several(
        self,
        call: AttentionCall,
        fused: Callable[[AttentionCall], Tensor],
        layer: int,
        held: Held,
        generation: _Generation,
        first: int,
    ) -> Tensor:
        """Some of the prompt's queries, and of several tokens behind it."""
        kv_heads = call.k.shape[1]
        behind = call.q[:, :, first:]
        chosen = self.policy.choose(layer, behind, held, generation.state)
        generation.left_out |= chosen is not None
        if chosen is None:
            chosen = torch.ones(call.batch, 1, behind.shape[2], held.count, dtype=torch.bool, device=behind.device)
        positions = held.last - torch.arange(behind.shape[2] - 1, -1, -1, device=behind.device)
        may = held.real[:, :, None] & (held.positions[:, :, None] <= positions.unsqueeze(-1))
        read = chosen & (may if chosen.shape[1] != call.heads else may.repeat_interleave(call.heads // kv_heads, 1))
        counted = routing.union(read, kv_heads) if read.shape[1] == call.heads else read
        for row in range(behind.shape[2]):
            of = positions[:, 0, row] >= 0
            if bool(of.any()):
                seen = kv_heads * int((positions[of, 0, row] + 1).sum())
                self.run.counts(layer, counted[of, :, row].sum(-1).flatten().tolist(), seen)
        before = torch.ones(*chosen.shape[:2], first, held.count, dtype=torch.bool, device=chosen.device)
        return fused(_masked(call, torch.cat([before, chosen], 2)))

    def _forget(self, layer: int, held: Held, generation: _Generation) -> bool:
        stored = generation.layer(layer)
        if stored is None:
            raise InputError(
                f"use_cache: is False, and {type(self.policy).__name__} forgets what a cache keeps; decode with a cache"
            )
        kept = self.policy.forget(layer, held, generation.state)
        if kept is None:
            return False
        stored.forget(kept)
        return True

    def _require_one(self, tokens: int, before: int, generation: _Generation) -> None:
        """Raise where a policy that forgets is given several tokens at once, and not all are the prompt's."""
        if self.policy.forgets and tokens > 1 and before + tokens > generation.prompt(self.given_prompt):
            raise InputError(
                f"policy: {type(self.policy).__name__} forgets, and reads one token at a time behind the prompt; got {tokens} "
                f"at once: give a further turn one token at a time, decode without drafts, and say how long a prompt in "
                f"pieces is (prompt=)"
            )

    def _now(self, call: AttentionCall) -> _Generation:
        if self.now is None:
            raise InputError(
                f"model: {call.place.path} ran by itself; a policy acts where the model that was entered is called"
            )
        return self.now

    def _held(self, call: AttentionCall) -> Held:
        generation = self._now(call)
        stored = generation.layer(self.layers[call.place.module])
        if stored is None:
            return Held(call.k, call.v, call.scale, seen=call.keys, start=generation.start, notes={})
        if stored.keys is None or stored.keys.shape != call.k.shape or stored.keys.data_ptr() != call.k.data_ptr():
            raise InputError(
                f"model: {call.place.path} reads other keys than its layer of the cache holds, and no policy knows which; "
                f"decode this model without one"
            )
        return Held(
            call.k, call.v, call.scale,
            seen=stored.seen, start=generation.start, numbers=stored.numbers, per_key=stored.per_key, notes=stored.notes,
        )  # fmt: skip


class _Generation:
    """What is known of the tokens in one cache; of one that came filled, what it held is the prompt."""

    def __init__(self, before: int) -> None:
        self.state: Any = None
        self.begun = self.refreshing = self.left_out = self.shows = False
        self.start: Tensor | None = None
        self.padding = 0
        # of each layer, tokens whose keys are known to be finite
        self.looked_at: dict[int, int] = {}
        self._prompt = before
        self._cache: weakref.ref[Any] | None = None

    def comes(self, cache: Any, given: Mapping[str, Any]) -> None:
        """The model is called."""
        self._cache = None if cache is None else weakref.ref(cache)
        x = _input(given)
        if not self._prompt and x is not None:
            self._prompt = x.shape[1]
        self.start = _padding(given.get("attention_mask"))
        self.padding = 0 if self.start is None else int(self.start.sum())

    def prompt(self, given: int | None) -> int:
        return self._prompt if given is None else given

    def require_finite(self, call: AttentionCall, held: Held, layer: int) -> None:
        """Raise where real queries, or real keys that were not looked at yet, are NaN or infinite: none is the best then."""
        new = min(held.count, max(call.queries, held.seen - self.looked_at.get(layer, 0)))
        keys, queries = call.k[:, :, held.count - new :].isfinite(), call.q.isfinite()
        if not held.whole:
            keys |= ~held.real[:, :, held.count - new :, None]
            own = torch.arange(held.seen - call.queries, held.seen, device=call.q.device)
            queries |= (own < (0 if held.start is None else held.start[:, None])).view(-1, 1, call.queries, 1)
        fine = queries.all() & keys.all()
        if not bool(fine):
            what = "keys" if bool(queries.all()) else "queries"
            raise InputError(f"model: {what} of layer {layer} are NaN or infinite, and no key is the best then")
        self.looked_at[layer] = held.seen

    def layer(self, number: int) -> Any:
        cache = None if self._cache is None else self._cache()
        return None if cache is None else cache.layers[number]


def _self_attention(model: nn.Module) -> dict[nn.Module, Place]:
    """Causal attention of the decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"model: {type(model).__name__} is an encoder-decoder; a policy acts in a decoder alone")
    found = [place for place in attentions(model) if place.kind == "self" and getattr(place.module, "is_causal", True)]
    if not found:
        raise InputError(
            f"model: {type(model).__name__} has no causal attention; give a decoder (AutoModelForCausalLM)"
        )
    if len({place.stack for place in found}) > 1:
        several = ", ".join(sorted({repr(place.stack) for place in found}))
        raise InputError(f"model: attends causally in several lists of blocks ({several}); give the decoder alone")
    return {place.module: place for place in found}


def _layer(place: Place) -> int:
    """Of the cache."""
    number = getattr(place.module, "layer_idx", None)
    return place.block if number is None else int(number)


def _require_keys(cache: Any, forgets: bool) -> None:
    """Raise where a layer keeps no keys of all tokens; say that those which will forget cannot take tokens back."""
    from cenote.models.live.store import StoreLayer

    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, StoreLayer):
            what = "a sliding window" if getattr(layer, "is_sliding", False) else type(layer).__name__
            raise InputError(
                f"model: layer {number} of its cache keeps {what}, not keys of all tokens; a policy acts on decoders "
                f"whose layers all attend to everything"
            )
        if forgets:
            layer.is_croppable = False


def _input(given: Mapping[str, Any]) -> Tensor | None:
    """What the model reads, `[batch, tokens, ...]`."""
    return next((given[n] for n in ("input_ids", "inputs_embeds") if isinstance(given.get(n), Tensor)), None)


def _leave(cache: Any, left: bool) -> None:
    """Let each layer know whether a policy goes on reading from it."""
    from cenote.models.live.store import StoreLayer

    for layer in cache.layers:
        if isinstance(layer, StoreLayer):
            layer.left = left


def _padding(mask: Any) -> Int[Tensor, "batch"] | None:
    """How many tokens of padding stand before each item."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise InputError(f"attention_mask: expected [batch, tokens], True for a real token, got one {got}")
    real = mask.bool()
    if bool(real.all()):
        return None
    start = (~real).sum(1)
    if not torch.equal(real, torch.arange(real.shape[1], device=real.device) >= start[:, None]):
        raise InputError(
            "attention_mask: has padding behind or between real tokens; pad on the left (tokenizer.padding_side = 'left')"
        )
    return start


def _require_mask_alone(call: AttentionCall) -> None:
    """Raise where the model adds more to scores than what may not be read: nobody knows the numbers of keys that moved."""
    if call.bias is not None and bool(((call.bias != 0) & may_read(call.bias)).any()):
        raise InputError(
            f"model: {call.place.path} adds numbers to scores by position, which a policy that forgets would misplace; "
            f"take one that keeps all keys"
        )


def _read(
    call: AttentionCall, numbers: Int[Tensor, "batch chosen most"], valid: Bool[Tensor, "batch chosen most"] | None
) -> Float[Tensor, "batch heads queries width"]:
    """One query of each head attends to these keys alone."""
    k, v = grouped.gathered(call.k, numbers), grouped.gathered(call.v, numbers)
    bias = call.bias
    if bias is not None:
        # what the model adds to scores, at the keys that are read
        heads = call.heads if bias.shape[1] == call.heads else numbers.shape[1]
        at = numbers.repeat_interleave(heads // numbers.shape[1], 1).unsqueeze(2)
        bias = bias.expand(call.batch, heads, -1, -1).gather(3, at)
    return grouped.attend(
        call.q, k, v, call.scale,
        readable=None if valid is None else valid.unsqueeze(2), bias=bias, softcap=call.softcap, sinks=call.sinks,
    )  # fmt: skip


def _masked(call: AttentionCall, chosen: Bool[Tensor, "batch _heads queries keys"]) -> AttentionCall:
    """The same call where of what may be read this alone is."""
    if chosen.shape[1] not in (1, call.heads):
        chosen = chosen.repeat_interleave(call.heads // chosen.shape[1], 1)
    before = call.allowed
    at = torch.arange(call.batch, device=chosen.device)[:, None]

    def allowed(rows: Int[Tensor, "batch rows"]) -> Bool[Tensor, "_batch _heads _rows keys"]:
        these = chosen[at, :, rows].transpose(1, 2)
        return these if before is None else these & before(rows)

    return call.replace(allowed=allowed)
