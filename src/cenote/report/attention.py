"""Reading what the probes looked at: `attention.json` and `attention.safetensors` of an output folder."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

import cenote.core.files as files
from cenote.core import InputError


@dataclass(frozen=True)
class Item:
    """One sampled test item.

    Attributes:
        id, label: as in the data.
        tokens: how many, prefix left out.
        image: PNG file, where the data have pictures.
        predictions: method -> what its first seed says.
        words: per token what it stands for, where it is part of a text; one that begins with a space begins a word.
        unread: why the words of a text are not known.
        unpictured: why the image is not shown, where the data have pictures.
        labelled: per token whether it carries a label (instance labels), where known.
    """

    id: str
    label: str
    tokens: int
    image: bytes | None = None
    predictions: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] | None = None
    unread: str = ""
    unpictured: str = ""
    labelled: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Attention:
    """Weights of every method on the sampled items.

    Attributes:
        items: the samples.
        grid: `(height, width)` of the patches, where they form one.
        weights: (method, number of the item) -> non-negative weights of its tokens, prefix left out; methods without
            weights are missing.
    """

    items: tuple[Item, ...]
    grid: tuple[int, int] | None
    weights: dict[tuple[str, int], Float[ndarray, "heads tokens"]]

    @classmethod
    def load(cls, out: Path) -> Attention | None:
        """Read both files of a folder; `None` where the run left none.

        Raises:
            InputError: a file is damaged, or one of the two is missing.
        """
        words, numbers = Path(out) / "attention.json", Path(out) / "attention.safetensors"
        if not words.exists() and not numbers.exists():
            return None
        for path in (words, numbers):
            if not path.exists():
                raise InputError(f"out: {path} is missing beside its partner; {_REMEDY}")
        try:
            raw = files.opened(files.read_json(words), words)
            labelled = raw.get("token_labels") or [None] * len(raw["items"])
            items = tuple(_item(r, marks) for r, marks in zip(raw["items"], labelled, strict=True))
            grid = None if raw["grid"] is None else (int(raw["grid"][0]), int(raw["grid"][1]))
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError) as error:
            raise InputError(f"out: {words} cannot be read ({_said(error)}); {_REMEDY}") from error
        try:
            weights = {
                _place(name): tensor.float().numpy() for name, tensor in files.tensors_of(raw, words, numbers).items()
            }
        except (ValueError, OSError) as error:
            raise InputError(f"out: {numbers} cannot be read ({_said(error)}); {_REMEDY}") from error
        for (method, i), w in weights.items():
            if w.ndim != 2 or not 0 <= i < len(items):
                raise InputError(f"out: {numbers} has weights of shape {w.shape} for {method}/{i}; {_REMEDY}")
        return cls(items, grid, weights)


_REMEDY = "run cenote probe with this --out again, or delete attention.json and attention.safetensors"


def _item(raw: dict[str, Any], marks: list[float] | None) -> Item:
    tokens = int(raw["tokens"])
    image, words = raw.get("image"), raw.get("words")
    if words is not None and len(words) != tokens:
        raise ValueError(f"{len(words)} words for {tokens} tokens")
    return Item(
        id=str(raw["id"]),
        label=str(raw["label"]),
        tokens=tokens,
        image=None if image is None else base64.b64decode(image, validate=True),
        predictions={str(k): str(v) for k, v in raw.get("predictions", {}).items()},
        words=None if words is None else tuple(map(str, words)),
        unread=str(raw.get("unread", "")),
        unpictured=str(raw.get("unpictured", "")),
        labelled=None if marks is None else tuple(bool(m) for m in marks[len(marks) - tokens :]),
    )


def _place(name: str) -> tuple[str, int]:
    method, _, number = name.rpartition("/")
    return method, int(number)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
