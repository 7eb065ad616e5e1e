"""Fewer tokens from a block on: states, masks, positions and cache of a running model, together.

`Shorten` is an edit like any other; what reduces is arithmetic on tensors and sees none of this. Survivors keep their
positions. With a cache the blocks behind a cut hold fewer keys than those before it, and decoded tokens go on at the prompt's
length. What comes behind a prompt, in a second piece too, is decoded: only the prompt is shortened.

Does not know: attention in windows of a grid or in chunks, packed images, flash and flex attention, static caches, blocks that
know positions by themselves (each an error at entry, or where the model is called).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_several
from cenote.models.live import left
from cenote.models.live.calls import AttentionCall, Place
from cenote.models.live.edited import edited
from cenote.models.live.edits import AttentionEdit, BlockEdit, Edit, Where
from cenote.models.live.shortenable import checked
from cenote.models.live.shortening import Reducer, Shortening

GIVEN = ("x", "sizes", "mask")
READ = ("attention", "keys", "values")
"""Signals that are read from the block's own attention."""
CHUNK = 128

_LOCK = threading.RLock()
_RUNNING: dict[tuple[nn.Module, int], Shortening] = {}


class Shorten(BlockEdit):
    """Fewer tokens behind a block, as an edit of a running model.

    Several of them in one stack, in one context or nested, shorten one after the other. Spans, in whatever context, follow the
    tokens: behind a cut a token is in a span if one of its originals was.

    Args:
        reducer: `reducer(x, sizes=, mask=, **signals) -> Reduced`, from the states that the block wrote, `[batch, tokens,
            dim]`. It must leave out tokens where its mask is False. It is given the signals that its `needs` names, or else
            its arguments: "attention" `[batch, heads, tokens]`, what each token is given in the block's attention by the rows
            below, their mean; "keys" and "values", after positions, `[batch, kv_heads, tokens, width]`; those in `signals`.
        block: the block behind which tokens are fewer.
        span: where it may reduce: the name of a span, or `[batch or 1, tokens]`; all other tokens are protected.
        protect: what is never touched: the first so many real tokens ([CLS] and registers), names of spans, or
            `[batch or 1, tokens]`.
        stack: path of the list of blocks, where there are several.
        proportional: behind this block keys weigh by how many originals they stand for (`log size` is added to scores).
        rows: queries whose attention is read: "first", "last", "all" (means over columns), or the name of a span.
        signals: of the prompt's tokens `[batch, tokens, ...]`, by name, such as a saliency; they follow the tokens.
        restore: the block behind which all tokens are back in their places, -1 for the last: merged ones as copies, so that a
            mean over tokens weighs by size, dropped ones as they were last seen.
        uneven: in a stack that is not causal, allow items to keep different numbers of tokens.

    Raises:
        InputError: at entry, where the stack cannot be shortened; when the model is called, where what its blocks are given
            cannot be; on leaving, where it took no token away.

    Example:
        >>> from cenote.core.reduced import Reduced
        >>> def every_other(x, sizes, mask):
        ...     to = torch.arange(x.shape[1]).expand(len(x), -1) // 2
        ...     return Reduced(x[:, ::2], torch.full_like(sizes[:, ::2], 2.0), to)
        >>> _ = torch.backends.mha.set_fastpath_enabled(False)
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> shorten = Shorten(every_other, block=0)
        >>> with edited(model, shorten):
        ...     model(torch.ones(1, 6, 8)).shape
        torch.Size([1, 3, 8])
        >>> shorten.found.counts, shorten.found.assignment.tolist()
        ({0: (6, 3)}, [[0, 0, 1, 1, 2, 2]])
        >>> _ = torch.backends.mha.set_fastpath_enabled(True)
    """

    counts_itself = True

    def __init__(
        self,
        reducer: Reducer,
        block: int,
        *,
        span: str | Bool[Tensor, "_batch tokens"] | None = None,
        protect: int | str | Sequence[str] | Bool[Tensor, "_batch tokens"] = 0,
        stack: str | None = None,
        proportional: bool = False,
        rows: Literal["first", "last", "all"] | str = "last",
        signals: Mapping[str, Tensor] | None = None,
        restore: int | None = None,
        uneven: bool = False,
    ) -> None:
        if not callable(reducer):
            raise InputError(f"reducer: expected a function or module, got {type(reducer).__name__}")
        for name, number in (("block", block), ("restore", 0 if restore is None else restore)):
            if not isinstance(number, Integral):
                raise InputError(f"{name}: expected the number of a block, got {number!r}")
        for name, given in (("span", span), ("protect", protect)):
            if isinstance(given, Tensor) and (given.dtype != torch.bool or given.dim() != 2):
                raise InputError(
                    f"{name}: expected a bool tensor [batch, tokens], got {given.dtype} {tuple(given.shape)}"
                )
        self.reducer, self.block, self.stack = reducer, block, stack
        self.span, self.protect = span, [protect] if isinstance(protect, str) else protect
        self.proportional, self.rows, self.uneven, self.restore = proportional, rows, uneven, restore
        self.signals = _signals(signals)
        self.needs = _needs(reducer, self.signals)
        named = [span] if isinstance(span, str) else []
        named += list(self.protect) if isinstance(self.protect, Sequence) else []
        self.asks = named
        self.found: Shortening | None = None
        self._read: _Signals | None = None
        self._run: Any = None
        self._takes: dict[Place, list[str]] = {}

    def parts(self, model: nn.Module) -> Sequence[Edit]:
        if self._run is not None:
            raise InputError("edits: this Shorten is entered already; make another one")
        self._model_stack, self._blocks, self._attention, self._crossed = checked(model, self)
        self._read = None
        if not self.needs & set(READ):
            return (self,)
        self._read = _Signals(self, Where([self.block], ["self"], self._blocks[0].stack))
        return (self, self._read)

    def joins(self, run: Any) -> None:
        self._run = run
        key = (self._model_stack, run.thread)
        with _LOCK:
            found = _RUNNING.get(key)
            if found is None:
                causal = any(getattr(place.module, "is_causal", False) for place in self._attention)
                found = _RUNNING[key] = Shortening(self._blocks, self._attention, causal, bool(self._crossed))
                left.stand([place.module for place in (*self._attention, *self._crossed)], found)
            found.cuts.append(self)
        self.found = found

    def ends(self) -> None:
        if self._run is None or self.found is None:
            return
        with _LOCK:
            found, key = self.found, (self._model_stack, self._run.thread)
            found.cuts = [cut for cut in found.cuts if cut is not self]
            if not found.cuts:
                _RUNNING.pop(key, None)
                left.go(found)
                found.lets_go()
        self._takes.clear()
        self._run = self._read = None
        del self._model_stack, self._blocks, self._attention, self._crossed

    def given(self, place: Place, h: Tensor, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self.found
        assert found is not None
        if found.cuts[0] is not self:
            return given
        if place not in self._takes:
            self._takes[place] = list(inspect.signature(place.module.forward).parameters)
        if place.stack != found.stack:
            return found.crosses(place, given, self._takes[place], h.shape[1])
        if place.block == 0:
            found.arrives(h, given)
        return found.rewritten(place, given, self._takes[place])

    def leaves(self, place: Place, h: Tensor) -> Tensor:
        found = self.found
        assert found is not None
        if place.stack != found.stack or found.decoding:
            return h
        if place.block == self.block:
            h = found.reduce(self, h)
            before, after = found.counts[self.block]
            self._run.counts(self, place, before - after)
        if self.restore is not None and place.block == self.restore % len(found.blocks):
            h = found.restored(place.block, h)
        return h

    def untouched(self, real: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which of the prompt's tokens the reducer must not touch."""
        kept = torch.zeros_like(real)
        if isinstance(self.protect, int):
            kept = kept | (real.cumsum(1) <= self.protect)
        elif isinstance(self.protect, Tensor):
            kept = kept | self._of_batch("protect", self.protect, real)
        else:
            for name in self.protect:
                kept = kept | self._of_batch(name, self._run.spans[name], real)
        if self.span is not None:
            span = self.span if isinstance(self.span, Tensor) else self._run.spans[self.span]
            kept = kept | ~self._of_batch("span", span, real)
        return kept

    def _of_batch(self, name: str, span: Tensor, real: Tensor) -> Tensor:
        batch, tokens = real.shape
        if span.shape[1] != tokens or batch % len(span):
            raise InputError(
                f"spans: {name} is of {len(span)} items of {span.shape[1]} tokens, and {self.found and self.found.stack} reads "
                f"{batch} items of {tokens} tokens"
            )
        return span.to(real.device).repeat_interleave(batch // len(span), 0)

    def reads(self) -> dict[str, Tensor]:
        """What was read in the block's attention."""
        if self._read is None:
            return {}
        read, self._read.found = self._read.found, {}
        if not read:
            raise InputError(f"model: block {self.block} has no attention of its own from which signals could be read")
        return read


class _Signals(AttentionEdit):
    """What a reducer asks of the attention in its block; only rows of weights are ever computed."""

    def __init__(self, cut: Shorten, at: Where) -> None:
        self.cut, self.at = cut, at
        self.found: dict[str, Tensor] = {}
        self.asks = (cut.rows,) if "attention" in cut.needs and cut.rows not in ("first", "last", "all") else ()

    def begins(self) -> None:
        self.found = {}

    def inputs(self, call: AttentionCall) -> AttentionCall:
        shortening = self.cut.found
        assert shortening is not None
        if shortening.decoding:
            return call
        if "keys" in self.cut.needs:
            self.found["keys"] = call.k
        if "values" in self.cut.needs:
            self.found["values"] = call.v
        if "attention" in self.cut.needs:
            assert shortening.now is not None
            self.found["attention"] = self._attention(call, shortening.now.mask)
        return call

    def _attention(
        self, call: AttentionCall, real: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens"]:
        rows = self.cut.rows
        if rows == "first":
            chosen = real & (real.cumsum(1) == 1)
        elif rows == "last":
            chosen = real & (real.flip(1).cumsum(1).flip(1) == 1)
        else:
            chosen = real if rows == "all" else real & call.queries_in(rows)
        if not chosen.any(1).all():
            raise InputError(f"rows: {rows!r} has no query in some item at {call.place.path}")
        total = call.q.new_zeros(call.batch, call.heads, call.keys, dtype=torch.float32)
        for start in range(0, call.queries, CHUNK):
            part = torch.zeros_like(chosen)
            part[:, start : start + CHUNK] = chosen[:, start : start + CHUNK]
            if part.any():
                some = call.only(part)
                weights = some.softmax(some.scores())
                if some.real is not None:
                    weights = weights.masked_fill(~some.real[:, None, :, None], 0.0)
                total = total + weights.sum(2)
        return total / chosen.sum(1).view(-1, 1, 1)


@contextmanager
def shortened(
    model: nn.Module,
    reducers: Mapping[int, Reducer],
    *,
    spans: Mapping[str, Bool[Tensor, "batch tokens"]] | None = None,
    **options: Any,
) -> Iterator[Shortening]:
    """Run a model with fewer tokens behind some of its blocks; on leaving it is as it was, also after an exception.

    The short form of `edited(model, Shorten(reducer, block), ...)`.

    Args:
        model: any module whose blocks read states first; not compiled.
        reducers: of a block, what reduces the states that it wrote.
        spans: as in `edited`.
        options: of every `Shorten`.

    Returns:
        What became of the tokens.

    Raises:
        InputError: as `Shorten`.
    """
    if not isinstance(reducers, Mapping) or not reducers:
        raise InputError("reducers: give at least one, by the number of the block that it stands behind")
    cuts = [Shorten(reducer, block, **options) for block, reducer in reducers.items()]
    cuts.sort(key=lambda cut: cut.block)
    with edited(model, *cuts, spans=spans):
        assert cuts[0].found is not None
        yield cuts[0].found


def _signals(given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What the user gives of the prompt's tokens, by name."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"signals: expected a tensor for each name, got {type(given).__name__}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"signals: expected a tensor for each name, got {type(value).__name__} for {name!r}")
    return dict(given)


def _needs(reducer: Reducer, signals: Mapping[str, Tensor]) -> set[str]:
    """Names of the signals that a reducer asks for: its `needs`, or its arguments."""
    known = {*READ, *signals}
    asked = getattr(reducer, "needs", None)
    if asked is None:
        call = reducer.forward if isinstance(reducer, nn.Module) else reducer
        named = [
            p for p in inspect.signature(call).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        named = [p for p in named[1:] if p.name not in GIVEN]
        unknown = {p.name for p in named if p.default is p.empty} - known
        asked = {p.name for p in named} & known
    else:
        require_several(needs=asked)
        unknown = set(asked) - known
    if unknown:
        raise InputError(
            f"reducer: asks for {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}; give others by name in "
            f"signals"
        )
    return set(asked)
