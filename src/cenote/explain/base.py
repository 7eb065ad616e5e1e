"""What every explanation of a model's output gives, and what every explainer takes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cenote.core import InputError, files

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Attribution:
    """A score for each unit of each input.

    Attributes:
        scores: zeros where a unit is padding.
        mask: True = a real unit.
        units: what is scored: `"tokens"`, `"words"`, `"patches"`, `"pixels"`.
        target: what was explained, one number per input; `None` of an explanation that speaks of no output in particular.
        signed: whether scores below zero speak against the target.
        completeness_error: by how much the scores fail to sum to what they should, per input; `None` where nothing is promised.
    """

    scores: Float[Tensor, "batch units"]
    mask: Bool[Tensor, "batch units"]
    units: str = "tokens"
    target: Int[Tensor, "batch"] | None = None
    signed: bool = False
    completeness_error: Float[Tensor, "batch"] | None = None

    def __post_init__(self) -> None:
        if self.scores.shape != self.mask.shape:
            raise InputError(f"mask: expected {list(self.scores.shape)} as the scores, got {list(self.mask.shape)}")
        if not bool(self.scores.isfinite().all()):
            raise InputError("scores: hold NaN or infinity")
        if bool((self.scores.masked_fill(self.mask, 0.0) != 0).any()):
            raise InputError("scores: are not zero where units are padding")

    def normalised(self) -> Self:
        """The same with absolute scores that sum to one; all zero stays so."""
        total = self.scores.abs().sum(1, keepdim=True)
        return self._with(self.scores / total.masked_fill(total == 0, 1.0))

    def top(self, k: int) -> Int[Tensor, "batch k"]:
        """The units of each input with the largest scores, first ones first among equals; -1 behind the last real unit.

        >>> Attribution(torch.tensor([[0.1, 0.7, 0.0]]), torch.tensor([[True, True, False]])).top(3).tolist()
        [[1, 0, -1]]
        """
        if k < 1:
            raise InputError(f"k: expected at least 1, got {k}")
        order = self.scores.masked_fill(~self.mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        real = self.mask.gather(1, order)
        found = order.masked_fill(~real, -1)[:, :k]
        return nn.functional.pad(found, (0, k - found.shape[1]), value=-1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"scores": self.scores.contiguous(), "mask": self.mask.contiguous()}
        tensors |= {n: t for n in ("target", "completeness_error") if (t := getattr(self, n)) is not None}
        card = {"format": FORMAT, "units": self.units, "signed": self.signed}
        files.write_whole(Path(path), save(tensors, metadata={"attribution": json.dumps(card)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: naming the file, where it is none of these.
        """
        try:
            with safe_open(str(path), "pt") as file:
                card = json.loads((file.metadata() or {})["attribution"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(**tensors, units=card["units"], signed=card["signed"])
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except Exception as error:
            raise InputError(f"{path}: is no attribution ({error})") from None
        files.require_format(Path(path), card, FORMAT)
        return found

    def _with(self, scores: Tensor) -> Self:
        return type(self)(scores, self.mask, self.units, self.target, self.signed, self.completeness_error)


class Explainer(ABC):
    """From a model and inputs to a score per unit.

    An explainer leaves the model as it was: parameters, buffers, hooks, `training`, `requires_grad`, attention implementation;
    it does not touch global random generators. `cenote.testing.check_explainer` holds it to that.

    Attributes:
        class_agnostic: whether it says the same of every target.
        family: what it reads, for comparisons: `attention`, `gradients`, `perturbation`, `decomposition`.
        draws: whether its scores hang on a `random_state`.
    """

    class_agnostic: ClassVar[bool] = False
    family: str = "other"
    draws: bool = False

    @abstractmethod
    def explain(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Int[Tensor, "batch"] | None = None
    ) -> Attribution:
        """Explain.

        Args:
            model: in eval mode.
            inputs: of its forward, a batch; an `attention_mask` `[batch, tokens]` says what is padding.
            target: the outputs that are explained, `[batch]`; the model's own choice by default.

        Raises:
            InputError: before any long work, where the model or the inputs are not what it can explain.
        """
