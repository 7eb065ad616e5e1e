"""What a colleague would say on seeing a table: data that carry less than they seem to, and training that stopped too soon."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.compare.cells import Cell, cell_key, load_cell, save_cell
from cenote.compare.sources import source_digest
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.result import Comparison, MethodResult

FEW_ITEMS = 100
"""Test items below which one that is told right or wrong moves a score by more than a point."""

FEW_GROUPS = 20
"""Test groups below which the variance of a score is itself known to a third at best (sqrt(2 / 19))."""

FEW_OF_A_CLASS = 10
"""Test items of a class (groups, where there are groups) below which one of them moves what its class scores by ten points."""

RESTS_ON_EVERY_CLASS = ("AUROC", "balanced accuracy", "mean average precision")
"""Metrics in which a rare class weighs as much as a frequent one."""

CONSTANT_SHARE = 0.05
"""Of the features: a few dead units are usual in trained models, one in twenty points to padding or a wrong file."""

FLOAT16_LARGEST = torch.finfo(torch.float16).max

COARSE = 1000
"""Steps of a number of 32 bits below which what varies has too few of them."""

GAIN = 0.005
"""Half a point of validation: what more could be had beyond the last epoch, or the edge of the grid, is worth a second run."""

LATE = 0.8
"""Share of the epochs after which a curve that still rises has not ended."""


def cautions(
    data: TokenDataset,
    comparison: Comparison,
    recipe: Recipe,
    tested: Int[Tensor, "tested"] | None = None,
    seen: Seen | None = None,
) -> tuple[str, ...]:
    """All that apply, those of the data first; of `tested` items, by default those of the test split. What was `seen` in all
    tokens is looked for where it is not given."""
    seen = seen or Seen.of(data, tests_more(data, tested))
    looked_at = {comparison.winner, comparison.baseline}
    results = [r for r in comparison.results if r.method in looked_at]
    return (
        *data.cautions,
        *small_test(data, comparison.metric_name, tested),
        *odd_features(data, seen),
        *odd_targets(data),
        *(text for r in comparison.results for text in diverged(r)),
        *(text for r in results for text in (*at_the_edge(r, recipe), *still_improving(r, recipe))),
    )


def small_test(data: TokenDataset, metric: str, tested: Int[Tensor, "tested"] | None = None) -> tuple[str, ...]:
    """Too few test items or groups, or too few of a class for a metric that rests on every class."""
    test = data.indices("test") if tested is None else tested
    numbers = test.tolist()
    of_item = numbers if data.groups is None else [data.groups[i] for i in numbers]
    units, few = len(set(of_item)), FEW_ITEMS if data.groups is None else FEW_GROUPS
    kind = "items" if data.groups is None else "groups"
    found = []
    if units < few:
        found.append(
            f"the test split holds only {_several(units, kind)}: intervals are wide, and only large differences can be seen; "
            f"with {few} or more they say more"
        )
    if metric in RESTS_ON_EVERY_CLASS:
        held = {
            name: len({of_item[i] for i in np.flatnonzero(on).tolist()}) for name, on in _by_class(data, test).items()
        }
        name = min((n for n in held if held[n]), key=held.__getitem__, default=None)
        if name is not None and held[name] < FEW_OF_A_CLASS:
            found.append(
                f"{metric} rests on only {_several(held[name], f'test {kind}')} of {name!r}: it can be high or low by luck; "
                f"with {FEW_OF_A_CLASS} or more it says more"
            )
    return tuple(found)


def tests_more(data: TokenDataset, tested: Int[Tensor, "tested"] | None) -> bool:
    """Whether more items are tested than those of the data's own test split."""
    return tested is not None and len(tested) > len(data.indices("test"))


def odd_features(data: TokenDataset, seen: Seen | None = None) -> tuple[str, ...]:
    """Items that stand on both sides of a split, constant features, and features beyond float16's range."""
    seen = seen or Seen.of(data)
    found = []
    if seen.copies:
        test, other = seen.copies[0]
        what, where = len(data.indices("test")), "an item of train or val"
        if seen.in_folds:
            what, where = len(data), "another item, which is trained on in some fold"
        found.append(
            f"{len(seen.copies)} of {what:,} test items have the same features as {where} ({test!r} as {other!r}): what was "
            f"learned by heart scores there; take copies out, or keep them together with --group"
        )
    constant = int(seen.constant.sum())
    if constant >= CONSTANT_SHARE * data.dim:
        numbers = ", ".join(map(str, seen.constant.nonzero().flatten()[:3].tolist()))
        found.append(
            f"{constant:,} of {data.dim:,} features never change (first: {numbers}): they tell nothing; "
            f"see whether the files hold padding, or something else than they should"
        )
    if seen.largest > FLOAT16_LARGEST:
        found.append(
            f"features reach {seen.largest:.3g}, beyond float16's {FLOAT16_LARGEST:,.0f}: keep them in float32, and use the "
            f"probe in float32"
        )
    return tuple(found)


def odd_targets(data: TokenDataset) -> tuple[str, ...]:
    """Targets that vary so little, beside how large they are, that 32 bits hardly tell them apart."""
    if data.task != "regression":
        return ()
    y = data.y.double()
    coarse = y.std(0, correction=0) < COARSE * torch.finfo(torch.float32).eps * y.abs().amax(0)
    return tuple(
        f"{name} varies by {float(y[:, k].std(correction=0)):.3g} around {float(y[:, k].mean()):.3g}, which numbers of 32 bits "
        f"hardly resolve: take its mean away first"
        for k, name in enumerate(data.classes)
        if bool(coarse[k])
    )


def diverged(result: MethodResult) -> tuple[str, ...]:
    """The loss of training was no number any more."""
    ends = [
        next((e for e, loss in enumerate(losses, 1) if not math.isfinite(loss)), None) for losses in result.train_loss
    ]
    first = min((e for e in ends if e is not None), default=None)
    if first is None:
        return ()
    return (
        f"the loss of {result.method} was no finite number from epoch {first} on: what is reported is the best state before; "
        f"see whether features or targets are very large",
    )


@dataclass(frozen=True)
class Seen:
    """What one pass over all tokens showed.

    Attributes:
        copies: ids of test items, each with that of an item of train or val that has the same tokens (and edges); of folds,
            which test all, of items that are not kept together.
        constant: per feature, whether it has one value in all tokens.
        largest: absolute value of a feature.
        in_folds: whether every item is tested, each in a fold of its own.
    """

    copies: tuple[tuple[str, str], ...]
    constant: Bool[Tensor, "dim"]
    largest: float
    in_folds: bool = False

    @classmethod
    def kept(cls, data: TokenDataset, fingerprint: str, file: Path, in_folds: bool) -> Seen:
        """That of these data, kept in a file; found there again where data and code are the same."""
        key = cell_key({"data": fingerprint, "in_folds": in_folds, "source": source_digest(cls)})
        cell = load_cell(file, key)
        if cell is not None:
            copies = tuple((test, other) for test, other in cell.record["copies"])
            return cls(copies, cell.tensors["constant"], cell.record["largest"], in_folds)
        seen = cls.of(data, in_folds)
        record = {"copies": seen.copies, "largest": seen.largest}
        save_cell(file, key, Cell(file.stem, record, {"constant": seen.constant}))
        return seen

    @classmethod
    def of(cls, data: TokenDataset, in_folds: bool = False) -> Seen:
        """That of these data, under their split, or in folds that test every item."""
        low, high = torch.full((data.dim,), math.inf), torch.full((data.dim,), -math.inf)
        learned: dict[bytes, int] = {}
        copies = []
        order = torch.cat([data.indices("train"), data.indices("val"), data.indices("test")]).tolist()
        for i in order:
            tokens = data.item(i)
            digest = _digest(data, i, tokens)
            other = learned.get(digest)
            together = other is not None and data.groups is not None and data.groups[i] == data.groups[other]
            if other is not None and not together and (in_folds or data.split[i] == 2):
                copies.append((data.ids[i], data.ids[other]))
            elif in_folds or data.split[i] != 2:
                learned.setdefault(digest, i)
            rows = tokens.float().flatten(0, -2)
            low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
        return cls(tuple(copies), low == high, float(torch.maximum(-low, high).max()), in_folds)


def at_the_edge(result: MethodResult, recipe: Recipe) -> tuple[str, ...]:
    """The learning rate that was chosen has a neighbour on one side only, and beats it."""
    by_rate = dict(sorted(zip(recipe.learning_rates, result.validation_by_rate, strict=False)))
    rates = list(by_rate)
    if len(rates) < 2 or result.learning_rate not in (rates[0], rates[-1]):
        return ()
    smallest = result.learning_rate == rates[0]
    edge, inner = rates[:2] if smallest else rates[:-3:-1]
    gain = by_rate[edge] - by_rate[inner]
    if not gain > GAIN:
        return ()
    kind, other = ("smallest", "smaller") if smallest else ("largest", "larger")
    return (
        f"{result.method} chose {edge:g}, the {kind} learning rate of the grid, which is {gain:.3f} above {inner:g} on "
        f"validation: a {other} one may do better; give Recipe(learning_rates=...) more",
    )


def still_improving(result: MethodResult, recipe: Recipe) -> tuple[str, ...]:
    """All epochs were used, and the last of them still brought something."""
    curves = [_best_so_far(c) for c in result.validation_curve]
    if not curves or recipe.epochs < 2 or any(len(c) < recipe.epochs for c in curves):
        return ()
    before = min(recipe.epochs - 1, math.ceil(LATE * recipe.epochs))
    gain = float(np.mean([c[-1] - c[before - 1] for c in curves]))
    if not gain > GAIN:
        return ()
    return (
        f"{result.method} still improved when training ended (validation {gain:+.3f} after epoch {before} of {recipe.epochs}): "
        f"give --epochs more",
    )


def _best_so_far(curve: Sequence[float]) -> list[float]:
    return np.fmax.accumulate(np.asarray(curve)).tolist()


def _by_class(data: TokenDataset, items: Tensor) -> dict[str, np.ndarray]:
    """Which of some items are of each class, or carry each label."""
    y = data.y[items].numpy()
    if data.task == "regression":
        return {}
    return {name: (y[:, c] > 0.5 if data.task == "multilabel" else y == c) for c, name in enumerate(data.classes)}


def _digest(data: TokenDataset, index: int, tokens: Tensor) -> bytes:
    parts = [tokens]
    if data.has_edges:
        parts.append(data.graphs(torch.tensor([index])).edge_index)
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _several(count: int, kind: str) -> str:
    return f"{count} {kind.removesuffix('s') if count == 1 else kind}"
