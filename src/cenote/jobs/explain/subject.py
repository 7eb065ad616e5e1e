"""What is audited: a model and its items, and how parts of an item are taken away. A model of your own needs a few lines."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.redrawn import redrawn
from cenote.explain.base import Attribution
from cenote.explain.embedded import output_of


class Subject(ABC):
    """A classifier and items in whose parts an explanation is sought.

    The smallest parts are called tokens; larger units (words, squares of patches) are made of them. A token of no unit ([CLS])
    always stays.

    Attributes:
        model: what explainers are given.
        names: of the items.
        labels: of the classes.
        sizes: what units are called -> the unit of each token, `[items, tokens]`, -1 of none and of padding; of two sizes at
            least, and the first one decides the ranking.
        fills: what stands for what is taken away, by name; two at least, and the first one decides.
        kind: what an item is.
        settings: arguments that explainers are made with, where they take them.
        inside: which share of each unit of the first size is known to be what the item is about; `None` where nobody told.
    """

    model: nn.Module
    names: tuple[str, ...]
    labels: tuple[str, ...]
    sizes: Mapping[str, Int[Tensor, "items tokens"]]
    fills: tuple[str, ...]
    kind: str = "items"
    settings: Mapping[str, Any] = {}
    inside: Float[Tensor, "items units"] | None = None

    @abstractmethod
    def inputs(self, item: int) -> dict[str, Any]:
        """One item as the model takes it, a batch of one without padding."""

    @abstractmethod
    def outputs(
        self, items: Int[Tensor, "rows"], keep: Bool[Tensor, "rows tokens"], fill: str
    ) -> Float[Tensor, "rows classes"]:
        """Logits of items of which only some tokens are kept."""

    @abstractmethod
    def hints(self) -> dict[str, Float[Tensor, "items tokens"]]:
        """Scores that hang on no model, or on its first layer alone: the controls."""

    @abstractmethod
    def words(self, item: int) -> list[str]:
        """What its units of the first size are, for people."""

    @abstractmethod
    def content(self) -> list[Shaped[Tensor, "..."]]:
        """All that tells these items from others."""

    def scores(self, item: int, found: Attribution) -> Float[Tensor, "tokens"]:  # noqa: ARG002 - some need it
        """An explainer's scores of one item, a number per token.

        Raises:
            InputError: where they are of something else.
        """
        own = found.scores[0]
        if len(own) != self.tokens:
            own = nn.functional.pad(own, (0, max(0, self.tokens - len(own))))
        if len(own) != self.tokens:
            raise InputError(f"expected scores of {self.tokens} tokens, got {len(own)} {found.units}")
        return own

    def picture(self, item: int) -> bytes | None:  # noqa: ARG002 - most items are none
        """A PNG file of the item, where it is an image."""
        return None

    @property
    def tokens(self) -> int:
        """Of the longest item."""
        return next(iter(self.sizes.values())).shape[1]

    def with_weights_redrawn(self, seed: int) -> Self:
        """The same with other weights in the model."""
        other = copy.copy(self)
        other.model = redrawn(self.model, seed).eval()
        return other

    def fingerprint(self) -> str:
        """Of weights and items."""
        digest = hashlib.sha256("\n".join([type(self).__qualname__, *self.names, *self.labels, *self.fills]).encode())
        for tensor in (*self.model.state_dict().values(), *self.sizes.values(), *self.content()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Vectors(Subject):
    """Sets of vectors and a model of them: `model(x=[batch, tokens, dim], attention_mask=[batch, tokens])` gives logits.

    What is taken away becomes the mean vector of all items, or zero.

    Args:
        model: any module or function of such arguments.
        x: the items.
        mask: True = a real token; default: all are.
        labels: of the classes; default: their numbers.
        names: of the items; default: their numbers.

    Example:
        >>> x = torch.randn(6, 4, 3)
        >>> subject = Vectors(lambda x, attention_mask: x.sum(1), x)
        >>> subject.outputs(torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool), "mean").shape
        torch.Size([1, 3])
    """

    fills = ("mean", "zero")
    kind = "sets"

    def __init__(
        self,
        model: Any,
        x: Float[Tensor, "items tokens dim"],
        mask: Bool[Tensor, "items tokens"] | None = None,
        labels: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.model = model if isinstance(model, nn.Module) else _Called(model)
        self.x = x
        self.mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        self.names = tuple(names) if names is not None else tuple(f"item {i}" for i in range(len(x)))
        number = torch.arange(x.shape[1]).expand(x.shape[:2])
        self.sizes = {"tokens": number.masked_fill(~self.mask, -1), "pairs": (number // 2).masked_fill(~self.mask, -1)}
        self.centre = x[self.mask].mean(0)
        with torch.no_grad():
            count = output_of(self.model(**self.inputs(0))).shape[1]
        self.labels = tuple(labels) if labels is not None else tuple(map(str, range(count)))
        if len(self.labels) != count:
            raise InputError(f"labels: expected {count}, as the model has outputs, got {len(self.labels)}")

    def inputs(self, item: int) -> dict[str, Any]:
        real = self.mask[item : item + 1]
        return {"x": self.x[item : item + 1, real[0]], "attention_mask": real[:, real[0]].long()}

    def scores(self, item: int, found: Attribution) -> Float[Tensor, "tokens"]:
        """Back at the places that they are from."""
        made = found.scores.new_zeros(self.tokens)
        made[self.mask[item]] = found.scores[0]
        return made

    def outputs(
        self, items: Int[Tensor, "rows"], keep: Bool[Tensor, "rows tokens"], fill: str
    ) -> Float[Tensor, "rows classes"]:
        other = self.centre if fill == "mean" else torch.zeros_like(self.centre)
        x = torch.where(keep[..., None], self.x[items], other)
        return output_of(self.model(x=x, attention_mask=self.mask[items].long()))

    def hints(self) -> dict[str, Float[Tensor, "items tokens"]]:
        return {"position": from_the_first(self.mask), "vector-norm": self.x.norm(dim=2) * self.mask}

    def words(self, item: int) -> list[str]:
        return [f"token {i}" for i in self.mask[item].nonzero()[:, 0].tolist()]

    def content(self) -> list[Shaped[Tensor, "..."]]:
        return [self.x, self.mask]


class _Called(nn.Module):
    """A function as a module; it has no weights that could be drawn anew."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, **inputs: Any) -> Any:
        return self.function(**inputs)


def from_the_first(mask: Bool[Tensor, "items tokens"]) -> Float[Tensor, "items tokens"]:
    """The earlier, the more: the habit of many texts and models.

    >>> from_the_first(torch.tensor([[False, True, True]])).tolist()
    [[0.0, 1.0, 0.5]]
    """
    place = mask.long().cumsum(1).clamp(min=1)
    return mask / place
