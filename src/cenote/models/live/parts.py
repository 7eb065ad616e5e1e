"""Edits that act on one of several equal parts of the batch: the rows of a branch, or those that a prompt conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_several
from cenote.models.live.calls import Allowed, AttentionCall, Place
from cenote.models.live.edits import AttentionEdit, BlockEdit, Edit, RowEdit, Where, overrides, require_spans


def of_part(
    edit: Edit,
    number: int,
    parts: int,
    spans: Mapping[str, Bool[Tensor, "batch tokens"]] | None = None,
    stacks: Collection[str] | None = None,
) -> Edit:
    """The same edit for one part of the batch: it sees, changes and counts these items alone.

    Args:
        edit: any; its state is its own, so that an edit of two parts is better made twice.
        number: of the part, from 0.
        parts: how many, equal and one behind the other.
        spans: of the part's items; those of the context where None.
        stacks: paths of lists of blocks; places elsewhere are left alone.

    Example:
        >>> from cenote.models.live.heads import AddedStates
        >>> second = of_part(AddedStates({0: torch.ones(2)}), 1, 2)
        >>> second.leaves(Place(0, "block", "", "", torch.nn.Identity()), torch.zeros(2, 1, 2)).tolist()
        [[[0.0, 0.0]], [[1.0, 1.0]]]
    """
    if not 0 <= number < parts:
        raise InputError(f"number: {number} of {parts} parts; they count from 0")
    if not isinstance(edit, (AttentionEdit, BlockEdit)):
        raise InputError(f"edits: expected AttentionEdit or BlockEdit, got {type(edit).__name__}")
    if type(edit).parts is not Edit.parts or (isinstance(edit, AttentionEdit) and overrides(edit, "attends")):
        raise InputError(
            f"edits: {type(edit).__name__} acts on a batch as a whole, and not on one part of it; give it around all of them"
        )
    if spans is not None:
        require_spans(edit, spans)
    if stacks is not None:
        require_several(stacks=stacks)
    if isinstance(edit, RowEdit):
        return _RowsOfPart(edit, number, parts, spans, stacks)
    if isinstance(edit, AttentionEdit):
        return _AttentionOfPart(edit, number, parts, spans, stacks)
    return _BlockOfPart(edit, number, parts, spans, stacks)


@dataclass(frozen=True)
class _InStacks(Where):
    """These places, in some stacks alone."""

    within: Where = field(default_factory=Where)
    stacks: Collection[str] = ()

    def __contains__(self, place: Place) -> bool:
        return place in self.within and place.stack in self.stacks


class _Part(Edit):
    def __init__(
        self,
        edit: Edit,
        number: int,
        parts: int,
        spans: Mapping[str, Tensor] | None,
        stacks: Collection[str] | None,
    ) -> None:
        self.inner, self.number, self.count, self.spans = edit, number, parts, spans
        self.stands_for = edit
        self.at = edit.at if stacks is None else _InStacks(edit.at.blocks, within=edit.at, stacks=stacks)
        self.asks = edit.asks if spans is None else ()

    def begins(self) -> None:
        self.inner.begins()

    def items(self, batch: int, place: Place) -> slice:
        if batch % self.count:
            raise InputError(
                f"edits: {type(self.inner).__name__} acts on part {self.number} of {self.count}, and {place.path} computes "
                f"{batch} items; give it other places (at=Where(stack=...))"
            )
        size = batch // self.count
        return slice(self.number * size, (self.number + 1) * size)

    def changed(self, x: Tensor, place: Place, change: Callable[[Tensor], Tensor]) -> Tensor:
        """x, of all items, with what a change makes of these."""
        items = self.items(len(x), place)
        before = x[items]
        return _put(x, items, before, change(before), place)

    def seen(self, call: AttentionCall) -> AttentionCall:
        """The call of these items."""
        items = self.items(call.batch, call.place)
        return call.replace(
            q=call.q[items],
            k=call.k[items],
            v=call.v[items],
            allowed=None if call.allowed is None else _of_items(call.allowed, call.batch, items),
            bias=call.bias if call.bias is None or call.bias.shape[0] == 1 else call.bias[items],
            rows=None if call.rows is None else call.rows[items],
            real=None if call.real is None else call.real[items],
            spans=self._spans(call, items),
        )

    def _spans(self, call: AttentionCall, items: slice) -> Mapping[str, Tensor]:
        if self.spans is not None:
            return self.spans
        # of all items, repeated or not
        return {
            name: span.repeat_interleave(call.batch // len(span), 0)[items] if call.batch % len(span) == 0 else span
            for name, span in call.spans.items()
        }


class _AttentionOfPart(_Part, AttentionEdit):
    inner: AttentionEdit

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before = self.seen(call)
        after = self.inner.inputs(before)
        if after is before:
            return call
        items = self.items(call.batch, call.place)
        if after.softcap != before.softcap or after.sinks is not before.sinks:
            raise InputError(
                f"edits: {type(self.inner).__name__} changes the soft cap or the sinks of {call.place.path}, which all items "
                f"share"
            )
        q = after.q if after.scale == call.scale else after.q * (after.scale / call.scale)
        changed = call.replace(
            q=_put(call.q, items, before.q, q, call.place),
            k=_put(call.k, items, before.k, after.k, call.place),
            v=_put(call.v, items, before.v, after.v, call.place),
        )
        if after.allowed is not before.allowed:
            changed = changed.replace(allowed=_merged(call, items, after.allowed))
        if after.bias is not before.bias:
            changed = changed.replace(bias=_bias(call, items, after.bias))
        return changed

    def scores(self, call: AttentionCall, scores: Tensor) -> Tensor:
        return self.changed(scores, call.place, lambda part: self.inner.scores(self.seen(call), part))

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return self.changed(weights, call.place, lambda part: self.inner.weights(self.seen(call), part))

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        return self.changed(y, call.place, lambda part: self.inner.context(self.seen(call), part))


class _RowsOfPart(_AttentionOfPart, RowEdit):
    inner: RowEdit

    @property
    def forced(self) -> bool:  # type: ignore[override]
        return self.inner.forced

    def queries(self, call: AttentionCall) -> Bool[Tensor, "batch queries"]:
        items = self.items(call.batch, call.place)
        chosen = torch.zeros(call.batch, call.queries, dtype=torch.bool, device=call.q.device)
        chosen[items] = self.inner.queries(self.seen(call))
        return chosen

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return self.changed(weights, call.place, lambda part: self.inner.rows(self.seen(call), part))


class _BlockOfPart(_Part, BlockEdit):
    inner: BlockEdit

    def enters(self, place: Place, h: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.changed(h, place, lambda part: self.inner.enters(place, part))

    def leaves(self, place: Place, h: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.changed(h, place, lambda part: self.inner.leaves(place, part))


def _put(x: Tensor, items: slice, before: Tensor, after: Tensor, place: Place) -> Tensor:
    """x with these items replaced; itself where they stayed as they were."""
    if after is before:
        return x
    if after.shape != before.shape:
        raise InputError(
            f"edits: at {place.path} one part of the batch became {tuple(after.shape)} from {tuple(before.shape)}; the parts "
            f"are computed together and keep one shape"
        )
    return torch.cat([x[: items.start], after.to(x.dtype), x[items.stop :]])


def _of_items(allowed: Allowed, batch: int, items: slice) -> Allowed:
    def of_items(rows: Int[Tensor, "items rows"]) -> Bool[Tensor, "_items _heads _rows keys"]:
        everywhere = rows[:1].repeat(batch, 1)
        everywhere[items] = rows
        found = allowed(everywhere)
        return found if found.shape[0] == 1 else found[items]

    return of_items


def _merged(call: AttentionCall, items: slice, changed: Allowed | None) -> Allowed:
    """What these items may read is changed, what the others may read is not."""
    before, keys, batch = call.allowed, call.keys, call.batch

    def merged(rows: Int[Tensor, "batch rows"]) -> Bool[Tensor, "batch _heads _rows keys"]:
        every = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=rows.device)
        others = every if before is None else before(rows)
        these = every if changed is None else changed(rows[items])
        shape = torch.broadcast_shapes(others.shape[1:], these.shape[1:])
        full = others.expand(batch, *shape).clone()
        full[items] = these.expand(items.stop - items.start, *shape)
        return full

    return merged


def _bias(call: AttentionCall, items: slice, changed: Tensor | None) -> Tensor:
    none = call.q.new_zeros(1, 1, 1, 1)
    others = none if call.bias is None else call.bias
    these = none if changed is None else changed
    shape = torch.broadcast_shapes(others.shape[1:], these.shape[1:])
    full = others.expand(call.batch, *shape).clone()
    full[items] = these.to(full.dtype).expand(items.stop - items.start, *shape)
    return full
