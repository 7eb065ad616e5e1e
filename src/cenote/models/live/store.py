"""Keys and values that a decoder keeps, written in place, and exact decoding from them.

transformers' own cache is made anew at each token, all keys of all layers copied for one more. Here a layer has room for twice
as many as it needed when the room was last too small, and a token is written where it belongs; what the model reads are views,
equal to the bit. Where policies forget keys, a layer goes on counting the tokens that it saw, so that positions stay right.

What it does not know: sliding windows and states of linear layers, which keep the layers that transformers made for them;
caches of a fixed size, quantised or offloaded ones.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from cenote.core import InputError, grouped
from cenote.core.requirements import require_at_least
from cenote.models.caches import ARGUMENTS
from cenote.models.live.calls import AttentionCall
from cenote.models.live.edited import Run, edited, require_module
from cenote.models.live.edits import AttentionEdit, Where

LEAST = 64
"""Tokens that a layer has room for at first."""


class StoreLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer; `keys` and `values`, `[batch, kv_heads, tokens, width]`, are views of a larger room.

    What was read before a `crop` may be written over behind it. While autograd records they are copied, as transformers does:
    it may keep the keys for queries' gradients alone.

    Args:
        room: for how many tokens there is room at first; by default 64, or what the first ones need.

    Attributes:
        seen: tokens that were stored, those that were forgotten among them.
        numbers: of the keys among all tokens seen, -1 where a head has none any more, `[batch, kv_heads, tokens]`; None while
            nothing was forgotten.
        per_key: tensors `[batch, kv_heads, tokens, ...]` that follow the keys when these are cropped, forgotten or reordered;
            zeros for a token more.
        notes: what else is kept beside this layer: tensors `[batch, ...]` follow the items, and a crop clears all.
        left: whether the policy that read from here is gone, so that nobody tells the model which keys were forgotten.
    """

    keys: Any
    values: Any

    def __init__(self, room: int | None = None, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        if room is not None:
            require_at_least(1, room=room)
        self.seen = 0
        self.numbers: Int[Tensor, "batch kv_heads tokens"] | None = None
        self.per_key: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.left = False
        self._rooms: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        self._least = LEAST if room is None else room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store more tokens.

        Returns:
            All keys and values that are there.

        Raises:
            InputError: where keys were forgotten, and the policy that did is gone.
        """
        if self.left and self.numbers is not None:
            raise InputError(
                "cache: keys were forgotten, and without a policy the model takes those that are left for others; go on with "
                "a policy (policy.on), or begin with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled():
            super().update(key_states, value_states, *args, **kwargs)
            self._leave_rooms()
        else:
            self.keys = self._written("keys", self.keys, key_states)
            self.values = self._written("values", self.values, value_states)
        new = key_states.shape[2]
        if self.numbers is not None:
            more = torch.arange(self.seen, self.seen + new, device=self.numbers.device)
            self.numbers = torch.cat([self.numbers, more.expand(*self.numbers.shape[:2], -1)], 2)
        self.seen += new
        for name, x in self.per_key.items():
            self.per_key[name] = torch.cat([x, x.new_zeros(*x.shape[:2], new, *x.shape[3:])], 2)
        return self.keys, self.values

    def forget(self, kept: Bool[Tensor, "batch kv_heads tokens"]) -> None:
        """Keep these keys of each head alone; the room of the others is given back.

        Heads may keep several numbers of keys: the shorter ones are filled up with what `numbers` calls -1.

        Raises:
            InputError: for another shape.
        """
        if kept.dtype != torch.bool or kept.shape != self.keys.shape[:3]:
            raise InputError(f"kept: expected bool {list(self.keys.shape[:3])}, got {kept.dtype} {list(kept.shape)}")
        if bool(kept.all()):
            return
        counts = kept.sum(2, keepdim=True)
        most = int(counts.max())
        # stable: those that stay first, each in its order
        at = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :most]
        before = torch.arange(kept.shape[2], device=kept.device).expand(kept.shape)
        numbers = (before if self.numbers is None else self.numbers).gather(2, at)
        self.numbers = numbers.masked_fill(torch.arange(most, device=at.device) >= counts, -1)
        self.per_key = {
            name: x.gather(2, at.view(*at.shape, *(1,) * (x.dim() - 3)).expand(*at.shape, *x.shape[3:]))
            for name, x in self.per_key.items()
        }
        keys, values = grouped.gathered(self.keys, at), grouped.gathered(self.values, at)
        empty = {name: x[:, :, :0] for name, x in (("keys", keys), ("values", values))}
        if torch.is_grad_enabled() or any(most + 1 <= room.shape[2] // 4 for room in self._rooms.values()):
            self._leave_rooms()
        self.keys = self._written("keys", self._start("keys", empty["keys"]), keys)
        self.values = self._written("values", self._start("values", empty["values"]), values)

    @property
    def nbytes(self) -> int:
        """Of keys and values, what has room for more and is not yet used among them."""
        if not self.is_initialized or self.keys is None:
            return 0
        held = [self._rooms[name] if self._in_room(name, x) else x for name, x in self._stored()]
        return sum(x.numel() * x.element_size() for x in held)

    def get_seq_length(self) -> int:
        """How many tokens were seen: what positions go on from."""
        return self.seen if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, `-n` of them.

        Raises:
            InputError: where keys were forgotten, which nobody brings back.
        """
        if tokens_to_remove and self.numbers is not None:
            raise InputError(
                "cache: keys were forgotten, and tokens cannot be taken back behind that; decode without drafts "
                "(assistant_model, prompt_lookup_num_tokens), or with a policy that keeps all keys"
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            self.seen = self.keys.shape[2]
            self.per_key = {name: x[:, :, : self.seen] for name, x in self.per_key.items()}
            self.notes.clear()

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.seen, self.numbers, self.left = 0, None, False
        self.per_key.clear()
        self.notes.clear()
        self._leave_rooms()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Other items in the places of these: beams."""
        self._take(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each item several times."""
        self._take(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These items alone."""
        self._take(lambda x: x[indices])

    def _take(self, items: Callable[[Tensor], Tensor]) -> None:
        if not self.seen:
            return
        self.keys, self.values = items(self.keys), items(self.values)
        self._leave_rooms()
        self.numbers = None if self.numbers is None else items(self.numbers)
        self.per_key = {name: items(x) for name, x in self.per_key.items()}
        self.notes = {name: items(x) if isinstance(x, Tensor) else x for name, x in self.notes.items()}

    def _leave_rooms(self) -> None:
        self._rooms.clear()
        self._views.clear()

    def _stored(self) -> list[tuple[str, Tensor]]:
        return [("keys", self.keys), ("values", self.values)]

    def _start(self, name: str, empty: Tensor) -> Tensor:
        """The beginning of the room, where there is one."""
        room = self._rooms.get(name)
        return empty if room is None else room[:, :, :0]

    def _in_room(self, name: str, x: Tensor) -> bool:
        """Whether these are the first tokens of the room, so that more can be written behind them."""
        room = self._rooms.get(name)
        return (
            room is not None
            and x.dim() == 4
            and x.shape[:2] == room.shape[:2]
            and x.data_ptr() == room.data_ptr()
            and x.stride() == room.stride()
        )

    def _written(self, name: str, before: Tensor, new: Tensor) -> Tensor:
        held = before.shape[2] if before.dim() == 4 else 0
        more = new.shape[2]
        total = held + more
        room = self._rooms.get(name)
        fits = (
            room is not None
            and total <= room.shape[2]
            and (before is self._views.get(name) or self._in_room(name, before) or not held)
            and room.shape[:2] == new.shape[:2]
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        )
        if room is None or not fits:
            # where the room is new, not too small: beams take another one at each step
            extra = held if room is not None and room.shape[2] < total else LEAST
            tokens = max(total, held + extra if held else 1 << (total - 1).bit_length(), self._least)
            room = new.new_empty(*new.shape[:2], tokens, new.shape[3])
            if held:
                room[:, :, :held] = before
            self._rooms[name] = room
        room.narrow(2, held, more).copy_(new)
        self._views[name] = room.narrow(2, 0, total)
        return self._views[name]


class KeyValueStore(Cache):
    """The cache of a decoder, written in place; a cache of transformers, equal to `DynamicCache` to the bit.

    Args:
        config: of the model, so that layers with a sliding window keep no more than that.
        room: for how many tokens there is room at first; 64 by default, or what the prompt needs.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> store = KeyValueStore(model.config)
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([[5, 6, 7, 8]]), past_key_values=store)
        >>> store.get_seq_length(), store.nbytes
        (4, 4096)
    """

    def __init__(self, config: Any = None, room: int | None = None) -> None:
        found = DynamicCache(config=config)
        new = functools.partial(StoreLayer, room)
        given = {"layers": found.layers} if found.layers else {"layer_class_to_replicate": new}
        super().__init__(**given)
        adopt(self, room)

    @property
    def seen_tokens(self) -> int:
        """What was stored, whether forgotten since or not."""
        return int(self.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Of all layers, room for more among them."""
        return nbytes(self)


def nbytes(cache: Any) -> int:
    """Bytes of keys and values in a cache, with what its layers have room for."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StoreLayer):
            total += layer.nbytes
        elif isinstance(getattr(layer, "keys", None), Tensor):
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return total


def adopt(cache: Any, room: int | None = None) -> None:
    """Let the growing layers of a cache write in place from now on; what they hold stays. Those of another kind are left alone.

    Raises:
        InputError: for a cache of a fixed size, a quantised or an offloaded one.
    """
    if not hasattr(cache, "layers"):
        raise InputError(f"cache: expected one of transformers' caches, got {type(cache).__name__}")
    if getattr(cache, "offloading", False):
        raise InputError(
            "cache: is offloaded, and cannot be written in place; give cache_implementation='dynamic', or none"
        )
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, StoreLayer):
            continue
        kinds = {cls.__name__ for cls in type(layer).__mro__}
        if "StaticLayer" in kinds or "BaseQuantizedLayer" in kinds or "QuantizedLayer" in kinds:
            kind = "of a fixed size" if "StaticLayer" in kinds else "quantised"
            raise InputError(
                f"cache: {type(cache).__name__} is {kind}; give a growing one (DynamicCache), or none at all, and decode "
                f"without cache_implementation"
            )
        if type(layer) is DynamicLayer:
            cache.layers[number] = _adopted(layer, room)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = StoreLayer


def _adopted(layer: Any, room: int | None) -> StoreLayer:
    new = StoreLayer(room)
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        new.update(layer.keys, layer.values)
    return new


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache.

    Raises:
        InputError: where it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ARGUMENTS if name in parameters), None)
    if name is None:
        raise InputError(
            f"model: {type(model).__name__} takes no cache; give a causal decoder of transformers (AutoModelForCausalLM)"
        )
    return name


def with_store(model: nn.Module, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A call's arguments by name with a cache that writes in place, and this cache; None where the call keeps none.

    An empty or filled cache that came stays the same object; a new one is made where the model would make one.
    """
    name = cache_argument(model)
    came = next((given[n] for n in ARGUMENTS if given.get(n) is not None), None)
    if came is not None:
        # of an encoder-decoder: what the decoder reads of itself
        held = getattr(came, "self_attention_cache", came)
        adopt(held)
        return dict(given), held
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    asked = given.get("use_cache")
    keeps = bool(getattr(text, "use_cache", False)) if asked is None else bool(asked)
    if not keeps or getattr(config, "is_encoder_decoder", False):
        return dict(given), None
    store = KeyValueStore(text)
    return {**{n: v for n, v in given.items() if n not in ARGUMENTS}, name: store}, store


@contextmanager
def in_place(model: nn.Module) -> Iterator[None]:
    """Let a decoder write its cache in place, in `generate` and in every forward: the same outputs to the bit.

    Args:
        model: a decoder of transformers; it is as it was on leaving. A cache that it filled goes on writing in place.

    Raises:
        InputError: for a model that takes no cache; in use, for a cache that cannot be written in place.
    """
    require_module(model)
    cache_argument(model)
    with _called(model, lambda given: with_store(model, given)[0]):
        yield


@contextmanager
def _called(model: nn.Module, act: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Whenever the model is called in this thread: from the arguments by name to those it is given."""
    names, thread = list(inspect.signature(model.forward).parameters), threading.get_ident()

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if module is not model or threading.get_ident() != thread:
            return None
        return (), act({**dict(zip(names, args, strict=False)), **kwargs})

    handle = model.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def shows_weights(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call asks for attention weights."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    asked = given.get("output_attentions")
    return bool(getattr(text, "output_attentions", False)) if asked is None else bool(asked)


class GroupedSteps(AttentionEdit):
    """Steps of one token: the query heads of a key head as rows, in place of keys repeated for each of them.

    Equal to rounding; the prompt, and whatever has several queries, runs as it was loaded.

    Args:
        at: the places.

    Attributes:
        shown: whether weights are asked for, which grouped rows do not hand out: then all runs as it was loaded.
    """

    innermost = True

    def __init__(self, at: Where | None = None) -> None:
        self.at = at or Where(kinds=["self"])
        self.shown = False

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        if call.queries != 1 or self.shown or (torch.is_grad_enabled() and call.q.requires_grad):
            return fused(call)
        return attended(call)


def attended(call: AttentionCall) -> Float[Tensor, "batch heads queries width"]:
    """A call computed by grouped rows."""
    return grouped.attend(
        call.q, call.k, call.v, call.scale,
        readable=call.readable(), bias=call.bias, softcap=call.softcap, sinks=call.sinks,
    )  # fmt: skip


@contextmanager
def exact_decoding(model: nn.Module) -> Iterator[Run]:
    """Decode faster with the same results to rounding: the cache is written in place, and steps of one token read grouped keys.

    Args:
        model: a decoder of transformers; on leaving it is as it was.

    Returns:
        What ran, see `edited`.

    Raises:
        InputError: as `in_place` and `edited`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> with exact_decoding(model):
        ...     made = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        >>> made.shape
        torch.Size([1, 5])
    """
    steps = GroupedSteps()

    def enters(given: dict[str, Any]) -> dict[str, Any]:
        steps.shown = shows_weights(model, given)
        return given

    with in_place(model), edited(model, steps) as run, _called(model, enters):
        yield run
