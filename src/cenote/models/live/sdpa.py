"""The seat in modules that call `torch.nn.functional.scaled_dot_product_attention` themselves.

While a seated module's forward runs, and no longer, a function mode of torch sees that call: in this thread alone, and nothing
global is touched. `torch.nn.MultiheadAttention` calls it deep inside of torch, in a function which that mode sees as a whole;
there torch's own function runs with its attention replaced.

Does not know: compiled modules, nested tensors.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cenote.core import InputError
from cenote.models.live import seats
from cenote.models.live.calls import Allowed, AttentionCall, Place, causal, dense
from cenote.models.live.transformers import implementation_of

_before: dict[nn.Module, Callable[..., Any] | None] = {}


def why_not(module: nn.Module) -> str | None:
    """What stands against editing this module, in words."""
    if isinstance(module, nn.MultiheadAttention) and torch.backends.mha.get_fastpath_enabled():
        return (
            "torch computes it in one piece where it can; call torch.backends.mha.set_fastpath_enabled(False) before, for the "
            "plain runs too"
        )
    if getattr(module, "fused_attn", True) is False:
        return "its attention is written out; set fused_attn=True on it"
    asks = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if asks is not None and {"_attn_implementation", "softmax"} <= set(asks.co_names):
        implementation = implementation_of(module)
        if implementation != "sdpa":
            return f"under attn_implementation={implementation!r} it is written out; load the model with 'sdpa'"
    return None


def enter(module: nn.Module) -> None:
    """Let the module's forward run under the mode; a second context finds it so."""
    with seats.LOCK:
        if module in _before:
            return
        _before[module] = module.__dict__.get("forward")
        module.__dict__["forward"] = _Seen(module)


def leave(module: nn.Module) -> None:
    """Called when nobody sits there any more."""
    with seats.LOCK:
        if module not in _before:
            return
        before = _before[module]
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before
        # last: if this is interrupted, it can be done again
        del _before[module]


class _Seen:
    """A module's forward, under the mode where somebody of this thread sits there."""

    def __init__(self, module: nn.Module) -> None:
        functools.update_wrapper(self, module.forward)
        self.module, self.forward = module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seated = seats.at(self.module)
        if not seated:
            return self.forward(*args, **kwargs)
        read = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with _Mode(seated, read):
            return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Of a copy that is made meanwhile, which is another model: what a copy of the module's own forward is."""
        return copy.deepcopy(self.forward, memo)


class _Mode(TorchFunctionMode):
    def __init__(self, seated: list[seats.Seated], read: Tensor | None) -> None:
        super().__init__()
        self.seated, self.read = seated, read

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            _require_tokens(self.seated[0].place, self.read, args[0] if args else kwargs["query"])
            return _attended(self.seated, *args, **kwargs)
        if function is F.multi_head_attention_forward:
            return _multi_head(self.seated)(*args, **kwargs)
        return function(*args, **kwargs)


def _multi_head(seated: list[seats.Seated]) -> Callable[..., Any]:
    """torch's function, whose attention comes here. It writes attention out where weights are asked for."""
    own = F.multi_head_attention_forward

    def no_weights(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("need_weights", True):
            raise InputError(
                f"model: {seated[0].place.path} is called with need_weights=True, and then its attention is written out; "
                f"call it with need_weights=False"
            )
        names = {
            **own.__globals__,
            "has_torch_function": lambda _: False,
            "scaled_dot_product_attention": functools.partial(_attended, seated),
        }
        body = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        return body(*args, **kwargs)

    return no_weights


def _require_tokens(place: Place, read: Tensor | None, query: Tensor) -> None:
    """Raise where queries are channels of what the module reads, `[batch, tokens, dim]`, as in cross-covariance attention."""
    if read is None or read.dim() != 3 or query.dim() != 4:
        return
    _, heads, queries, width = query.shape
    if width == read.shape[1] != queries and heads * queries == read.shape[2]:
        raise InputError(
            f"model: {place.path} attends among its {heads * queries} channels, not among tokens; give other places, or edit "
            f"its blocks (BlockEdit)"
        )


def _attended(
    seated: list[seats.Seated],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    place = seated[0].place
    if query.dim() != 4:
        raise InputError(
            f"model: {place.path} computes attention of a tensor of shape {tuple(query.shape)}; only [batch, heads, tokens, "
            f"width] can be edited"
        )
    keys = key.shape[2]
    allowed: Allowed | None = causal(keys) if is_causal else None
    bias = None
    if attn_mask is not None:
        mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        mask = mask.expand(*mask.shape[:3], keys)
        bias = None if mask.dtype == torch.bool else mask
        allowed = dense(mask)
    used = scale if scale is not None else query.shape[-1] ** -0.5
    call = AttentionCall(place, query, key, value, used, allowed, bias)

    def fused(call: AttentionCall) -> Tensor:
        changed = call.allowed is not allowed or call.bias is not bias
        return F.scaled_dot_product_attention(
            call.q,
            call.k,
            call.v,
            attn_mask=seats.with_mask(call, query.dtype) if changed else attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal and not changed,
            scale=call.scale if call.scale != used else scale,
            **options,
        )

    return seats.attend(seated, call, fused, dropout_p).y
