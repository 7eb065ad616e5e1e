"""A data set in plain words: what the command line prints before training."""

from __future__ import annotations

from typing import Any

import torch

from cenote.features.dataset import SPLITS, TokenDataset

CLASSES_SHOWN = 12


def facts(data: TokenDataset) -> dict[str, Any]:
    """The numbers behind `describe`: items and class counts per split, tokens, width, type, bytes."""
    lengths = data.lengths().sort().values
    return {
        "name": data.name,
        "source": data.source,
        "task": data.task,
        "items": {name: len(data.indices(name)) for name in SPLITS},
        "class_counts": {name: _counts(data, split) for split, name in enumerate(SPLITS)},
        "groups": None if data.groups is None else len(set(data.groups)),
        "tokens": [int(lengths[0]), int(lengths[(len(lengths) - 1) // 2]), int(lengths[-1])],
        **_edges(data),
        **_labelled_tokens(data),
        "dim": data.dim,
        "dtype": str(data.dtype).removeprefix("torch."),
        "prefix_tokens": data.prefix_tokens,
        "grid": None if data.grid is None else list(data.grid),
        "bytes": data.nbytes(),
    }


def describe(data: TokenDataset) -> str:
    """The data set in a few lines.

    Example:
        >>> from cenote.features import digit_bags
        >>> print(describe(digit_bags()))
        digit-bags: 800 items, 400 train, 100 val, 300 test
          from bags drawn with seed 0 from scikit-learn digits ...
          task: binary; positive class: a 9
            no 9: 200 train, 50 val, 150 test
            a 9: 200 train, 50 val, 150 test
          tokens per item: 5 to 40, median 23; width 64, float32, 4.8 MB
          token labels: 1,011 tokens matter, in 400 of 800 items
    """
    f = facts(data)
    lines = [f"{data.name}: {len(data)} items, {_per_split(f['items'])}", f"  from {data.source}"]
    lines.append(f"  task: {data.task}{_classes_in_words(data)}")
    if data.task != "regression":
        shown = data.classes[:CLASSES_SHOWN]
        lines += [f"    {c}: {_per_split({s: f['class_counts'][s][c] for s in SPLITS})}" for c in shown]
        if len(shown) < len(data.classes):
            lines.append(f"    ... and {len(data.classes) - len(shown)} more")
    if f["groups"] is not None:
        lines.append(f"  groups: {f['groups']}, none on two sides of the split")
    low, median, high = f["tokens"]
    spread = f"{low}" if low == high else f"{low} to {high}, median {median}"
    layout = []
    if data.prefix_tokens:
        layout.append(f"{data.prefix_tokens} prefix")
    if data.grid is not None:
        layout.append(f"{data.grid[0]} x {data.grid[1]} grid")
    within = f" ({' + '.join(layout)})" if layout else ""
    if "edges" in f:
        low, median, high = f["edges"]
        lines.append(
            f"  graphs, their nodes the tokens; edges, counted in both directions: {low} to {high}, median {median}"
        )
    lines.append(f"  tokens per item: {spread}{within}; width {data.dim}, {f['dtype']}, {_size(f['bytes'])}")
    if "labelled_tokens" in f:
        marked, items = f["labelled_tokens"]
        lines.append(f"  token labels: {marked:,} tokens matter, in {items:,} of {len(data):,} items")
    return "\n".join(lines)


def _edges(data: TokenDataset) -> dict[str, list[int]]:
    counts = data.token_source.edges()
    if counts is None:
        return {}
    counts = counts.sort().values
    return {"edges": [int(counts[0]), int(counts[(len(counts) - 1) // 2]), int(counts[-1])]}


def _labelled_tokens(data: TokenDataset) -> dict[str, list[int]]:
    if data.token_labels is None:
        return {}
    marked = data.token_labels.flatten() != 0
    owner = torch.repeat_interleave(torch.arange(len(data)), data.lengths())
    return {"labelled_tokens": [int(marked.sum()), len(owner[marked].unique())]}


def _counts(data: TokenDataset, split: int) -> dict[str, int]:
    y = data.y[data.split == split]
    if data.task == "regression":
        return {}
    found = y.sum(0) if data.task == "multilabel" else y.bincount(minlength=len(data.classes))
    return {name: int(n) for name, n in zip(data.classes, found.tolist(), strict=False)}


def _classes_in_words(data: TokenDataset) -> str:
    if not data.classes:
        return ", not labelled"
    if data.task == "binary":
        return f"; positive class: {data.classes[1]}"
    if data.task == "regression":
        return f" of {', '.join(data.classes)}"
    return f", {len(data.classes)} {'labels' if data.task == 'multilabel' else 'classes'}"


def _per_split(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[s]} {s}" for s in SPLITS)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
