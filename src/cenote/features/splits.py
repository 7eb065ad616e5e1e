"""Which items train, which choose, which judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.features.dataset import SPLITS, TokenDataset
from cenote.features.labelling import Labelling
from cenote.features.table import Column, is_missing
from cenote.features.targets import Target
from cenote.features.validate import Problems

ATTEMPTS = 20
WORDS = {
    "train": 0, "training": 0, "0": 0,
    "val": 1, "valid": 1, "validation": 1, "dev": 1, "1": 1,
    "test": 2, "testing": 2, "2": 2,
}  # fmt: skip


def given_split(ids: Sequence[str], cells: Column, problems: Problems) -> list[int] | None:
    """The split as a column tells it."""
    before = len(problems)
    split = []
    for item, cell in zip(ids, cells, strict=True):
        word = "" if is_missing(cell) else str(cell).strip().lower().removesuffix(".0")
        if word not in WORDS:
            problems.add("split", f"item {item!r} has split {cell!r}; expected train, val or test")
        split.append(WORDS.get(word, 0))
    for needed in (0, 2):
        if needed not in split:
            problems.add(
                "split",
                f"no item is in the {SPLITS[needed]} split; move some there, or leave the split out to have one made",
            )
    return split if len(problems) == before else None


def check_given(split: Int[Tensor, "items"], made: Target, problems: Problems) -> None:
    """A given split can be trained and judged on: classes to judge were seen, and there is something to tell apart."""
    if made.task == "regression":
        return
    y = made.y if made.task == "multilabel" else torch.nn.functional.one_hot(made.y, len(made.classes))
    held = torch.stack([y[split == s].sum(0) for s in range(3)])
    for i, name in enumerate(made.classes):
        elsewhere = [SPLITS[s] for s in (1, 2) if held[s, i]]
        if not held[0, i]:
            problems.add(
                "split", f"class {name!r} is in {' and '.join(elsewhere)} but not in train; move items or leave it out"
            )
        elif made.task == "binary" and len(elsewhere) < 2:
            missing = next(s for s in ("val", "test") if s not in elsewhere)
            problems.add("split", f"class {name!r} has no item in the {missing} split; move some there")


def make_split(
    made: Target, groups: Sequence[str] | None, labelling: Labelling, problems: Problems
) -> Int[Tensor, "items"]:
    """A seeded split into train, val and test.

    Binary and multiclass without groups: stratified, every class in every split. Regression without groups: at random.
    Groups go to one side as a whole; they, and multilabel items, are dealt out from the largest to the smallest, each to the
    split that lacks most of what it holds.
    """
    split, lacking = _parts(made, groups, labelling.fractions, labelling.seed)
    if lacking is not None:
        part, column = lacking
        what = "" if column is None else f" of class {made.classes[column]!r}"
        unit = "items" if groups is None else "whole groups"
        problems.add(
            "class too small",
            f"no way was found to put {unit}{what} into each of train, val and test ({SPLITS[part]} stays without); "
            f"add {unit}, or give a split column",
        )
    return torch.from_numpy(split)


def val_from_train(
    split: Int[Tensor, "items"],
    made: Target,
    groups: Sequence[str] | None,
    labelling: Labelling,
    problems: Problems,
) -> Int[Tensor, "items"]:
    """The given split with a part of train as val, for those that come without."""
    train = (split == 0).nonzero().squeeze(1)
    of_train = None if groups is None else [groups[i] for i in train.tolist()]
    in_train, in_val, _ = labelling.fractions
    share = in_val / (in_train + in_val)
    found, _ = _parts(Target(made.y[train], made.task, made.classes), of_train, (1 - share, share), labelling.seed)
    split = split.clone()
    split[train] = torch.from_numpy(found)
    for part in (0, 1):
        if not (split == part).any():
            problems.add("split", "train is too small to take a val split from it; give val items in the split column")
    return split


def folds(data: TokenDataset, count: int, repeats: int = 1) -> tuple[Int[Tensor, "items"], ...]:
    """Splits that test every item once in each of `repeats` rounds, of `count` folds each.

    Test items of a fold: classes are stratified, groups stay whole (`StratifiedKFold`, `StratifiedGroupKFold` and `KFold` of
    scikit-learn; groups of regression items, and multilabel items, are dealt out as in `make_split`). Validation is taken from
    the rest, in the share that it has beside train in the split of the data, and like it from its seed.

    Args:
        data: with a split that was made, not given.
        count: folds of a round, 2 or more.
        repeats: rounds, each with another assignment of items to folds.

    Raises:
        InputError: where the split was given, or items or groups are too few for so many folds.

    Source: Kohavi, "A Study of Cross-Validation and Bootstrap for Accuracy Estimation and Model Selection", IJCAI 1995.
    """
    require_at_least(2, folds=count)
    require_at_least(1, repeats=repeats)
    seed = require_made(data.split_seed)
    made, groups = Target(data.y, data.task, data.classes), data.groups
    owner = np.arange(len(data)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    _require_for_folds(made, owner, groups is not None, count)
    in_train, in_val = (len(data.indices(split)) for split in ("train", "val"))
    rest, share = 1 - 1 / count, in_val / (in_train + in_val)
    labelling = Labelling(fractions=(rest * (1 - share), rest * share, 1 / count), seed=seed)
    rng, found = np.random.RandomState(seed), []
    for _ in range(repeats):
        fold = _dealt_to_folds(made, groups, owner, count, rng)
        for number in range(count):
            problems = Problems("folds")
            split = torch.from_numpy(np.where(fold == number, SPLITS.index("test"), 0))
            split = val_from_train(split, made, groups, labelling, problems)
            check_given(split, made, problems)
            if len(problems) or not _can_judge(split, made):
                raise InputError(
                    f"folds: of {count}, number {number + 1} has nothing to learn, choose or judge by, as a class or its "
                    f"targets are missing on one side; give fewer folds, or 1 for a single split"
                )
            found.append(split)
    return tuple(found)


def require_made(split_seed: int | None) -> int:
    """The seed of a split that was made.

    Raises:
        InputError: where it was given: folds would take it apart.
    """
    if split_seed is None:
        raise InputError(
            "folds: the data come with a split of their own, and folds would make others; leave folds out, or read data "
            "without a split column"
        )
    return split_seed


def _require_for_folds(made: Target, owner: NDArray[np.int64], grouped: bool, count: int) -> None:
    """Each fold can test something of each class."""
    units = "groups" if grouped else "items"
    if made.task in ("binary", "multiclass"):
        held = {name: len(set(owner[(made.y == i).numpy()].tolist())) for i, name in enumerate(made.classes)}
        rarest = min(held, key=held.__getitem__)
        least, of_what = held[rarest], f"class {rarest!r} has"
    else:
        least, of_what = len(set(owner.tolist())) // (1 if grouped else 2), f"there are {units} for"
    if least < count:
        raise InputError(
            f"folds: each of {count} tests {units} that the others do not, but {of_what} {least}; give at most "
            f"{max(1, least)}{'' if least < 2 else ', or 1 for a single split'}"
        )


def _dealt_to_folds(
    made: Target, groups: Sequence[str] | None, owner: NDArray[np.int64], count: int, rng: np.random.RandomState
) -> NDArray[np.int64]:
    """The fold that tests each item."""
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    if made.task == "multilabel" or (made.task == "regression" and groups is not None):
        return _parts(made, groups, [1 / count] * count, int(rng.randint(2**31)))[0]
    if made.task == "regression":
        splitter: Any = KFold(count, shuffle=True, random_state=rng)
    else:
        of_classes = StratifiedKFold if groups is None else StratifiedGroupKFold
        splitter = of_classes(count, shuffle=True, random_state=rng)
    fold = np.zeros(len(made.y), np.int64)
    for number, (_, tested) in enumerate(splitter.split(owner, made.y.numpy(), None if groups is None else owner)):
        fold[tested] = number
    return fold


def _can_judge(split: Int[Tensor, "items"], made: Target) -> bool:
    """Whether every part holds items, and of a regression different targets."""
    parts = [made.y[split == number] for number in range(len(SPLITS))]
    if made.task != "regression":
        return all(len(y) for y in parts)
    return all(len(y) > 1 and bool((y != y[0]).any(0).all()) for y in parts)


def _parts(
    made: Target, groups: Sequence[str] | None, shares: Sequence[float], seed: int
) -> tuple[NDArray[np.int64], tuple[int, int | None] | None]:
    """The part of each item, and, if there is one, a part that lacks a class (`None`: that lacks everything)."""
    rng = np.random.RandomState(seed)
    owner = np.arange(len(made.y)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    indicators = _indicators(made)
    if groups is None and made.task != "multilabel":
        return stratified(indicators[:, 1:].argmax(1) if indicators.shape[1] > 1 else owner * 0, shares, rng), None
    holds = np.zeros((owner.max() + 1, indicators.shape[1]))
    np.add.at(holds, owner, indicators)
    for attempt in range(ATTEMPTS):
        split = dealt(holds, shares, rng, cover_first=attempt >= ATTEMPTS // 2)
        lacking = [
            (part, None if column == 0 else column - 1)
            for column in range(holds.shape[1])
            for part in range(len(shares))
            if not holds[split == part, column].any()
        ]
        if not lacking:
            return split[owner], None
    return split[owner], lacking[0]


def stratified(strata: NDArray[Any], fractions: Sequence[float], rng: np.random.RandomState) -> NDArray[np.int64]:
    """Deal out each stratum by the fractions; one that is large enough has an item in every part.

    What rounding gives to one stratum is taken back from the next, so that the parts have the right sizes as a whole.
    """
    split = np.zeros(len(strata), np.int64)
    parts = len(fractions)
    wanted, had = np.zeros(parts), np.zeros(parts)
    for stratum in np.unique(strata):
        items = rng.permutation(np.flatnonzero(strata == stratum))
        wanted += len(items) * np.asarray(fractions)
        left = len(items)
        for part in range(parts - 1, 0, -1):
            at_most = max(left - part, 0)
            take = int(np.clip(np.round(wanted[part] - had[part]), min(1, at_most), at_most))
            split[items[left - take : left]] = part
            had[part] += take
            left -= take
    return split


def dealt(
    holds: Float[np.ndarray, "groups columns"],
    fractions: Sequence[float],
    rng: np.random.RandomState,
    cover_first: bool,
) -> NDArray[np.int64]:
    """Deal out whole groups, largest first, each to the part where it brings all columns nearest to their shares.

    Args:
        holds: how much of each column a group holds; column 0 is its number of items.
        fractions: share of each part.
        rng: breaks ties between groups of one size.
        cover_first: prefer the part that still has nothing of some column that the group holds.
    """
    order = rng.permutation(len(holds))
    order = order[np.argsort(-holds[order, 0], kind="stable")]
    goal = np.asarray(fractions)[:, None] * holds.sum(0)
    scale = np.maximum(goal, 1e-9)
    filled = np.zeros_like(goal)
    split = np.zeros(len(holds), np.int64)
    for group in order:
        after = filled + holds[group]
        cost = (((after - goal) ** 2 - (filled - goal) ** 2) / scale).sum(1)
        if cover_first:
            cost = cost - 1e9 * ((filled == 0) & (holds[group] > 0)).sum(1)
        part = int(cost.argmin())
        filled[part] += holds[group]
        split[group] = part
    return split


def _indicators(made: Target) -> Float[np.ndarray, "items columns"]:
    ones = np.ones((len(made.y), 1))
    if made.task == "regression":
        return ones
    if made.task == "multilabel":
        return np.hstack([ones, made.y.numpy()])
    return np.hstack([ones, np.eye(len(made.classes))[made.y.numpy()]])
