"""Stores of many vectors per document: what they promise, and the exact one, which maps plain files.

An index says what it holds (`Meta`), and another model, width or reduction is refused by name. Adding is by id: what is there
already is not added again, so that a killed run is run again as it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

import cenote.core.files as files
from cenote.core import Bags, InputError
from cenote.core.maxsim import Found, merged, search
from cenote.core.requirements import require_at_least
from cenote.features.validate import some

CARD = "index.json"
FORMAT = 1
PART_BYTES = 2**26
"""Of the vectors in one file, which is in memory as a whole while it is written."""
REMEDY = "delete the folder, and index the collection again"
NEAR_ONE = 1e-2
"""By which the norm of a vector may miss 1: half precision loses a thousandth."""


@dataclass(frozen=True)
class Meta:
    """What an index holds.

    Attributes:
        model: that the vectors are from; a name that the queries' model can be loaded by.
        width: of a vector.
        method: that reduced the documents, `unreduced` for all vectors.
        factor: how many times fewer vectors.
        unit_norm: whether reduced vectors were scaled to norm 1.
        weights: SHA-256 of the model's, empty where there is none.
        layer: hidden state that the vectors are of; `None`: the model's output.
        punctuation: whether documents kept the vectors of punctuation.
        max_length: at which texts were cut; `None`: the model's own.
    """

    model: str
    width: int
    method: str = "unreduced"
    factor: float = 1.0
    unit_norm: bool = True
    weights: str = ""
    layer: int | None = None
    punctuation: bool = False
    max_length: int | None = None

    def require(self, wanted: Meta, where: object) -> None:
        """Raise `InputError`, naming each difference, unless an index at a place holds what is wanted.

        >>> Meta("a", 8).require(Meta("b", 8, factor=2.0), "index")
        Traceback (most recent call last):
        cenote.core.errors.InputError: store: index holds model a, not b; factor 1.0, not 2.0; name another place
        """
        names = [field.name for field in dataclasses.fields(self)]
        # one model may lie in two places
        same = {"model"} if self.weights and self.weights == wanted.weights else set()
        other = [n for n in names if n not in same and getattr(self, n) != getattr(wanted, n)]
        if other:
            told = "; ".join(f"{n.replace('_', ' ')} {getattr(self, n)}, not {getattr(wanted, n)}" for n in other)
            raise InputError(f"store: {where} holds {told}; name another place")


class Hits(NamedTuple):
    """What was found for each query, best first.

    `ids` `[queries][k]`; `scores` `[queries, k]`, of exact MaxSim; `exact`: whether no better document can have been missed.
    """

    ids: list[list[str]]
    scores: Float[Tensor, "queries k"]
    exact: bool = True


@runtime_checkable
class VectorStore(Protocol):
    """What every store of many vectors per document does."""

    @property
    def meta(self) -> Meta:
        """What it holds."""

    @property
    def nbytes(self) -> int:
        """That it takes on disk, as the system counts them."""

    def __len__(self) -> int:
        """How many documents."""

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those that are not in it, in their order."""

    def add(self, ids: Sequence[str], bags: Bags) -> int:
        """Add documents, but those whose id is there already; how many were added."""

    def search(self, bags: Bags, k: int = 10) -> Hits:
        """The `k` best documents of each query, fewer where there are not so many."""

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; ids of others do not change. How many were there."""


class ExactStore:
    """Exact MaxSim over vectors of half precision in mapped files; needs no tuning, up to some million vectors.

    Args:
        folder: of the index.
        meta: what it is to hold; default: what it holds, and then it must be there.

    Raises:
        InputError: where it holds something else, is damaged, or is not there.

    Example:
        >>> import tempfile
        >>> store = ExactStore(tempfile.mkdtemp(), Meta("mine", 2))
        >>> store.add(["x", "y"], Bags.from_list([torch.eye(2), torch.eye(2)[1:]]))
        2
        >>> store.search(Bags.from_list([torch.eye(2)[:1]]), k=1).ids
        [['x']]

    Note:
        Deleted documents keep their bytes until all of their file is deleted.
    """

    def __init__(self, folder: str | Path, meta: Meta | None = None) -> None:
        self.folder = Path(folder)
        self._meta = opened_meta(self.folder, meta)
        self._parts: list[_Part] = []
        self._read()

    @property
    def meta(self) -> Meta:
        """What it holds."""
        return self._meta

    @property
    def nbytes(self) -> int:
        """That it takes on disk."""
        return disk_bytes(self.folder)

    @property
    def vectors(self) -> int:
        """How many there are, those of deleted documents left out."""
        return sum(int(part.bags.lengths()[part.alive()].sum()) for part in self._parts)

    @property
    def ids(self) -> list[str]:
        """Of all documents, in the order in which they were added."""
        return [part.ids[row] for part in self._parts for row in part.alive().nonzero()[:, 0].tolist()]

    def lengths(self) -> Int[Tensor, "documents"]:
        """How many vectors each document has."""
        return torch.cat([torch.zeros(0, dtype=torch.long), *(p.bags.lengths()[p.alive()] for p in self._parts)])

    def batches(self) -> Iterator[tuple[list[str], Bags]]:
        """Ids and vectors, in float32, of some documents after the other, in their order."""
        for part in self._parts:
            rows = part.alive().nonzero()[:, 0]
            yield [part.ids[row] for row in rows.tolist()], part.bags.select(rows).to(torch.float32)

    def select(self, numbers: Int[Tensor, "chosen"]) -> Bags:
        """Vectors, in float32, of some documents by their places in `ids`."""
        found: dict[int, Tensor] = {}
        first = 0
        for part in self._parts:
            rows = part.alive().nonzero()[:, 0]
            for number in numbers[(numbers >= first) & (numbers < first + len(rows))].tolist():
                found[number] = part.bags[int(rows[number - first])].float()
            first += len(rows)
        return Bags.from_list([found[number] for number in numbers.tolist()])

    def digest(self) -> str:
        """That changes with the content."""
        return files.sealed(self._card())[files.DIGEST]

    def __len__(self) -> int:
        return sum(len(part.ids) - len(part.deleted) for part in self._parts)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those that are not in it, in their order."""
        there = set(self.ids)
        return [name for name in ids if name not in there]

    def add(self, ids: Sequence[str], bags: Bags) -> int:
        """Add documents, but those whose id is there already.

        Raises:
            InputError: where ids and documents do not fit together, or vectors are of another width, NaN or infinite.
        """
        require_vectors(ids, bags, self.meta)
        with files.alone(self.folder, "index"):
            files.remove_unfinished(self.folder)
            self._read()
            new = set(self.missing(ids))
            rows = [row for row, name in enumerate(ids) if name in new]
            if rows:
                chosen = bags if len(rows) == len(ids) else bags.select(torch.tensor(rows))
                self._write([ids[row] for row in rows], chosen)
        return len(rows)

    def search(self, bags: Bags, k: int = 10) -> Hits:
        """The `k` best documents of each query: exact, of equal ones those that were added first."""
        require_at_least(1, k=k)
        require_width(bags, self.meta)
        best: Found | None = None
        first = 0
        names: list[str] = []
        for part in self._parts:
            found = search(bags, part.bags, k + len(part.deleted))
            if part.deleted:
                gone = torch.isin(found.numbers, torch.tensor(sorted(part.deleted), device=found.numbers.device))
                found = found._replace(scores=found.scores.masked_fill(gone, float("-inf")))
            found = found._replace(numbers=found.numbers + first)
            best = found if best is None else merged(best, found, found.numbers.shape[1] + best.numbers.shape[1])
            first += len(part.ids)
            names += part.ids
        count = min(k, len(self))
        if best is None or not count:
            return Hits([[] for _ in range(len(bags))], torch.zeros(len(bags), 0))
        # what was deleted sorts behind everything
        best = merged(best, best._replace(scores=best.scores[:, :0], numbers=best.numbers[:, :0]), count)
        return Hits([[names[n] for n in row] for row in best.numbers.tolist()], best.scores)

    def rerank(self, bags: Bags, candidates: Sequence[Sequence[str]], k: int = 10) -> Hits:
        """The `k` best of each query's candidates, which another search found, by exact MaxSim.

        Raises:
            InputError: where there are not as many lists as queries, they differ in length, or one names what is not there.
        """
        require_at_least(1, k=k)
        require_width(bags, self.meta)
        if len(candidates) != len(bags) or len({len(names) for names in candidates}) > 1:
            told = ", ".join(str(len(names)) for names in candidates[:5]) or "none"
            raise InputError(f"candidates: expected as many for each of {len(bags)} queries, got {told}")
        place = {name: n for n, name in enumerate(self.ids)}
        unknown = [name for names in candidates for name in names if name not in place]
        if unknown:
            raise InputError(f"candidates: {len(unknown)} are not in the store ({some(unknown)})")
        if not len(bags) or not candidates[0]:
            return Hits([[] for _ in candidates], torch.zeros(len(bags), 0))
        names, scores = [], []
        for query, among in zip(bags, candidates, strict=True):
            documents = self.select(torch.tensor([place[name] for name in among]))
            best = search(Bags.from_list([query.float()]), documents, k)
            names.append([among[n] for n in best.numbers[0].tolist()])
            scores.append(best.scores[0])
        return Hits(names, torch.stack(scores))

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; how many were there."""
        with files.alone(self.folder, "index"):
            self._read()
            wanted, count = set(ids), 0
            for part in self._parts:
                gone = {row for row, name in enumerate(part.ids) if name in wanted} - part.deleted
                part.deleted |= gone
                count += len(gone)
            left = [part for part in self._parts if len(part.deleted) < len(part.ids)]
            dropped = [part for part in self._parts if part not in left]
            self._parts = left
            self._keep()
            for part in dropped:
                part.path.unlink(missing_ok=True)
        return count

    def _write(self, ids: list[str], bags: Bags) -> None:
        step = max(1, PART_BYTES // (2 * max(self.meta.width, 1)))
        offsets = bags.offsets.tolist()
        start = 0
        while start < len(ids):
            end = start + 1
            while end < len(ids) and offsets[end + 1] - offsets[start] <= step:
                end += 1
            number = 1 + max((part.number for part in self._parts), default=-1)
            path = self.folder / f"part-{number:06d}.safetensors"
            values = bags.values[offsets[start] : offsets[end]].half().cpu()
            tensors = {"values": values, "offsets": bags.offsets[start : end + 1].cpu() - offsets[start]}
            digest = files.write_tensors(path, tensors, {"ids": json.dumps(ids[start:end])})
            self._parts.append(_Part.opened(path, number, digest, set()))
            start = end
            # one part at a time: what is killed here is not begun again
            self._keep()

    def _card(self) -> dict[str, Any]:
        parts = [{"number": p.number, "digest": p.digest, "deleted": sorted(p.deleted)} for p in self._parts]
        return {"format": FORMAT, "meta": dataclasses.asdict(self.meta), "parts": parts}

    def _keep(self) -> None:
        files.write_whole(self.folder / CARD, json.dumps(files.sealed(self._card()), indent=1))

    def _read(self) -> None:
        card = files.read_card(self.folder / CARD, REMEDY, format=int, meta=dict, parts=list)
        held = {part.digest: part for part in self._parts}
        parts = []
        for entry in card["parts"]:
            path = self.folder / f"part-{entry['number']:06d}.safetensors"
            part = held.get(entry["digest"]) or _Part.opened(path, entry["number"], entry["digest"], set())
            part.deleted = set(entry["deleted"])
            parts.append(part)
        self._parts = parts


@dataclass(eq=False)
class _Part:
    """One file of an index."""

    path: Path
    number: int
    digest: str
    ids: list[str]
    bags: Bags
    deleted: set[int]

    @classmethod
    def opened(cls, path: Path, number: int, digest: str, deleted: set[int]) -> _Part:
        """Mapped, after its digest was compared."""
        try:
            stored = files.read_tensors(path, old=False)
            if stored.digest != digest:
                raise ValueError("it is of another index")
            bags = Bags(stored.tensors["values"], stored.tensors["offsets"])
            ids = json.loads(stored.metadata["ids"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"store: {path} is damaged ({error}); {REMEDY}") from error
        return cls(path, number, digest, ids, bags, deleted)

    def alive(self) -> Tensor:
        """Which of its documents are not deleted."""
        kept = torch.ones(len(self.ids), dtype=torch.bool)
        kept[sorted(self.deleted)] = False
        return kept


def opened_meta(folder: Path, meta: Meta | None) -> Meta:
    """What the index of a folder holds; where there is none, an empty one is begun.

    Raises:
        InputError: where it holds something else, cannot be begun, or is not there and `meta` does not say what it is to hold.
    """
    card = folder / CARD
    if not card.is_file():
        if meta is None:
            raise InputError(f"store: there is no index in {folder}; make one with `cenote index`")
        if folder.is_file():
            raise InputError(f"store: {folder} is a file; name a folder")
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise InputError(f"store: {folder} holds other files and no index; name an empty folder")
        content = {"format": FORMAT, "meta": dataclasses.asdict(meta), "parts": []}
        files.write_whole(card, json.dumps(files.sealed(content), indent=1))
        return meta
    found = files.read_card(card, REMEDY, format=int, meta=dict)
    files.require_format(folder, found, FORMAT)
    try:
        held = Meta(**found["meta"])
    except TypeError as error:
        raise InputError(f"store: {card} is damaged ({error}); {REMEDY}") from None
    if meta is not None:
        held.require(meta, folder)
    return held


def require_width(bags: Bags, meta: Meta) -> None:
    """Raise `InputError` unless vectors are as wide as those of an index."""
    if bags.dim != meta.width:
        raise InputError(
            f"bags: vectors are {bags.dim} wide, and those of the index {meta.width}; are they of {meta.model}?"
        )


def require_vectors(ids: Sequence[str], bags: Bags, meta: Meta, unit: bool = False) -> None:
    """Raise `InputError` unless documents can be added to an index: one id each, of its width, with finite vectors.

    Args:
        ids, bags: the documents.
        meta: of the index.
        unit: whether vectors must have norm 1, because the store compares by cosine.
    """
    require_width(bags, meta)
    if len(ids) != len(bags):
        raise InputError(f"ids: expected one for each of {len(bags)} documents, got {len(ids)}")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise InputError(f"ids: expected each once, got {some(twice)} again")
    empty = [name for name, n in zip(ids, bags.lengths().tolist(), strict=True) if not n]
    if empty:
        raise InputError(f"bags: {len(empty)} of {len(ids)} documents have no vector ({some(empty)}); leave them out")
    whole = bags.values.isfinite().all(1)
    if not bool(whole.all()):
        bad = bags.set_index()[~whole].unique().tolist()
        raise InputError(
            f"bags: {len(bad)} documents hold NaN or infinite numbers ({some(ids[i] for i in bad)}); leave them out"
        )
    if unit:
        norms = bags.values.float().norm(dim=1)
        off = bags.set_index()[(norms - 1).abs() > NEAR_ONE].unique().tolist()
        if off:
            raise InputError(
                f"bags: {len(off)} documents hold vectors whose norm is not 1 ({some(ids[i] for i in off)}), and this store "
                f"compares by cosine, which would scale them; normalise them, or take another store"
            )


def disk_bytes(folder: Path) -> int:
    """What the files below a folder take on disk, as `du` counts."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            stat = os.stat(path)
            total += getattr(stat, "st_blocks", -(-stat.st_size // 512)) * 512
    return total
