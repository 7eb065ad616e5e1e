"""Reducers over documents: one pass for all that a method is tried with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cenote.catalog import create, method, methods
from cenote.core import Bags, InputError

ROOM, KIND = "reduce", "tokens"
RAW, UNIT = "-raw", "-unit"
TOGETHER = 64
"""Documents that are padded to one length."""


@dataclass(frozen=True)
class Family:
    """A reducer of the catalog, and what its results are called.

    Attributes:
        built: name that builds it.
        member: what it is called where rows are rows of the input; `None` of means.
        unit, raw: what it is called where means are scaled to norm 1, and where they are left; `None` of members.
        summary: one line for people.
        draws: whether it takes a seed.
    """

    built: str
    summary: str
    member: str | None = None
    unit: str | None = None
    raw: str | None = None
    draws: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that comes out."""
        return tuple(n for n in (self.member, self.unit, self.raw) if n is not None)

    @classmethod
    def of(cls, name: str, factor: float) -> Family:
        """That a method of the catalog belongs to.

        Raises:
            InputError: where it does not reduce tokens alone.
        """
        entry = method(name)
        if entry.room != ROOM or entry.kind != KIND:
            raise InputError(f"methods: {name} does not reduce documents by their vectors alone; see cenote list")
        base = entry.name.removesuffix(RAW)
        names = {m.name for m in methods(room=ROOM, kind=KIND)}
        if base != entry.name and base not in names:
            base = entry.name
        raw = base + RAW if base + RAW in names else base
        built = create(raw, factor=factor)
        draws = "seed" in inspect.signature(method(raw).load()).parameters
        summary = method(base).summary
        if built.keeps == "members":
            return cls(raw, summary, member=base, draws=draws)
        if raw == base and built.keeps == "means":
            return cls(raw, summary, unit=base + UNIT, raw=base, draws=draws)
        return cls(raw, summary, unit=base, raw=raw if raw != base else None, draws=draws)


def reduced(family: Family, factors: Sequence[float], bags: Bags, protect: int, seed: int = 0) -> dict[float, Bags]:
    """Documents by each factor; of means as the reducer leaves them, which is raw where it can.

    Where the reducer has `documents`, it is asked once for all factors: one tree each.
    """
    made = {factor: _built(family, factor, seed) for factor in factors}
    first = next(iter(made.values()))
    if hasattr(first, "documents"):
        return {factor: found[0] for factor, found in first.documents(bags, factors, protect).items()}
    return {factor: in_batches(reducer, bags, protect) for factor, reducer in made.items()}


def in_batches(reducer: Any, bags: Bags, protect: int) -> Bags:
    """What a reducer makes of ragged documents, those of like length padded together."""
    lengths = bags.lengths()
    found: dict[int, Tensor] = {}
    for numbers in lengths.argsort(stable=True).split(TOGETHER):
        x, mask = bags.select(numbers).to_padded()
        made = reducer(x, mask=mask, protect=protect)
        real = torch.ones(made.tokens.shape[:2], dtype=torch.bool) if made.mask is None else made.mask
        found |= {n: tokens[own] for n, tokens, own in zip(numbers.tolist(), made.tokens, real, strict=True)}
    return Bags.from_list([found[i] for i in range(len(bags))])


def reducer_of(name: str, factor: float, **settings: Any) -> Any:
    """A reducer of documents, by its name in the catalog.

    Raises:
        InputError: where it needs more than tokens, or reduces nothing.
    """
    entry = method(name)
    if entry.room != ROOM or entry.kind != KIND:
        raise InputError(f"method: {name} does not reduce documents by their vectors alone; see cenote list")
    if not factor > 1:
        raise InputError(f"factor: expected a number above 1, got {factor:g}; unreduced documents need no reducer")
    return create(name, factor=factor, **settings)


def unit_norm(bags: Bags) -> Bags:
    """Vectors scaled to norm 1; one that is zero, as opposite vectors' mean, stays."""
    return Bags(torch.nn.functional.normalize(bags.values, dim=1), bags.offsets)


def means(bags: Bags) -> Bags:
    """One vector per document: the mean of all."""
    return Bags(bags.mean(), torch.arange(len(bags) + 1))


def _built(family: Family, factor: float, seed: int) -> Any:
    return create(family.built, factor=factor, **({"seed": seed} if family.draws else {}))
