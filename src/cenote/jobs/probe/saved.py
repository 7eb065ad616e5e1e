"""A trained probe in a folder that says how to rebuild it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import cenote.core.files as files
from cenote.catalog import create, method
from cenote.core import Bags, InputError
from cenote.core.json_text import json_text
from cenote.core.requirements import require_one_of
from cenote.core.seeded import seeded
from cenote.features.dataset import Task, TokenDataset
from cenote.jobs.probe.arms import Column
from cenote.jobs.probe.module import Probe, sized_arguments
from cenote.jobs.probe.result import Comparison
from cenote.pool.base import Pooled
from cenote.pool.graph.base import GraphPool

FORMAT = 1
AGAIN = "run cenote probe again"
FIELDS: dict[str, Any] = {
    "format": int,
    "method": str,
    "arguments": dict,
    "dim": int,
    "outputs": int,
    "prefix_tokens": int,
    "task": str,
    "classes": list,
    "layers": list,
}
"""What `probe.json` must say to build a probe again."""

BEST, RECOMMENDED = "best", "recommended"
"""Folders of the winner's probe and of the recommended method's, beside each other."""


@dataclass(frozen=True)
class SavedProbe:
    """A trained probe with the names of its outputs.

    Attributes:
        probe: the module, in eval mode.
        method: name of its pool.
        task: what it was trained for.
        classes: names of its classes, labels or targets.
        dim: width of the tokens that it takes.
        prefix_tokens: leading tokens of its data that are not patches.
        layers: numbers of the layers that it reads, of data that number them: one for a pool of tokens.
    """

    probe: Probe
    method: str
    task: Task
    classes: tuple[str, ...]
    dim: int
    prefix_tokens: int
    layers: tuple[int, ...] = ()

    def view(self, data: TokenDataset) -> TokenDataset:
        """New data as the probe reads them: its layer, its stack of layers, or its graphs.

        Raises:
            InputError: where the data do not hold them.
        """
        if isinstance(self.probe.pool, GraphPool):
            return data.with_edges()
        held = data.layers
        if not self.layers or (held == () and len(self.layers) == 1):
            return data
        missing = [n for n in self.layers if n not in held]
        if missing:
            raise InputError(
                f"data: the probe reads layers {', '.join(map(str, self.layers))}, and {missing} are not there"
            )
        return data.at(self.layers[0]) if len(self.layers) == 1 else data.only(self.layers)

    @torch.no_grad()
    def scores(
        self, x: Float[Tensor, "batch tokens dim"] | Bags, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Probabilities of the classes or labels (binary: of both classes); targets of a regression."""
        logits = self.probe(x, mask)
        if self.task == "multiclass":
            return logits.softmax(-1)
        if self.task == "binary":
            p = logits.sigmoid()
            return torch.cat([1 - p, p], -1)
        return logits.sigmoid() if self.task == "multilabel" else logits

    def word(self, scores: Float[Tensor, "outputs"]) -> str:
        """One item's scores as a prediction in words: class, labels separated by `;`, or numbers."""
        if self.task in ("binary", "multiclass"):
            return self.classes[int(scores.argmax())]
        if self.task == "multilabel":
            return ";".join(c for c, s in zip(self.classes, scores.tolist(), strict=True) if s > 0.5)
        return ";".join(f"{s:.6g}" for s in scores.tolist())

    @torch.no_grad()
    def attend(
        self, x: Float[Tensor, "batch tokens dim"] | Bags, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Pooled:
        """The pooled vectors and what they took from each token that the pool is shown (prefix dropped where it drops it)."""
        return self.probe.attend(x, mask)


def save_probe(folder: Path, comparison: Comparison, column: Column, probe: Probe) -> None:
    """Write the probe of a method as `probe.safetensors` beside `probe.json`."""
    pool, data = probe.pool, column.data
    result = comparison[column.name]
    card = {
        "format": FORMAT,
        "method": column.method.name,
        "arguments": sized_arguments(column.method.name, data),
        "layers": list(column.layers),
        "dim": data.dim,
        "outputs": data.outputs,
        "prefix_tokens": data.prefix_tokens,
        "task": data.task,
        "classes": list(data.classes),
        "metric": {"name": comparison.metric_name, "test": result.metric, "interval": result.interval},
        "trained_on": comparison.provenance.get("data_sha256"),
        "versions": comparison.provenance.get("versions"),
        "pool": type(pool).__name__,
    }
    files.write_saved(folder / "probe.json", folder / "probe.safetensors", card, probe.state_dict())


def save_same(folder: Path, other: str) -> None:
    """Write that the probe of a folder is the one of another folder beside it, where `load` finds it."""
    (folder / "probe.safetensors").unlink(missing_ok=True)
    files.write_whole(folder / "probe.json", json_text(files.sealed({"format": FORMAT, "same_as": other}), indent=1))


def _same_as(folder: Path) -> str | None:
    """Of a folder that only says whose probe it has."""
    try:
        card = files.read_json(folder / "probe.json")
    except (OSError, ValueError):
        return None
    same = card.get("same_as") if isinstance(card, dict) else None
    return same if isinstance(same, str) else None


def load(folder: str | Path) -> SavedProbe:
    """Rebuild the probe that `cenote probe` left in `OUT/best` or `OUT/recommended`.

    Args:
        folder: holds `probe.json` and `probe.safetensors`; or, where the recommended method is the winner, only a
            `probe.json` that names the folder beside it.

    Raises:
        InputError: naming the folder and what is wrong with it.
    """
    folder = Path(folder)
    try:
        if folder.name != BEST and _same_as(folder) == BEST:
            return load(folder.resolve().parent / BEST)
        # cards of before there were several layers do not speak of them
        card, state = files.read_saved(
            folder / "probe.json", folder / "probe.safetensors", AGAIN, optional=("layers",), **FIELDS
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: holds no saved probe ({Path(error.filename).name} is missing); name OUT/best or OUT/recommended"
        ) from None
    except OSError as error:
        raise InputError(f"{folder}: the saved probe cannot be read ({error}); {AGAIN}") from None
    files.require_format(folder, card, FORMAT)
    require_one_of(get_args(Task), task=card["task"])
    layers = card.get("layers", [])
    if not all(type(n) is int for n in layers) or not all(isinstance(name, str) for name in card["classes"]):
        raise InputError(f"{folder}: probe.json: expected classes as texts and layers as numbers; {AGAIN}")
    named = 2 if card["task"] == "binary" else card["outputs"]
    if len(card["classes"]) != named:
        raise InputError(f"{folder}: probe.json names {len(card['classes'])} classes, expected {named}; {AGAIN}")
    if "." in card["method"]:
        method(card["method"])  # told as it is, where its module is not imported
    try:
        with seeded(0):
            pool = create(card["method"], **{**card["arguments"], "dim": card["dim"]})
            probe = Probe(pool, card["outputs"], card["prefix_tokens"])
        probe.load_state_dict(state)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: probe.safetensors does not fit probe.json ({_line(error)}); {AGAIN}") from None
    return SavedProbe(
        probe.eval(),
        card["method"],
        card["task"],
        tuple(card["classes"]),
        card["dim"],
        card["prefix_tokens"],
        tuple(layers),
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
