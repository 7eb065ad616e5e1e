"""A text model's token states as vectors of late interaction."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.models.base import Backbone
from cenote.models.text import TextBackbone

TEXTS_AT_ONCE = 32
MARKS = "\u0120\u2581\u010a"
"""What tokenizers write for a space or the end of a line before a piece."""


class TokenEncoder:
    """Unit-norm vectors of a text's tokens: states of a text model, padding left out.

    Args:
        backbone: a text model.
        layer: hidden state; default: the model's output.
        punctuation: whether documents keep the vectors of punctuation, which ColBERT leaves out; queries always do.

    Attributes:
        protect: leading vectors of a document, [CLS] and the like, that reductions leave as they are.

    Raises:
        InputError: where it is no text model, has no such layer, or gives one vector for a text.
    """

    def __init__(self, backbone: Backbone, layer: int | None = None, punctuation: bool = False) -> None:
        layout = backbone.layout
        if not isinstance(backbone, TextBackbone):
            raise InputError(f"model: {backbone.identity.name} takes {layout.kind}; name a text model")
        if layer is not None and not -layout.blocks - 1 <= layer <= layout.blocks:
            raise InputError(f"layer: {backbone.identity.name} has hidden states 0 to {layout.blocks}, got {layer}")
        self.layer = layer if layer is None else layer % (layout.blocks + 1)
        state = layout.blocks if self.layer is None else self.layer
        if layout.tokens[state] < 2:
            raise InputError(
                f"model: {backbone.identity.name} gives one vector for a text; late interaction needs one for each token"
            )
        self.backbone, self.punctuation = backbone, punctuation
        self.name, self.weights = backbone.identity.name, backbone.identity.weights_sha256
        self.width, self.protect = layout.dims[state], layout.prefix_tokens
        self.max_length: int | None = backbone.max_length
        self._skipped: dict[int, bool] = {}

    def documents(self, texts: Sequence[str]) -> Bags:
        """Vectors of documents, in the order of the texts."""
        return self._encoded(texts, self.punctuation)

    def queries(self, texts: Sequence[str]) -> Bags:
        """Vectors of queries."""
        return self._encoded(texts, True)

    def words(self, text: str) -> list[str]:
        """The pieces that the vectors of a document stand for."""
        pieces = self._backbone.words(text)
        return pieces if self.punctuation else [p for p in pieces if not is_punctuation(p)]

    @property
    def _backbone(self) -> TextBackbone:
        assert isinstance(self.backbone, TextBackbone)
        return self.backbone

    def _encoded(self, texts: Sequence[str], punctuation: bool) -> Bags:
        # texts of like length together, so that little is padded
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), TEXTS_AT_ONCE):
            chosen = order[start : start + TEXTS_AT_ONCE]
            found |= dict(zip(chosen, self._batch([texts[i] for i in chosen], punctuation), strict=True))
        if not found:
            raise InputError("texts: expected at least one, got none")
        return Bags.from_list([found[i] for i in range(len(texts))])

    def _batch(self, texts: list[str], punctuation: bool) -> list[Tensor]:
        state = self.backbone.layout.blocks if self.layer is None else self.layer
        prepared = self.backbone.prepare(texts)
        states = self.backbone.states(prepared, (state,))
        x = states.layers[state].float().cpu()
        real = torch.ones(x.shape[:2], dtype=torch.bool) if states.mask is None else states.mask.cpu()
        if not punctuation:
            ids = prepared.inputs["input_ids"].cpu()
            marks = torch.tensor([[self._is_mark(i) for i in row] for row in ids.tolist()])
            kept = real & ~marks
            # a text of nothing but punctuation is told by that
            real = torch.where(kept.any(1, keepdim=True), kept, real)
        return [torch.nn.functional.normalize(row[own], dim=1) for row, own in zip(x, real, strict=True)]

    def _is_mark(self, number: int) -> bool:
        if number not in self._skipped:
            tokenizer: Any = self._backbone.tokenizer
            piece = str(tokenizer.convert_ids_to_tokens(number))
            self._skipped[number] = number not in tokenizer.all_special_ids and is_punctuation(piece)
        return self._skipped[number]


def is_punctuation(piece: str) -> bool:
    """Whether a piece of a word holds nothing but punctuation; what a tokenizer writes for spaces does not count.

    >>> [is_punctuation(p) for p in ("##.", ",", "\u0120(", "[CLS]", "a.", "\u2581", "##", "...")]
    [True, True, True, False, False, False, True, True]
    """
    shown = piece.strip(MARKS)
    if shown.startswith("##") and len(shown) > 2:
        shown = shown[2:]
    return bool(shown) and all(c in string.punctuation for c in shown)
