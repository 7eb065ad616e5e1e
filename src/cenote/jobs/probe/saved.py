"""A trained probe in a folder that says how to rebuild it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import cenote.core.files as files
from cenote.catalog import create, method
from cenote.core import Bags, InputError
from cenote.core.json_text import json_text
from cenote.core.requirements import require_one_of
from cenote.core.seeded import seeded
from cenote.features.dataset import Task, TokenDataset
from cenote.features.origin import Origin
from cenote.jobs.probe.arms import Column
from cenote.jobs.probe.module import Probe, sized_arguments
from cenote.jobs.probe.own import OwnMethod, rebuilding
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
    "origin": (dict, type(None)),
    "unbuildable": (str, type(None)),
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
        origin: which model made the tokens that it was trained on, where that was known.
    """

    probe: Probe
    method: str
    task: Task
    classes: tuple[str, ...]
    dim: int
    prefix_tokens: int
    layers: tuple[int, ...] = ()
    origin: Origin | None = None

    def view(self, data: TokenDataset, force: bool = False) -> TokenDataset:
        """New data as the probe reads them: its layer, its stack of layers, or its graphs.

        Args:
            data: as they were read, with all their layers.
            force: take tokens that are told to be others than those of the training: of another model, of other settings, or
                of the only layer that is there, where the probe reads one.

        Raises:
            InputError: where the data do not hold what the probe reads.
        """
        if isinstance(self.probe.pool, GraphPool):
            data = data.with_edges()
        self.require(data.origin, data.dim, force)
        if isinstance(self.probe.pool, GraphPool):
            return data
        held, one = data.layers, len(self.layers) == 1
        if not self.layers or (one and (held == () or (force and len(held) == 1))):
            return data
        if missing := [n for n in self.layers if n not in held]:
            raise InputError(self._lacking(missing, data))
        return data.at(self.layers[0]) if one else data.only(self.layers)

    def require(self, origin: Origin | None, dim: int, force: bool = False) -> None:
        """That tokens of such an origin and width are those that the probe was trained on, as far as can be told.

        Raises:
            InputError: naming what is other.
        """
        if dim != self.dim:
            raise InputError(f"data: its tokens have width {dim}, but the probe takes {self.dim}{self._of_model()}")
        if force or origin is None or self.origin is None:
            return
        if found := self.origin.differences(origin, "in training", "now"):
            same = self.origin.name == origin.name
            raise InputError(
                f"data: the probe was trained on tokens of {self.origin.name}, and these are "
                f"{'other tokens' if same else f'tokens of {origin.name}'} ({'; '.join(found)}); give raw data, or "
                f"{self._extraction()}, or go on all the same with --force"
            )

    def _of_model(self) -> str:
        return "" if self.origin is None else f" of {self.origin.name}; give raw data, or {self._extraction()}"

    def _extraction(self) -> str:
        """What makes tokens that the probe reads, in words."""
        name = "MODEL" if self.origin is None else self.origin.name
        layers = f" --layers {','.join(map(str, self.layers))}" if self.layers else ""
        pooled = self.origin.pooled if self.origin is not None else None
        return f"extract with: cenote extract --backbone {name}{layers}" + (
            f" --pool-at-extract {pooled}" if pooled else ""
        )

    def _lacking(self, missing: list[int], data: TokenDataset) -> str:
        reads = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {', '.join(map(str, self.layers))}"
        holds = ", ".join(map(str, data.layers)) or "one, without a number"
        forced = ", or go on with its one layer with --force" if len(self.layers) == 1 == len(data.layers) else ""
        remedy = self._extraction() if data.origin is not None or self.origin is not None else "add them"
        return (
            f"data: the probe reads {reads}, and {missing} are not there: {data.name} holds {holds}; {remedy}{forced}"
        )

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


def save_probe(folder: Path, comparison: Comparison, column: Column, probe: Probe) -> str | None:
    """Write the probe of a method as `probe.safetensors` beside `probe.json`: why it cannot be rebuilt from these, if so."""
    pool, data = probe.pool, column.data
    result = comparison[column.name]
    method, why = column.method.name, None
    if isinstance(column.method, OwnMethod):
        method, arguments, why = rebuilding(pool, column.name, data.dim)
    else:
        arguments = sized_arguments(method, data)
    card = {
        "format": FORMAT,
        "method": method,
        "arguments": arguments,
        "unbuildable": why,
        "layers": list(column.layers),
        "dim": data.dim,
        "outputs": data.outputs,
        "prefix_tokens": data.prefix_tokens,
        "task": data.task,
        "classes": list(data.classes),
        "origin": None if data.origin is None else dataclasses.asdict(data.origin),
        "metric": {"name": comparison.metric_name, "test": result.metric, "interval": result.interval},
        "trained_on": comparison.provenance.get("data_sha256"),
        "versions": comparison.provenance.get("versions"),
        "pool": type(pool).__name__,
    }
    files.write_saved(folder / "probe.json", folder / "probe.safetensors", card, probe.state_dict())
    return why


def by_hand(folder: Path) -> str:
    """How a probe is loaded whose pool its folder cannot build, in words."""
    return f"build the pool yourself, and load it with cenote.load({str(folder)!r}, pool=...)"


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


def load(folder: str | Path, pool: nn.Module | None = None) -> SavedProbe:
    """Rebuild the probe that `cenote probe` left in `OUT/best` or `OUT/recommended`.

    Args:
        folder: holds `probe.json` and `probe.safetensors`; or, where the recommended method is the winner, only a
            `probe.json` that names the folder beside it.
        pool: of the same class and settings as the saved one, which takes its weights; needed where the folder cannot say how
            the pool is built.

    Raises:
        InputError: naming the folder and what is wrong with it.
    """
    folder = Path(folder)
    try:
        if folder.name != BEST and _same_as(folder) == BEST:
            return load(folder.resolve().parent / BEST, pool)
        # cards of before do not speak of several layers, nor of the model
        card, state = files.read_saved(
            folder / "probe.json",
            folder / "probe.safetensors",
            AGAIN,
            optional=("layers", "origin", "unbuildable"),
            **FIELDS,
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
    try:
        origin = None if card.get("origin") is None else Origin.read(card["origin"])
    except ValueError as error:
        raise InputError(f"{folder}: probe.json: {error}; {AGAIN}") from None
    if not all(type(n) is int for n in layers) or not all(isinstance(name, str) for name in card["classes"]):
        raise InputError(f"{folder}: probe.json: expected classes as texts and layers as numbers; {AGAIN}")
    named = 2 if card["task"] == "binary" else card["outputs"]
    if len(card["classes"]) != named:
        raise InputError(f"{folder}: probe.json names {len(card['classes'])} classes, expected {named}; {AGAIN}")
    if pool is None and card.get("unbuildable") is not None:
        raise InputError(f"{folder}: {card['unbuildable']}, so that its folder cannot say how; {by_hand(folder)}")
    if pool is None and "." in card["method"]:
        method(card["method"])  # told as it is, where its module is not imported
    try:
        with seeded(0):
            made: Any = pool
            if made is None:
                made = create(card["method"], **{**card["arguments"], "dim": card["dim"]})
            probe = Probe(copy.deepcopy(made), card["outputs"], card["prefix_tokens"])
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
        origin,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
