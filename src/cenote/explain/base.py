"""What every explanation of a model's output gives, and what every explainer takes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError, files
from cenote.explain.saliency_verbalization.verbalizer import SaliencyVerbalizer, Verbalized

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
        texts: of the real units of each input, in their order; `named` gives them.
    """

    scores: Float[Tensor, "batch units"]
    mask: Bool[Tensor, "batch units"]
    units: str = "tokens"
    target: Int[Tensor, "batch"] | None = None
    signed: bool = False
    completeness_error: Float[Tensor, "batch"] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.scores.shape != self.mask.shape:
            raise InputError(f"mask: expected {list(self.scores.shape)} as the scores, got {list(self.mask.shape)}")
        if not bool(self.scores.isfinite().all()):
            raise InputError("scores: hold NaN or infinity")
        if bool((self.scores.masked_fill(self.mask, 0.0) != 0).any()):
            raise InputError("scores: are not zero where units are padding")
        counts = self.mask.sum(1).tolist()
        if self.texts is not None and [len(t) for t in self.texts] != counts:
            raise InputError(
                f"texts: expected as many as there are real units, {counts}, got {[len(t) for t in self.texts]}"
            )

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

    def named(self, texts: Sequence[Sequence[str]]) -> Self:
        """The same with the texts of its real units.

        Args:
            texts: of each input; of tokens, what begins with a space begins a word, as `cenote.models.words` has them.
        """
        return replace(self, texts=tuple(tuple(t) for t in texts))

    def words(self) -> Self:
        """The same for whole words: a word's score is the sum over its tokens, of which the first begins with a space.

        >>> one = Attribution(torch.tensor([[0.1, 0.5, 0.2]]), torch.ones(1, 3, dtype=torch.bool))
        >>> found = one.named([[" it", " sing", "s"]]).words()
        >>> found.texts, [round(s, 1) for s in found.scores[0].tolist()]
        ((('it', 'sings'),), [0.1, 0.7])
        """
        if self.texts is None:
            raise InputError("texts: words are made of the texts of tokens, and there are none; give them with named")
        if self.units != "tokens":
            raise InputError(f"units: words are made of tokens, and these are {self.units}")
        begins = [[not n or t[:1].isspace() for n, t in enumerate(of)] for of in self.texts]
        most = max(1, *(sum(b) for b in begins)) if begins else 1
        scores, mask = self.scores.new_zeros(len(begins), most), self.mask.new_zeros(len(begins), most)
        texts: list[tuple[str, ...]] = []
        for item, (of, starts) in enumerate(zip(self.texts, begins, strict=True)):
            number = torch.tensor(starts, dtype=torch.long, device=scores.device).cumsum(0) - 1
            scores[item].index_add_(0, number, self.scores[item, self.mask[item]])
            mask[item, : sum(starts)] = True
            words = [""] * sum(starts)
            for at, text in zip(number.tolist(), of, strict=True):
                words[at] += text.strip()
            texts.append(tuple(words))
        return replace(self, scores=scores, mask=mask, units="words", texts=tuple(texts))

    def sentence(self, item: int = 0, labels: Sequence[str] | None = None, **settings: Any) -> str:
        """Which words matter, in words: what `verbalized` sums up.

        >>> one = Attribution(torch.tensor([[0.0, 0.9, 0.1]]), torch.ones(1, 3, dtype=torch.bool))
        >>> one.named([[" so", " thin", " indeed"]]).sentence()
        'The word » thin « is most important for the prediction.'
        """
        return self.verbalized(item, labels, **settings).summary

    def verbalized(self, item: int = 0, labels: Sequence[str] | None = None, **settings: Any) -> Verbalized:
        """Sentences about the words, or tokens, of one input.

        Args:
            item: its number.
            labels: names of the classes; the target's is named.
            settings: of `SaliencyVerbalizer`.

        Raises:
            InputError: where the texts of the units are not known.
        """
        if self.texts is None:
            raise InputError(
                "texts: sentences are made of the texts of units, and there are none; give them with named"
            )
        if not 0 <= item < len(self.texts):
            raise InputError(f"item: expected below {len(self.texts)}, got {item}")
        predicted = None if labels is None or self.target is None else labels[int(self.target[item])]
        return SaliencyVerbalizer(**settings).verbalize(
            self.texts[item], self.scores[item, self.mask[item]].tolist(), predicted
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {"scores": self.scores, "mask": self.mask}
        tensors |= {n: t for n in ("target", "completeness_error") if (t := getattr(self, n)) is not None}
        card = {"format": FORMAT, "units": self.units, "signed": self.signed, "texts": self.texts}
        files.write_tensors(Path(path), tensors, {"attribution": json.dumps(card)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: naming the file, where it is none of these.
        """
        try:
            stored = files.read_tensors(Path(path))
            card = json.loads(stored.metadata["attribution"])
            texts, tensors = card.get("texts"), dict[str, Any](stored.tensors)
            found = cls(**tensors, units=card["units"], signed=card["signed"])
            found = found if texts is None else found.named(texts)
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except Exception as error:
            raise InputError(f"{path}: is no attribution ({error})") from None
        files.require_format(Path(path), card, FORMAT)
        return found

    def _with(self, scores: Tensor) -> Self:
        return replace(self, scores=scores)


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
