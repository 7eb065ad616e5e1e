"""Heads of running models: which attention there is, what heads are worth, and masking them.

Source: Michel, Levy and Neubig (2019), arXiv 1905.10650.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.sixteen_heads.gated import Granularity, denominator, head_importance, normalised
from cenote.mix.sixteen_heads.statistics import HeadStatistics, mean_statistics, statistics_of
from cenote.models.live import AttentionCall, AttentionEdit, Place, ScaledHeads, Where, attentions, edited

Loss = Callable[[nn.Module, Any], Tensor]
"""From the model and a batch to the sum, or mean, of the losses of its items."""


class Head(NamedTuple):
    """A query head of a running model: its place's path, and its number there from 0."""

    path: str
    number: int


@dataclass(frozen=True)
class HeadMap:
    """Which heads a model has.

    Attributes:
        places: where attention happens.
        heads, kv_heads: how many query and key heads each has.
    """

    places: tuple[Place, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def all(self) -> tuple[Head, ...]:
        """Every head, in the order of the model."""
        return tuple(
            Head(place.path, n) for place, count in zip(self.places, self.heads, strict=True) for n in range(count)
        )

    @property
    def types(self) -> dict[str, tuple[Place, ...]]:
        """Kinds of attention: `"self"`, or of an encoder-decoder `"encoder self"`, `"decoder self"`, `"encoder-decoder"`."""
        stacks = {place.stack for place in self.places}
        crossed = {place.stack for place in self.places if place.kind == "cross"}
        found: dict[str, list[Place]] = {}
        for place in self.places:
            if place.kind == "cross":
                name = "encoder-decoder"
            elif crossed and len(stacks) > 1:
                name = f"{'decoder' if place.stack in crossed else 'encoder'} {place.kind}"
            else:
                name = place.kind if len(stacks) == 1 else f"{place.stack} {place.kind}"
            found.setdefault(name, []).append(place)
        return {name: tuple(of) for name, of in found.items()}

    def of_type(self, kind: str) -> HeadMap:
        """Those of one kind of attention alone."""
        if kind not in self.types:
            raise InputError(f"kind: expected one of {', '.join(self.types)}, got {kind!r}")
        kept = [i for i, place in enumerate(self.places) if place in self.types[kind]]
        return HeadMap(*(tuple(part[i] for i in kept) for part in (self.places, self.heads, self.kv_heads)))  # type: ignore

    def by_place(self, heads: Iterable[Head]) -> dict[Place, list[int]]:
        """Numbers of heads, of each place that has any of them.

        Raises:
            InputError: for heads that are not there.
        """
        known = {place.path: (place, count) for place, count in zip(self.places, self.heads, strict=True)}
        found: dict[Place, list[int]] = {}
        for path, number in heads:
            if path not in known or not 0 <= number < known[path][1]:
                has = f"it has {known[path][1]}" if path in known else f"there are: {', '.join(known)}"
                raise InputError(f"heads: no head {number} of {path}; {has}")
            found.setdefault(known[path][0], []).append(number)
        return found


class _Counted(AttentionEdit):
    """How many heads each place has."""

    def __init__(self) -> None:
        self.found: dict[Place, tuple[int, int]] = {}

    def begins(self) -> None:
        self.found.clear()

    def inputs(self, call: AttentionCall) -> AttentionCall:
        self.found[call.place] = (call.heads, call.k.shape[1])
        return call


@torch.no_grad()
def heads_of(model: nn.Module, run: Callable[[], object]) -> HeadMap:
    """Which heads a model has, found by one run of it.

    Args:
        model: any whose attention can be reached.
        run: calls it on something, as `lambda: model(**inputs)`.
    """
    seen = _Counted()
    with edited(model, seen):
        run()
    places = [place for place in attentions(model) if place in seen.found]
    return HeadMap(tuple(places), tuple(seen.found[p][0] for p in places), tuple(seen.found[p][1] for p in places))


@contextmanager
def masked_heads(model: nn.Module, known: HeadMap, heads: Iterable[Head], rescale: bool = False) -> Iterator[None]:
    """Run a model with these heads at zero; behind the block it is what it was.

    Args:
        model: of `known`.
        known: its heads.
        heads: those that give zeros; the bias of the output projection stays.
        rescale: the others of their place times all over those that are left.
    """
    factors = zeros(known, heads, rescale)
    if not factors:
        yield
        return
    with edited(model, *scaling(factors)):
        yield


def zeros(known: HeadMap, heads: Iterable[Head], rescale: bool = False) -> dict[Place, Float[Tensor, "_heads"]]:
    """Factors of the heads of each place that has any of these: 0 for them, 1 for the others or what makes up for them."""
    counts = dict(zip(known.places, known.heads, strict=True))
    factors = {}
    for place, gone in known.by_place(heads).items():
        own = torch.ones(counts[place])
        own[gone] = 0.0
        factors[place] = own * (counts[place] / max(1, int(own.sum()))) if rescale else own
    return factors


def scaling(factors: Mapping[Place, Float[Tensor, "_heads"]]) -> list[ScaledHeads]:
    """Edits by which the heads of places are multiplied; gradients reach the factors."""
    groups: dict[tuple[str, str], dict[int, Tensor]] = {}
    for place, own in factors.items():
        groups.setdefault((place.stack, place.kind), {})[place.block] = own
    return [ScaledHeads(own, Where(stack=stack, kinds=[kind])) for (stack, kind), own in groups.items()]  # type: ignore


class _Contexts(AttentionEdit):
    """Outputs of heads, with something of zeros added whose gradient is theirs, and which tokens are real."""

    def __init__(self) -> None:
        self.outputs: dict[Place, Tensor] = {}
        self.added: dict[Place, Tensor] = {}
        self.real: dict[Place, Tensor | None] = {}

    def begins(self) -> None:
        self.outputs.clear()
        self.added.clear()
        self.real.clear()

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        if call.place in self.outputs:
            raise InputError(f"loss: ran {call.place.path} twice; expected one forward of the model for a batch")
        nothing = torch.zeros_like(y, requires_grad=True)
        self.outputs[call.place], self.added[call.place] = y.detach(), nothing
        self.real[call.place] = real_queries(call)
        return y + nothing


def real_queries(call: AttentionCall) -> Bool[Tensor, "batch queries"] | None:
    """Which queries of self-attention are no padding: those that may read themselves; None where nothing is told."""
    seen = call.readable() if call.place.kind == "self" and call.queries == call.keys else None
    if seen is None:
        return None
    return seen.expand(call.batch, -1, call.queries, -1).diagonal(dim1=2, dim2=3).any(1)


class Importance(NamedTuple):
    """What heads are worth, `[heads]` of each place, larger is more, in the order of a `HeadMap`."""

    known: HeadMap
    scores: tuple[Float[Tensor, "_heads"], ...]

    def of(self, head: Head) -> float:
        """Of one head."""
        place = next(i for i, p in enumerate(self.known.places) if p.path == head.path)
        return float(self.scores[place][head.number])

    def normalised(self) -> Importance:
        """Each place's divided by its length, so that places can be sorted together."""
        return Importance(self.known, tuple(normalised(s[None])[0] for s in self.scores))


def importance_of_heads(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    granularity: Granularity = "token",
    *,
    known: HeadMap | None = None,
    without: Iterable[Head] = (),
    last_by_examples: bool = False,
) -> Importance:
    """`E |Att_h . dL/dAtt_h|` of every head of a running model: one backward pass over the batches.

    Args:
        model: a model of transformers or any other that `cenote.models.live` reaches, in eval mode; encoders, decoders with
            grouped keys (a score for each query head), encoder-decoders (of all three kinds of attention).
        loss: from the model and a batch to its loss: the sum of its items' losses, so that examples do not weigh by the size
            of their batch.
        batches: what it is estimated on.
        granularity: see `Granularity`.
        known: the model's heads; needed with `without`.
        without: heads at zero meanwhile: importance is that beside the others that are left.
        last_by_examples: the last place's sums are divided by examples, as for encoders that only [CLS] is read of.

    Raises:
        InputError: where there is no batch, or a loss that does not come from the model.
    """
    sums: dict[Place, Tensor] = {}
    counts: dict[Place, float] = {}
    sizes: dict[Place, tuple[int, int]] = {}
    gone = tuple(without)
    if gone and known is None:
        raise InputError("known: needed with without; give the heads that the model has, of heads_of")
    for batch in batches:
        seen, sizer = _Contexts(), _Counted()
        # the model's own graph is needed, even where nobody trains it
        with torch.enable_grad(), edited(model, *(scaling(zeros(known, gone)) if known and gone else ()), sizer, seen):
            value = loss(model, batch)
        if not value.requires_grad or value.dim():
            raise InputError(
                f"loss: expected one number that depends on the model, got {list(value.shape)}"
                f"{'' if value.requires_grad else ' without gradient'}; sum it, without torch.no_grad and without detach"
            )
        sizes.update(sizer.found)
        places = list(seen.outputs)
        gradients = torch.autograd.grad(value, [seen.added[p] for p in places], allow_unused=True)
        for place, gradient in zip(places, gradients, strict=True):
            y = seen.outputs[place]
            mask = _mask_of(place, seen, y)
            g = torch.zeros_like(y) if gradient is None else gradient
            own = head_importance(y.double(), g.double(), mask, granularity)
            sums[place] = sums.get(place, torch.zeros_like(own)) + own
            last = last_by_examples and place == places[-1]
            counts[place] = counts.get(place, 0.0) + float(denominator(mask, granularity, last))
    if not sums:
        raise InputError("batches: give at least one")
    places = [place for place in attentions(model) if place in sums]
    found = HeadMap(tuple(places), tuple(sizes[p][0] for p in places), tuple(sizes[p][1] for p in places))
    return Importance(found, tuple((sums[p] / max(counts[p], 1.0)).float() for p in places))


def _mask_of(place: Place, seen: _Contexts, y: Tensor) -> Bool[Tensor, "batch tokens"]:
    """Of cross-attention the queries are those of the self-attention before it in its block."""
    mask = seen.real[place]
    if mask is None:
        mask = next(
            (m for p, m in seen.real.items() if (p.stack, p.block) == (place.stack, place.block) and m is not None),
            None,
        )
    whole = torch.ones(y.shape[0], y.shape[2], dtype=torch.bool, device=y.device)
    return whole if mask is None or mask.shape != whole.shape else mask


class _Watching(AttentionEdit):
    """Statistics of heads, of weights that are computed beside the model's own attention."""

    def __init__(self) -> None:
        self.found: dict[Place, list[tuple[HeadStatistics, int]]] = {}

    def begins(self) -> None:
        self.found.clear()

    def inputs(self, call: AttentionCall) -> AttentionCall:
        self.now = call
        return call

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        weights = self.now.weights()
        mask = real_queries(self.now)
        count = int(mask.sum()) if mask is not None else weights.shape[0] * weights.shape[2]
        self.found.setdefault(call.place, []).append((statistics_of(weights, y, mask), count))
        return y


@torch.no_grad()
def head_statistics(
    model: nn.Module, run: Callable[[Any], object], batches: Iterable[Any]
) -> dict[str, HeadStatistics]:
    """Entropy, divergence, disagreement and offset of heads, of each place by its path; see `HeadStatistics`.

    Args:
        model: in eval mode.
        run: calls it on a batch, as `lambda batch: model(**batch)`.
        batches: what they are taken of.
    """
    seen = _Watching()
    found: dict[str, list[tuple[HeadStatistics, int]]] = {}
    for batch in batches:
        with edited(model, seen):
            run(batch)
        for place, own in seen.found.items():
            found.setdefault(place.path, []).extend(own)
    if not found:
        raise InputError("batches: give at least one")
    return {path: mean_statistics(own) for path, own in found.items()}
