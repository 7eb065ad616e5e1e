"""Which modules of entered models are edited, by whom. The two seats bring each attention computation here.

Nothing is kept on models. A context is heard in the thread that entered it, so that two threads may share a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cenote.models.live.calls import AttentionCall, Place
from cenote.models.live.edits import Act, Attended, AttentionEdit, apply

LOCK = threading.RLock()
"""Reentrant: a context that is dropped may be left by the garbage collector in the midst of entering another."""


@runtime_checkable
class Run(Protocol):
    """What a context knows of the tokens so far."""

    thread: int

    def arrives(self, place: Place, call: AttentionCall) -> Mapping[str, object]:
        """What a call lacks when it comes from a seat: spans, step, starts."""

    def counts(self, edit: AttentionEdit, place: Place, number: int) -> None:
        """This edit acted, on that many."""


class Seated(NamedTuple):
    """A place of a context, and the edits that act there."""

    run: Run
    place: Place
    edits: Sequence[AttentionEdit]


SEATED: dict[nn.Module, list[Seated]] = {}


def sit(module: nn.Module, seated: Seated) -> None:
    with LOCK:
        # new lists: another thread may be reading
        SEATED[module] = [*SEATED.get(module, []), seated]


def rise(module: nn.Module, run: Run) -> bool:
    """Take a context's edits off a module; True where nobody sits there any more."""
    with LOCK:
        left = [seated for seated in SEATED.get(module, []) if seated.run is not run]
        if left:
            SEATED[module] = left
        else:
            SEATED.pop(module, None)
        return not left


def at(module: nn.Module) -> list[Seated]:
    """Who sits there, of this thread."""
    found = SEATED.get(module)
    if not found:
        return []
    here = threading.get_ident()
    return [seated for seated in found if seated.run.thread == here]


def attend(
    seated: Sequence[Seated],
    call: AttentionCall,
    fused: Callable[[AttentionCall], Tensor],
    dropout: float = 0.0,
) -> Attended:
    """One attention computation with the edits of all contexts, in the order of entering."""
    acts: list[Act] = []
    for run, place, edits in seated:
        known = {"place": place, **run.arrives(place, call)}

        def seen(c: AttentionCall, known: Mapping[str, object] = known) -> AttentionCall:
            return c if all(getattr(c, name) is value for name, value in known.items()) else c.replace(**known)

        for edit in edits:

            def done(number: int, run: Run = run, edit: AttentionEdit = edit, place: Place = place) -> None:
                run.counts(edit, place, number)

            acts.append(Act(edit, seen, done))
    return apply(acts[0].seen(call), acts, fused, dropout)


def with_mask(call: AttentionCall, like: torch.dtype) -> Tensor:
    """A call's mask as a whole, added to scores: what a fused function is given where an edit changed `allowed`."""
    readable = call.readable()
    bias = call.bias if call.bias is not None else call.q.new_zeros(1, 1, 1, 1, dtype=like)
    if readable is None:
        return bias
    lowest = torch.finfo(like).min
    full = bias.expand(torch.broadcast_shapes(bias.shape, readable.shape))
    return full.masked_fill(~readable, lowest)
