"""The one context manager through which a running model is reached."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cenote.core import InputError
from cenote.core.interrupts import uninterrupted
from cenote.models.live import left, places, sdpa, seats, transformers
from cenote.models.live.calls import AttentionCall, Place, cached
from cenote.models.live.edits import (
    AttentionEdit,
    BlockEdit,
    Edit,
    HeadRecorder,
    InputsRecorder,
    RowRecorder,
    StateRecorder,
    Where,
    name_of,
    original,
    overrides,
    remembers,
    require_spans,
    require_where,
    whole,
)
from cenote.models.live.reachable import why_not

RECORDERS: dict[str, Callable[..., Edit]] = {
    "rows": RowRecorder,
    "heads": HeadRecorder,
    "inputs": InputsRecorder,
    "states": StateRecorder,
}
Entered = TypeVar("Entered", bound="Run")

NOBODY = 0
"""No thread has this number."""
_REMEMBERING: dict[int, Run] = {}
"""Of an edit that remembers, by its identity: where it is entered."""


class Run:
    """A model that is entered: what was edited, where, at which step.

    Attributes:
        effect: `effect[place, step]` counts what was edited there: rows that a `RowEdit` chose, tokens that a `Shorten` took
            away, computations otherwise.
        step: of decoding; 0 is the prompt.
    """

    def __init__(self, model: nn.Module, edits: Sequence[Edit], spans: Mapping[str, Tensor]) -> None:
        self.model, self.edits, self.spans = model, edits, spans
        self.thread = threading.get_ident()
        self.effect: Counter[tuple[Place, int]] = Counter()
        self._forwards = 0
        self._acted: set[int] = set()
        self._so_far: dict[Place, int] = {}
        self._prompts: dict[Place, int] = {}
        # tokens in the cache before this forward, where there is one that tells, and behind the last
        self._before: int | None = None
        self._behind = 0

    @property
    def step(self) -> int:
        return max(0, self._forwards - 1)

    def arrives(self, place: Place, call: AttentionCall) -> Mapping[str, object]:
        """Spans, step, and where the queries and keys of this call lie among all tokens so far."""
        queries, keys = call.queries, call.keys
        spans = left.spans_at(place, self.spans)
        before = self._so_far.get(place)
        if place.kind == "cross":
            so_far = (before or 0) + queries if queries == 1 else queries
            return {**self._read(place, so_far, queries), "spans": spans, "key_start": 0}
        if queries == keys:
            so_far = keys
        elif before is None and self._before is not None:
            so_far = self._before + queries
        elif before is None:
            # a cache that was filled before, or one with room for more, that does not tell
            so_far = keys if any(span.shape[1] == keys for span in spans.values()) else queries
        else:
            so_far = before + queries
        # a cache of a sliding window holds the last keys only
        return {**self._read(place, so_far, queries), "spans": spans, "key_start": max(0, so_far - keys)}

    def _read(self, place: Place, so_far: int, queries: int) -> dict[str, object]:
        """What follows from how many tokens a place has read so far, these queries the last."""
        before = self._so_far.get(place)
        # all tokens anew, and one more than before, is decoding without a cache
        decodes = queries < so_far or so_far == (before or 0) + 1
        if before is None or not decodes:
            self._prompts[place] = so_far
        self._so_far[place] = so_far
        return {"step": self.step, "query_start": so_far - queries, "prompt": self._prompts[place]}

    @property
    def decoding(self) -> bool:
        """Whether what the model reads now stands behind a prompt, in a cache that tells."""
        return bool(self._before)

    def hears(self) -> bool:
        """Whether this thread is the one that entered."""
        return threading.get_ident() == self.thread

    def looks(self, edit: Edit) -> None:
        """This edit looked, and rightly left all as it was."""
        self._acted.add(id(edit))

    def counts(self, edit: Edit, place: Place, number: int) -> None:
        """This edit acted, on that many."""
        if number:
            self.effect[place, self.step] += number
            self._acted.add(id(edit))

    def begins_forward(self, given: Iterable[object]) -> None:
        """The whole model is called once more, with these arguments."""
        if threading.get_ident() != self.thread:
            return
        self._forwards += 1
        self._before = cached(given)
        if self._before == 0:
            # another prompt
            self._so_far.clear()
        elif self._before is not None and self._before < self._behind:
            # decoding with drafts takes back those that were refused
            taken_back = self._behind - self._before
            self._so_far = {place: so_far - taken_back for place, so_far in self._so_far.items()}

    def ends_forward(self, given: Iterable[object]) -> None:
        """It was called with these arguments."""
        if threading.get_ident() == self.thread:
            self._behind = cached(given) or 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hear nothing for a while: the model runs as if it was not entered. Afterwards the thread that goes on is heard."""
        self.thread = NOBODY
        try:
            yield
        finally:
            self.thread = threading.get_ident()

    def require_effect(self) -> None:
        """Raise where an edit did nothing."""
        for edit in self.edits:
            if id(edit) not in self._acted:
                ran = self._forwards or self.effect
                why = "its places did not run, or it chose no query" if ran else "the model did not run in this thread"
                raise InputError(f"edits: {name_of(edit)} did nothing: {why}")


@contextmanager
def edited(
    model: nn.Module, *edits: Edit, spans: Mapping[str, Bool[Tensor, "batch tokens"]] | None = None
) -> Iterator[Run]:
    """Run a model with changes in it, for a while; on leaving it is as it was, also after an exception.

    Edits hear only the thread that entered. Contexts may be nested, of one model or several, and left in any order; edits
    act in the order of entering.

    Args:
        model: any module; not compiled.
        edits: what changes; those at the same place act in this order.
        spans: which of the prompt's tokens are the image, the question...

    Returns:
        What was edited.

    Raises:
        InputError: at entry, where a place is out of reach or a span doesn't fit; on leaving, where an edit did nothing.

    Example:
        >>> from torch import nn
        >>> class Silent(AttentionEdit):
        ...     def context(self, call, y):
        ...         return torch.zeros_like(y)
        >>> _ = torch.backends.mha.set_fastpath_enabled(False)
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> with edited(model, Silent()) as run:
        ...     _ = model(torch.ones(1, 3, 8))
        >>> sum(run.effect.values())
        2
        >>> _ = torch.backends.mha.set_fastpath_enabled(True)
    """
    where = placed(model, edits, {} if spans is None else spans)
    with entered(Run(model, where.parts, dict(spans or {})), where) as run:
        yield run
        run.require_effect()


@contextmanager
def entered(run: Entered, where: Placed) -> Iterator[Entered]:
    """Let a run's edits act where they were found to reach."""
    handles: list[RemovableHandle] = []
    try:
        with uninterrupted():
            _enter(run, where, handles)
        yield run
    finally:
        try:
            _leave(run, where, handles)
        except BaseException:
            # interrupted: what was left already is left once more
            _leave(run, where, handles)
            raise


def _enter(run: Run, where: Placed, handles: list[RemovableHandle]) -> None:
    parts, acting, hooked, ways = where
    _REMEMBERING.update({id(original(edit)): run for edit in parts if remembers(edit)})
    for edit in parts:
        edit.begins()
        edit.joins(run)
    handles += _of_forward(run)
    for place, of_block in hooked.items():
        handles += _hooks(run, place, of_block)
    by_registry = [place.module for place in acting if ways[place] == "registry"]
    if by_registry:
        transformers.enter(run, by_registry)
    for place, of_place in acting.items():
        seats.sit(place.module, seats.Seated(run, place, of_place))
        if place.module not in by_registry:
            sdpa.enter(place.module)


def _leave(run: Run, where: Placed, handles: Sequence[RemovableHandle]) -> None:
    with seats.LOCK:
        for handle in handles:
            handle.remove()
        for place in where.acting:
            if seats.rise(place.module, run):
                sdpa.leave(place.module)
        transformers.leave(run)
    for edit in where.parts:
        edit.ends()
        if _REMEMBERING.get(id(original(edit))) is run:
            del _REMEMBERING[id(original(edit))]


@contextmanager
def recorded(
    model: nn.Module,
    *wanted: str,
    rows: str | Callable[[AttentionCall], Tensor] = "last",
    at: Where | None = None,
    detach: bool = True,
    spans: Mapping[str, Bool[Tensor, "batch tokens"]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Look into a running model; its output stays the same to the bit (except with a graph of rows).

    Args:
        model: as in `edited`.
        wanted: "rows" (attention weights of some queries), "heads" (outputs of heads before the output projection), "inputs"
            (the `AttentionCall`: queries, keys, values, masks), "states" (hidden states).
        rows: which queries: "last", "all", the name of a span, or from a call to a mask `[batch, queries]`.
        at: the places.
        detach: keep no graph.
        spans: as in `edited`.

    Returns:
        For each name what was recorded: `found["rows"][place][step]`, `found["rows"].stack(step)`. States are those that blocks
        wrote (state i + 1 of block i); `found["state 0"]` holds what the first block of each stack read.

    Raises:
        InputError: as `edited`; for a name that is none of these.
    """
    for name in wanted:
        if name not in RECORDERS:
            raise InputError(f"wanted: {name!r} cannot be recorded; there are {', '.join(RECORDERS)}")
    if not wanted:
        raise InputError(f"wanted: say what to record: {', '.join(RECORDERS)}")
    edits: list[Any] = []
    found: dict[str, Any] = {}
    for name in wanted:
        recorder: Any = RowRecorder(rows, at, detach) if name == "rows" else RECORDERS[name](at=at, detach=detach)
        edits.append(recorder)
        found[name] = recorder.written if isinstance(recorder, StateRecorder) else recorder.found
        if isinstance(recorder, StateRecorder):
            found["state 0"] = recorder.read
    with edited(model, *edits, spans=spans):
        yield found


class Placed(NamedTuple):
    """Edits as they act, those of each place and of each block, and how attention is computed where there is some."""

    parts: list[Edit]
    acting: dict[Place, list[AttentionEdit]]
    hooked: dict[Place, list[BlockEdit]]
    ways: dict[Place, str]


def require_module(model: object) -> None:
    """Raise where it's no module, or one that is compiled, itself or in parts."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            what = path or "model"
            raise InputError(
                f"{what}: is compiled, and what runs inside cannot be reached; use the module that you compiled"
            )
    # of module.compile(), which compiles in place
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise InputError(
            "model: was compiled in place, and what runs inside cannot be reached; compile it after leaving, or not at all"
        )


def placed(model: nn.Module, edits: Sequence[Edit], spans: Mapping[str, Tensor]) -> Placed:
    """Where these edits act; raise where one cannot."""
    require_module(model)
    if not edits:
        raise InputError("edits: give at least one")
    check_spans(spans)
    acting: dict[Place, list[AttentionEdit]] = {}
    hooked: dict[Place, list[BlockEdit]] = {}
    ways = places.ways(model)
    attention = places.in_blocks(ways)
    blocks = places.blocks(model, attention)
    for edit in edits:
        if not isinstance(edit, (AttentionEdit, BlockEdit)):
            raise InputError(f"edits: expected AttentionEdit or BlockEdit, got {type(edit).__name__}")
    parts = [part for edit in edits for part in edit.parts(model)]
    _check_once(parts)
    for edit in parts:
        require_where(edit.at)
        require_spans(edit, spans)
        everywhere = attention if isinstance(edit, AttentionEdit) else blocks
        chosen = [place for place in everywhere if place in edit.at]
        if not everywhere:
            raise InputError(
                f"edits: {name_of(edit)} acts in attention or in a list of blocks that hold some, and {type(model).__name__} "
                f"has none"
            )
        if not chosen:
            there = sorted({f"{kind} in {stack!r}" for _, kind, stack, *_ in everywhere})
            raise InputError(
                f"edits: {name_of(edit)} has no place {edit.at} in {type(model).__name__}; there are: {', '.join(there)}"
            )
        for place in chosen:
            if isinstance(edit, AttentionEdit):
                acting.setdefault(place, []).append(edit)
            elif isinstance(edit, BlockEdit):
                hooked.setdefault(place, []).append(edit)
        _check_blocks(edit, chosen)
    _check_reach(acting, ways)
    return Placed(parts, acting, hooked, ways)


def _check_once(parts: Sequence[Edit]) -> None:
    """What remembers stands in one place at a time: two runs would write into one memory."""
    seen = set(_REMEMBERING)
    for edit in parts:
        if remembers(edit):
            if id(original(edit)) in seen:
                raise InputError(
                    f"edits: this {name_of(edit)} is given twice, or entered already, and would mix what it finds; make another"
                )
            seen.add(id(original(edit)))


def _check_blocks(edit: Edit, chosen: Sequence[Place]) -> None:
    """A range takes those that there are; of numbers given one by one, all must be there."""
    if edit.at.blocks is None or isinstance(edit.at.blocks, range):
        return
    there = {place.block for place in chosen}
    missing = sorted(set(edit.at.blocks) - there)
    if missing:
        raise InputError(
            f"edits: {name_of(edit)} names blocks {missing}, which are not there; it reaches {sorted(there)}, counted from 0"
        )


def _check_reach(acting: Mapping[Place, object], ways: Mapping[Place, str]) -> None:
    for place in acting:
        why = why_not(place, ways[place])
        if why:
            raise InputError(f"model: attention at {place.path} cannot be reached: {why}")


def check_spans(spans: Mapping[str, Tensor]) -> None:
    if not isinstance(spans, Mapping):
        raise InputError(f"spans: expected a mapping of names to bool tensors, got {type(spans).__name__}")
    for name, span in spans.items():
        if not isinstance(span, Tensor) or span.dtype != torch.bool or span.dim() != 2:
            got = f"{span.dtype} of shape {tuple(span.shape)}" if isinstance(span, Tensor) else type(span).__name__
            raise InputError(
                f"spans: {name!r} is {got}; expected a bool tensor [batch, tokens], True where a token is in it"
            )
        if not span.any():
            raise InputError(
                f"spans: {name!r} has no token; was the text cut, or the offset counted before templating?"
            )
    if len({len(span) for span in spans.values()}) > 1:
        sizes = ", ".join(f"{name!r} {len(span)}" for name, span in spans.items())
        raise InputError(f"spans: are of one batch, and have: {sizes} items")


def _of_forward(run: Run) -> list[RemovableHandle]:
    # a copy of the model, made meanwhile, has these hooks too, and is another model
    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is run.model:
            run.begins_forward((*args, *kwargs.values()))

    def ends(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if module is run.model:
            run.ends_forward((*args, *kwargs.values()))

    return [
        run.model.register_forward_pre_hook(begins, with_kwargs=True),
        run.model.register_forward_hook(ends, with_kwargs=True),
    ]


def _hooks(run: Run, place: Place, edits: Sequence[BlockEdit]) -> list[RemovableHandle]:
    names = list(inspect.signature(place.module.forward).parameters)
    rewriting = any(overrides(edit, "given") for edit in edits)

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if threading.get_ident() != run.thread or module is not place.module:
            return None
        name = next((name for name in ("hidden_states", *names[:1]) if isinstance(kwargs.get(name), Tensor)), None)
        if name is None and (not args or not isinstance(args[0], Tensor)):
            raise InputError(
                f"model: block {place.path} is not called with hidden states first, nor by the name hidden_states"
            )
        before = h = args[0] if name is None else kwargs[name]
        beside = {**dict(zip(names, args, strict=False)), **kwargs} if rewriting else {}
        beside.pop(name or next(iter(beside), ""), None)
        given: Mapping[str, Any] = beside
        for edit in edits:
            h = whole(edit, "enters", edit.enters(place, h))
            if rewriting:
                given = edit.given(place, h, given)
            if not edit.counts_itself:
                run.counts(edit, place, 1)
        if given is not beside:
            return (h,), dict(given)
        if h is before:
            return None
        return ((h, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: h})

    def leaves(module: nn.Module, _: Any, output: Any) -> Any:
        if threading.get_ident() != run.thread or module is not place.module:
            return None
        before = h = output if isinstance(output, Tensor) else output[0]
        for edit in edits:
            h = whole(edit, "leaves", edit.leaves(place, h))
        if h is before:
            return None
        return h if isinstance(output, Tensor) else (h, *output[1:])

    return [
        place.module.register_forward_pre_hook(enters, with_kwargs=True),
        place.module.register_forward_hook(leaves),
    ]
