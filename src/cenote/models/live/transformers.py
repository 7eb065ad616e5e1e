"""The seat in transformers: what its registry of attention functions hands out.

While any model is entered, the registry's two ways of handing out a function give it inside of a dispatcher, which passes
straight through for every module that is not seated. Names, configurations and what the registry holds stay as they are, so
that masks are built for, and paths chosen by, the implementation that the user loaded.

Does not know: packed sequences (`cu_seq_lens`) under flash attention, and paged caches.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import seats
from cenote.models.live.calls import Allowed, AttentionCall, causal, dense

ARGUMENTS = ("query", "key", "value", "attention_mask")
DEFAULT = "eager_attention_forward"
WITH_MASKS = ("sdpa", "eager")
"""What takes a mask of any form."""

_entered: set[object] = set()
_taken: dict[tuple[Any, str], Any] = {}


def why_not(module: nn.Module) -> str | None:
    """What stands against editing this module, in words."""
    implementation = implementation_of(module)
    if implementation.startswith("paged|"):
        return f"its attn_implementation is {implementation!r}; use 'sdpa' or 'eager'"
    return None


def enter(key: object, modules: list[nn.Module]) -> None:
    """Put dispatchers around what the registry hands out, for this context too."""
    with seats.LOCK:
        _entered.add(key)
        interface = type(sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS)
        for name in ("get_interface", "__getitem__"):
            if hasattr(interface, name) and (interface, name) not in _taken:
                _taken[interface, name] = interface.__dict__.get(name)
                setattr(interface, name, _handing_out(getattr(interface, name)))
        if hasattr(interface, "get_interface"):
            return
        # as in 5.0: "eager" is not asked of the registry, it's a function of the model's own file
        for module in modules:
            file = sys.modules[inspect.unwrap(type(module).forward).__module__]
            if (file, DEFAULT) not in _taken and hasattr(file, DEFAULT):
                _taken[file, DEFAULT] = file.__dict__[DEFAULT]
                setattr(file, DEFAULT, _Dispatched(file.__dict__[DEFAULT], "eager"))


def leave(key: object) -> None:
    """Where this was the last context, put back what was there."""
    with seats.LOCK:
        _entered.discard(key)
        if _entered:
            return
        while _taken:
            (owner, name), before = next(reversed(_taken.items()))
            if before is not None:
                setattr(owner, name, before)
            elif name in vars(owner):
                delattr(owner, name)
            # last: if this is interrupted, it can be done again
            del _taken[owner, name]


def _handing_out(ask: Callable[..., Any]) -> Callable[..., Any]:
    # each forward asks in each of its layers
    dispatched = functools.cache(_Dispatched)

    @functools.wraps(ask)
    def hand_out(registry: Any, name: str, *default: Any) -> Any:
        found = ask(registry, name, *default)
        return found if isinstance(found, _Dispatched) else dispatched(found, name)

    return hand_out


class _Dispatched:
    """An attention function that looks up who sits at the module."""

    def __init__(self, function: Callable[..., Any], implementation: str) -> None:
        functools.update_wrapper(self, function)
        self.function, self.implementation = function, implementation

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seated = seats.at(module)
        if not seated:
            return self.function(module, *args, **kwargs)
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        return _attended(self.function, self.implementation or "eager", module, seated, given)


def _attended(
    function: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    seated: list[seats.Seated],
    given: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    q, k, v, mask = (given.pop(name, None) for name in ARGUMENTS)
    place = seated[0].place
    if given.get("cu_seq_lens_q") is not None and q.shape[0] == 1 and "flash" in implementation:
        raise InputError(
            f"model: {place.path} computes packed sequences with {implementation!r}, which cannot be edited; load the "
            f"model with attn_implementation='sdpa'"
        )
    allowed, bias = _mask(implementation, module, q, k, mask, given)
    scale = given.get("scaling")
    call = AttentionCall(
        place,
        q,
        k,
        v,
        scale if scale is not None else q.shape[-1] ** -0.5,
        allowed,
        bias,
        softcap=given.get("softcap"),
        sinks=_sinks(module, given),
    )
    made: list[Any] = []

    def fused(call: AttentionCall) -> Tensor:
        options = dict(given)
        if call.scale is not scale and scale is not None:
            options["scaling"] = call.scale
        seen = mask
        if call.allowed is not allowed or call.bias is not bias:
            seen = seats.with_mask(call, q.dtype)
            options.pop("position_bias", None)
            if implementation not in WITH_MASKS:
                raise InputError(
                    f"model: masks cannot be changed under {implementation!r}; load it with attn_implementation='sdpa'"
                )
        made[:] = function(module, call.q, call.k, call.v, seen, **options)
        made.append(made[0].transpose(1, 2))
        return made[2]

    dropout = float(given.get("dropout") or 0.0)
    y, weights = seats.attend(seated, call, fused, dropout if module.training else 0.0)
    if not made:
        shown = weights.to(q.dtype) if weights is not None and implementation == "eager" else None
        return y.transpose(1, 2).contiguous(), shown
    out, maps, as_heads = made
    return (out if y is as_heads else y.transpose(1, 2).contiguous()), maps


def _mask(
    implementation: str, module: nn.Module, q: Tensor, k: Tensor, mask: Any, given: Mapping[str, Any]
) -> tuple[Allowed | None, Tensor | None]:
    """Which keys may be read, and what is added to scores, as this implementation means it."""
    queries, keys = q.shape[2], k.shape[2]
    bias = given.get("position_bias")
    asked = given.get("is_causal")
    is_causal = bool(asked if asked is not None else getattr(module, "is_causal", True))
    if "flash" in implementation and "flex" not in implementation:
        window = given.get("sliding_window")
        padding = None if mask is None else mask[:, -keys:].bool()
        if not is_causal and window is None and padding is None:
            return None, bias
        return causal(keys, keys - queries, window, padding, is_causal), bias
    if hasattr(mask, "mask_mod"):
        return _by_function(mask.mask_mod, q, keys), bias
    if mask is None:
        if implementation == "eager" or not is_causal or queries == 1 or implementation == "flex_attention":
            return None, bias
        return causal(keys), bias
    mask = mask[..., :keys]
    if mask.dtype != torch.bool:
        bias = mask if bias is None else mask + bias
    return dense(mask), bias


def _by_function(mask_mod: Callable[..., Tensor], q: Tensor, keys: int) -> Allowed:
    item = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
    head = torch.zeros(1, dtype=torch.long, device=q.device).view(1, 1, 1, 1)
    key = torch.arange(keys, device=q.device).view(1, 1, 1, -1)
    return lambda rows: mask_mod(item, head, rows[:, None, :, None], key).expand(-1, 1, -1, -1)


def _sinks(module: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """One score per head beside the keys: given to the function, or read by the model's own from the module."""
    found = given.get("s_aux")
    own = getattr(module, "sinks", None)
    return found if found is not None else own if isinstance(own, Tensor) else None


def implementation_of(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return str(getattr(config, "_attn_implementation", None) or "eager")
