"""What a method changes in a running model, and how several changes are made in one attention computation."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.core import InputError
from cenote.core.requirements import require_several
from cenote.models.live.calls import AttentionCall, Kind, Place


@dataclass(frozen=True)
class Where:
    """Which places: all, or those in blocks of these numbers, of these kinds, in the stack of this path.

    Of a range those are taken that there are; numbers given one by one must all be there.

    Example:
        >>> place = Place(3, "self", "encoder.layers", "encoder.layers.3.attention", torch.nn.Identity())
        >>> place in Where(blocks=range(2, 4)), place in Where(kinds=["cross"])
        (True, False)
    """

    blocks: Collection[int] | None = None
    kinds: Collection[Kind] | None = None
    stack: str | None = None

    def __post_init__(self) -> None:
        numbers = self.blocks if isinstance(self.blocks, Collection) else ["none"]
        if self.blocks is not None and not all(isinstance(number, Integral) for number in numbers):
            raise InputError(f"blocks: expected numbers, such as [1] or range(4, 8), got {self.blocks!r}")
        if self.kinds is not None:
            require_several(kinds=self.kinds)

    def __contains__(self, place: Place) -> bool:
        return (
            (self.blocks is None or place.block in self.blocks)
            and (self.kinds is None or place.kind in self.kinds)
            and (self.stack is None or place.stack == self.stack)
        )


def require_where(at: Where | None) -> Where:
    """These places, all by default; raise where it says none."""
    if at is not None and not isinstance(at, Where):
        raise InputError(f"at: expected places, such as Where(blocks=[1]), got {at!r}")
    return at or Where()


class Edit:
    """What all edits have: `at`, the places; `asks`, names of the spans that it needs; `stands_for`, the edit whose methods
    this one passes on to."""

    at: Where = Where()
    asks: Sequence[str] = ()
    stands_for: Edit | None = None
    counts_itself: bool = False
    """Whether it tells the run what it edited; what else is called counts once a call."""

    def parts(self, model: nn.Module) -> Sequence[Edit]:
        """The edits that it is made of in this model; raises where it cannot act there. Called first."""
        return (self,)

    def begins(self) -> None:
        """Forget what an earlier run left: called when a model is entered. An edit that overrides it stands in one context at a
        time."""

    def joins(self, run: Any) -> None:
        """The `Run` that it is part of: called when a model is entered, behind `begins`."""

    def ends(self) -> None:
        """The model is left, also after an exception."""


class AttentionEdit(Edit):
    """A change in attention. Override one or more; what is overridden decides the cost.

    With `inputs` and `context` the attention function that the user loaded still runs. With `attends` another computation
    takes its place. With `scores` or `weights` the computation is written out, for all queries. What is not overridden is never
    called.
    """

    innermost: bool = False
    """Whether its `attends` stands in the place of the user's function, so that those of all others stand around it."""

    def inputs(self, call: AttentionCall) -> AttentionCall:
        """Other queries, keys, values, scale or `allowed`: `call.replace(...)`."""
        return call

    def attends(
        self, call: AttentionCall, fused: Callable[[AttentionCall], Tensor]
    ) -> Float[Tensor, "batch heads queries width"]:
        """Outputs of the heads, computed otherwise; `fused(call)` gives what the user's function makes. Not asked where an edit
        has explicit scores or weights."""
        return fused(call)

    def scores(
        self, call: AttentionCall, scores: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Other scores before the softmax."""
        return scores

    def weights(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Other weights after it."""
        return weights

    def context(
        self, call: AttentionCall, y: Float[Tensor, "batch heads queries width"]
    ) -> Float[Tensor, "batch heads queries width"]:
        """Other outputs of the heads, before the output projection."""
        return y


class RowEdit(AttentionEdit, ABC):
    """A change of the weights of a few queries: these are computed beside the user's attention function, and what that gave is
    overwritten where weights differ, for the heads where they do. `forced` overwrites all chosen rows: gradients then flow
    through their weights."""

    forced: bool = False

    @abstractmethod
    def queries(self, call: AttentionCall) -> Bool[Tensor, "batch queries"]:
        """Which queries."""

    def rows(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Other weights; `call` is of the chosen queries alone. A new tensor: changing this one in place is an error."""
        return weights


class BlockEdit(Edit):
    """A change of hidden states."""

    def given(self, place: Place, h: Float[Tensor, "*batch tokens dim"], given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Other arguments, by name, than those that the block is called with beside the states that it reads."""
        return given

    def enters(self, place: Place, h: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Other states for the block to read."""
        return h

    def leaves(self, place: Place, h: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Other states than those that it wrote."""
        return h


class Act(NamedTuple):
    """An edit at a place: `seen` shows it the call with its own spans and step, `done` counts what it edited."""

    edit: AttentionEdit
    seen: Callable[[AttentionCall], AttentionCall]
    done: Callable[[int], None]


class Attended(NamedTuple):
    """Outputs of the heads, and the weights for the model to return, where the user's function did not run."""

    y: Float[Tensor, "batch heads queries width"]
    weights: Float[Tensor, "batch heads queries keys"] | None


def original(edit: Edit) -> Edit:
    """The edit that a person made, of one that passes on to it."""
    while edit.stands_for is not None:
        edit = edit.stands_for
    return edit


def name_of(edit: Edit) -> str:
    """Of the class that a person wrote."""
    return type(original(edit)).__name__


def remembers(edit: Edit) -> bool:
    """Whether it forgets something when a model is entered: what one run leaves in it would mix with that of another."""
    return type(original(edit)).begins is not Edit.begins


def require_spans(edit: Edit, spans: Mapping[str, Tensor]) -> None:
    """Raise where an edit asks for a span that is not there."""
    require_several(asks=edit.asks)
    for name in edit.asks:
        if name not in spans:
            raise InputError(f"spans: {name_of(edit)} needs {name!r}, and there are: {', '.join(spans) or 'none'}")


def overrides(edit: Edit, name: str) -> bool:
    """Whether the edit's class has its own method of that name."""
    edit = original(edit)
    base = next(cls for cls in (AttentionEdit, BlockEdit) if isinstance(edit, cls))
    return getattr(type(edit), name) is not getattr(base, name)


def apply(
    call: AttentionCall, acts: Sequence[Act], fused: Callable[[AttentionCall], Tensor], dropout: float = 0.0
) -> Attended:
    """The computation with these edits, in their order; `fused` gives what the user's function makes, `[batch, heads, ...]`."""
    for act in acts:
        if overrides(act.edit, "inputs"):
            new = act.edit.inputs(act.seen(call))
            if not isinstance(new, AttentionCall):
                raise InputError(
                    f"edits: {name_of(act.edit)}.inputs gave {type(new).__name__}, expected an AttentionCall"
                )
            call = new
        if not isinstance(act.edit, RowEdit) and not original(act.edit).counts_itself:
            act.done(1)
    weights = None
    if any(overrides(act.edit, name) for act in acts for name in ("scores", "weights")):
        weights = _written_out(call, acts)
        y = call.mixed(F.dropout(weights, dropout))
    else:
        inside_out = sorted(acts, key=lambda act: not act.edit.innermost)
        y, weights = _with_rows(call, acts, functools.reduce(_around, inside_out, fused))
    for act in acts:
        if overrides(act.edit, "context"):
            y = whole(act.edit, "context", act.edit.context(act.seen(call), y), y)
    return Attended(y, weights)


def _around(fused: Callable[[AttentionCall], Tensor], act: Act) -> Callable[[AttentionCall], Tensor]:
    """What computes attention, with the way of this edit around it where it has one."""
    if not overrides(act.edit, "attends"):
        return fused
    return lambda call: whole(act.edit, "attends", act.edit.attends(act.seen(call), fused))


def _written_out(call: AttentionCall, acts: Sequence[Act]) -> Float[Tensor, "batch heads queries keys"]:
    scores = call.scores()
    for act in acts:
        if overrides(act.edit, "scores"):
            scores = whole(act.edit, "scores", act.edit.scores(act.seen(call), scores), scores)
    weights = call.softmax(scores)
    for act in acts:
        if isinstance(act.edit, RowEdit):
            chosen = _chosen(act.edit, act.seen(call))
            weights = _rows_edited(call, act, chosen, weights)
        if overrides(act.edit, "weights"):
            weights = whole(act.edit, "weights", act.edit.weights(act.seen(call), weights), weights)
    return weights


def _with_rows(call: AttentionCall, acts: Sequence[Act], fused: Callable[[AttentionCall], Tensor]) -> Attended:
    """What the user's function gives, with edited rows in it; it need not run where these are all rows of all heads."""
    chosen = [(act, _chosen(act.edit, act.seen(call))) for act in acts if isinstance(act.edit, RowEdit)]
    if not chosen:
        return Attended(fused(call), None)
    rows = call.only(functools.reduce(torch.logical_or, [queries for _, queries in chosen]))
    if not rows.queries:
        return Attended(fused(call), None)
    before = weights = rows.weights()
    forced: Tensor | None = None
    for act, queries in chosen:
        # of a single edit, all rows are its own
        among = None if len(chosen) == 1 else _among(queries, rows)
        weights = _rows_edited(rows, act, among, weights)
        if act.edit.forced:  # type: ignore[attr-defined]
            among = _among(queries, rows)
            forced = among if forced is None else forced | among
    if weights is before and forced is None:
        return Attended(fused(call), None)
    differs = (weights != before).any(-1)
    if forced is not None:
        differs = differs | forced[:, None]
    if rows.rows is None and differs.all():
        return Attended(call.mixed(weights), before)
    return Attended(_overwritten(fused(call), rows, weights, differs), None)


def _among(queries: Bool[Tensor, "batch queries"], rows: AttentionCall) -> Bool[Tensor, "batch rows"]:
    """Which of the rows that are computed are among the queries."""
    return queries if rows.rows is None or rows.real is None else queries.gather(1, rows.rows) & rows.real


def _overwritten(
    y: Float[Tensor, "batch heads queries width"],
    rows: AttentionCall,
    weights: Float[Tensor, "batch heads rows keys"],
    differs: Bool[Tensor, "batch heads rows"],
) -> Float[Tensor, "batch heads queries width"]:
    """Outputs of the heads, in these rows made of these weights where they differ from the user's."""
    if rows.rows is None or rows.real is None:
        return torch.where(differs[..., None], rows.mixed(weights).to(y.dtype), y)
    item, slot = rows.real.nonzero(as_tuple=True)
    at = (item, slice(None), slot)
    if not differs[at].any():
        return y
    query = rows.rows[item, slot]
    new = torch.where(differs[at][..., None], rows.mixed(weights)[at].to(y.dtype), y[item, :, query])
    return y.transpose(1, 2).index_put((item, query), new).transpose(1, 2)


def _rows_edited(
    call: AttentionCall, act: Act, queries: Bool[Tensor, "batch queries"] | None, weights: Tensor
) -> Float[Tensor, "batch heads queries keys"]:
    """The weights of a call's queries, those that are chosen edited; None for all."""
    if queries is None:
        number = call.batch * call.queries if call.real is None else int(call.real.sum())
    else:
        number = int(queries.sum())
    act.done(number)
    if not number:
        return weights
    if queries is None or number == queries.numel() or (call.real is not None and torch.equal(queries, call.real)):
        return _rows_of(act.edit, act.seen(call), weights)  # type: ignore[arg-type]
    # numbers inside of this call, which may itself be of some rows
    inside = call.replace(rows=None, real=None).only(queries)
    assert inside.rows is not None
    assert inside.real is not None
    picked = weights.gather(2, _wide(inside.rows, weights))
    edited = _rows_of(act.edit, act.seen(call.only(queries)), picked)  # type: ignore[arg-type]
    if edited is picked and not act.edit.forced:  # type: ignore[attr-defined]
        return weights
    item, slot = inside.real.nonzero(as_tuple=True)
    values = edited[item, :, slot]
    return weights.transpose(1, 2).index_put((item, inside.rows[item, slot]), values).transpose(1, 2)


def _chosen(edit: RowEdit, call: AttentionCall) -> Bool[Tensor, "batch queries"]:
    queries = edit.queries(call)
    if not isinstance(queries, Tensor) or queries.dtype != torch.bool or queries.shape != (call.batch, call.queries):
        raise InputError(
            f"edits: {name_of(edit)}.queries gave {_described(queries)}, expected a bool tensor [batch, queries] "
            f"{(call.batch, call.queries)}"
        )
    return queries


def _rows_of(edit: RowEdit, call: AttentionCall, weights: Tensor) -> Float[Tensor, "batch heads queries keys"]:
    # torch counts no changes in inference mode
    version = None if weights.is_inference() else weights._version
    new = whole(edit, "rows", edit.rows(call, weights), weights)
    if version is not None and weights._version != version:
        raise InputError(f"edits: {name_of(edit)}.rows changed the weights in place; return a new tensor")
    return new


def whole(edit: Edit, method: str, new: Tensor, like: Tensor | None = None) -> Tensor:
    """What an edit's method gave; raise where it is no tensor, or of another shape."""
    if not isinstance(new, Tensor) or (like is not None and new.shape != like.shape):
        expected = "a tensor" if like is None else f"a tensor {tuple(like.shape)}"
        raise InputError(f"edits: {name_of(edit)}.{method} gave {_described(new)}, expected {expected}")
    return new


def _described(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _wide(rows: Tensor, weights: Tensor) -> Tensor:
    return rows[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])


class Trace(dict[Place, list[Any]]):
    """What was recorded: at each place one tensor per computation, which is one per step of decoding."""

    def keep(self, place: Place, x: Tensor, detach: bool) -> None:
        """One tensor more of a place; with its graph, or as a copy without."""
        self.setdefault(place, []).append(x.detach().clone() if detach else x)

    def stack(self, step: int = 0) -> Tensor:
        """`[places, ...]` of one step, in the order of the model.

        Raises:
            InputError: where nothing was recorded, not so many steps, or tensors of several shapes.
        """
        fewest = min(map(len, self.values()), default=0)
        if not -fewest <= step < fewest:
            raise InputError(f"step: {step}, and {fewest} were recorded at {len(self)} places")
        shapes = {tuple(found[step].shape) for found in self.values()}
        if len(shapes) > 1:
            raise InputError(
                f"places: what was recorded is of shapes {', '.join(map(str, sorted(shapes)))}; record those of one stack "
                f"(at=Where(stack=...)), or read them one by one"
            )
        return torch.stack([found[step] for found in self.values()])


class Recorder(AttentionEdit):
    """Base of those that look and change nothing.

    Args:
        at: the places.
        detach: keep no graph.
    """

    def __init__(self, at: Where | None = None, detach: bool = True) -> None:
        self.at = require_where(at)
        self.detach = detach
        self.found = Trace()

    def begins(self) -> None:
        self.found.clear()

    def keep(self, place: Place, x: Tensor) -> None:
        self.found.keep(place, x, self.detach)


class InputsRecorder(Recorder):
    """The calls: queries after positions, keys, values, masks. Tensors of the model itself, not copied."""

    def inputs(self, call: AttentionCall) -> AttentionCall:
        kept = call.replace(q=call.q.detach(), k=call.k.detach(), v=call.v.detach()) if self.detach else call
        self.found.setdefault(call.place, []).append(kept)
        return call


class HeadRecorder(Recorder):
    """Outputs of the heads before the output projection, `[batch, heads, queries, width]`."""

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        self.keep(call.place, y)
        return y


class RowRecorder(RowEdit, Recorder):
    """Weights of some queries, `[batch, heads, rows, keys]`, zeros in rows that only fill up (not with a graph).

    The model runs as it would.

    Args:
        rows: "last", "all", the name of a span, or from a call to a mask `[batch, queries]`.
        at: the places.
        detach: keep no graph. With a graph the chosen rows' outputs are made of these weights, so that gradients reach
            them; the model's output is then equal to rounding, not to the bit.
    """

    def __init__(
        self,
        rows: str | Callable[[AttentionCall], Tensor] = "last",
        at: Where | None = None,
        detach: bool = True,
    ) -> None:
        super().__init__(at, detach)
        self.wanted = rows
        self.forced = not detach
        self.asks = (rows,) if isinstance(rows, str) and rows not in ("last", "all") else ()

    def queries(self, call: AttentionCall) -> Bool[Tensor, "batch queries"]:
        if callable(self.wanted):
            return self.wanted(call)
        if self.wanted == "last":
            return call.last()
        if self.wanted == "all":
            return torch.ones(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
        return call.queries_in(self.wanted)

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        if self.detach and call.real is not None and not call.real.all():
            self.keep(call.place, weights.masked_fill(~call.real[:, None, :, None], 0.0))
        else:
            self.keep(call.place, weights)
        return weights


class StateRecorder(BlockEdit):
    """Hidden states: what each block wrote, and before the first of a stack what it read."""

    def __init__(self, at: Where | None = None, detach: bool = True) -> None:
        self.at = require_where(at)
        self.detach = detach
        self.read, self.written = Trace(), Trace()

    def begins(self) -> None:
        self.read.clear()
        self.written.clear()

    def enters(self, place: Place, h: Tensor) -> Tensor:
        if place.block == 0:
            self.read.keep(place, h, self.detach)
        return h

    def leaves(self, place: Place, h: Tensor) -> Tensor:
        self.written.keep(place, h, self.detach)
        return h
