"""Finished cells on disk: one file per method holds its predictions, its probes and its numbers.

A cell is believed only if it is whole and its key matches: same data, same method and settings, same recipe, seeds and code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import cenote.core.files as files
from cenote.jobs.probe.module import Probe
from cenote.jobs.probe.recipe import Recipe


@dataclass(frozen=True)
class Cell:
    """One method, trained and measured.

    Attributes:
        method: its name.
        record: numbers for `MethodResult` that need no bootstrap.
        scores: test logits, `[seeds, items, outputs]`.
        states: one `state_dict` of the probe per seed.
    """

    method: str
    record: dict[str, Any]
    scores: Float[Tensor, "seeds items outputs"]
    states: tuple[dict[str, Tensor], ...]

    def probe(self, build: Callable[[], Probe], seed_number: int) -> Probe:
        """The trained probe of one seed."""
        probe = build()
        probe.load_state_dict(self.states[seed_number])
        return probe.eval()


def cell_key(
    fingerprint: str,
    method: str,
    settings: dict[str, Any],
    recipe: Recipe,
    seeds: tuple[int, ...],
    metric: str,
    version: str,
) -> str:
    """Text that changes whenever the cell's content would."""
    parts = {
        "data": fingerprint,
        "method": method,
        "settings": settings,
        "recipe": dataclasses.asdict(recipe),
        "seeds": seeds,
        "metric": metric,
        "cenote": version,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_cell(path: Path, key: str, cell: Cell) -> None:
    """Write a cell in one step."""
    tensors = {"scores": cell.scores.contiguous()}
    for s, state in enumerate(cell.states):
        tensors |= {f"state.{s}.{name}": value.contiguous() for name, value in state.items()}
    digest = _digest(tensors)
    metadata = {"key": key, "method": cell.method, "record": json.dumps(cell.record), "digest": digest}
    files.write_whole(path, save(tensors, metadata=metadata))


def load_cell(path: Path, key: str) -> Cell | None:
    """The cell, or `None` where there is none, it is damaged, or it answers another question."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        record = json.loads(metadata["record"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if metadata.get("digest") != _digest(tensors):
        return None
    scores = tensors.pop("scores")
    states: list[dict[str, Tensor]] = [{} for _ in range(scores.shape[0])]
    for name, value in tensors.items():
        _, s, parameter = name.split(".", 2)
        states[int(s)][parameter] = value
    return Cell(metadata["method"], record, scores, tuple(states))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
