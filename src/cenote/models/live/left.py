"""Which tokens are left at a place of a running model, so that spans follow them.

What takes tokens out of a stack stands here while it is entered; every context asks here, its own or another's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from cenote.models.live.calls import Place

_LOCK = threading.RLock()
_STANDING: dict[nn.Module, list[Left]] = {}


@runtime_checkable
class Left(Protocol):
    """What takes tokens out of a stack."""

    thread: int

    def spans_at(self, place: Place, spans: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Spans of the prompt `[batch, tokens]`, of the tokens that a place reads `[batch, left]`."""


def stand(modules: Iterable[nn.Module], who: Left) -> None:
    """Spans at these places of attention follow it."""
    with _LOCK:
        for module in modules:
            # new lists: another thread may be reading
            _STANDING[module] = [*_STANDING.get(module, []), who]


def go(who: Left) -> None:
    """It takes no tokens out any more."""
    with _LOCK:
        for module, standing in list(_STANDING.items()):
            left = [other for other in standing if other is not who]
            if left:
                _STANDING[module] = left
            else:
                del _STANDING[module]


def standing(module: nn.Module) -> list[Left]:
    """Who takes tokens out there, of this thread."""
    found = _STANDING.get(module)
    if not found:
        return []
    here = threading.get_ident()
    return [who for who in found if who.thread == here]


def spans_at(place: Place, spans: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Spans of the prompt, of the tokens that this place reads."""
    if spans:
        for who in standing(place.module):
            spans = who.spans_at(place, spans)
    return spans
