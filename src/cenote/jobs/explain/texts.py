"""Texts and a classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core.perturb import dropped
from cenote.explain.embedded import embedded, output_of
from cenote.jobs.explain.subject import Subject, from_the_first
from cenote.models.classifier import TextClassifier

DROP = "drop"


class Texts(Subject):
    """Texts: words, made of tokens, are dropped, or replaced by the mask token.

    Args:
        classifier: with its tokenizer.
        texts: none of them empty or longer than the model reads.
        names: of the texts; default: `text 0`, ...

    Raises:
        InputError: naming the text that cannot be used.
    """

    kind = "texts"

    def __init__(self, classifier: TextClassifier, texts: Sequence[str], names: Sequence[str] | None = None) -> None:
        self.model, self.labels = classifier.loaded.model, classifier.loaded.labels
        self.names = tuple(names) if names is not None else tuple(f"text {i}" for i in range(len(texts)))
        encoded = [classifier.encode(text, name) for text, name in zip(texts, self.names, strict=True)]
        fill = classifier.fill()
        self._fill_token = None if fill is None else fill[1]
        self.fills = (DROP,) if fill is None else (DROP, fill[0])
        self.settings = {"query": classifier.looks_from}
        self._ids = _padded([e.ids for e in encoded], 0)
        self._real = _padded([[1] * len(e.ids) for e in encoded], 0).bool()
        word = _padded([e.word for e in encoded], -1)
        # a token of its own in place of a word
        token = torch.where(word >= 0, (word >= 0).long().cumsum(1) - 1, -1)
        self.sizes = {"words": word, "tokens": token}
        self._words = [list(e.words) for e in encoded]
        self._lengths = _padded([[len(p.strip()) for p in e.pieces] for e in encoded], 0).float()
        self.device = next(self.model.parameters()).device

    def inputs(self, item: int) -> dict[str, Any]:
        real = self._real[item]
        ids = self._ids[item : item + 1, real].to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def outputs(
        self, items: Int[Tensor, "rows"], keep: Bool[Tensor, "rows tokens"], fill: str
    ) -> Float[Tensor, "rows classes"]:
        ids, stays = self._ids[items], keep & self._real[items]
        if fill == DROP:
            ids, real = dropped(ids, stays | _first_where_none(stays, self._real[items]))
        else:
            assert self._fill_token is not None
            real = self._real[items]
            longest = int(real.sum(1).amax())
            ids = torch.where(stays, ids, self._fill_token)[:, :longest]
            real = real[:, :longest]
        return self._of_equal_lengths(ids, real.sum(1))

    def _of_equal_lengths(
        self, ids: Int[Tensor, "rows tokens"], lengths: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows classes"]:
        """Rows of one length at a time, without padding: heads that read the last token do not all know which one that is.

        Of models without a token for padding some take no batch at all, so that each row runs alone.
        """
        config = getattr(self.model, "config", None)
        alone = config is not None and getattr(config, "pad_token_id", None) is None
        found: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero()[:, 0].split(1 if alone else len(lengths)):
                given = ids[rows, :length].to(self.device)
                logits = output_of(self.model(input_ids=given, attention_mask=torch.ones_like(given))).float().cpu()
                found |= dict(zip(rows.tolist(), logits, strict=True))
        return torch.stack([found[row] for row in range(len(ids))])

    def hints(self) -> dict[str, Float[Tensor, "items tokens"]]:
        inside = self.sizes["tokens"] >= 0
        norms = torch.zeros(inside.shape)
        for item in range(len(self.names)):
            own = embedded(self.model, self.inputs(item)).x[0].norm(dim=1)
            norms[item, : len(own)] = own.float().cpu()
        return {
            "position": from_the_first(inside),
            "token-length": self._lengths * inside,
            "embedding-norm": norms * inside,
        }

    def words(self, item: int) -> list[str]:
        return self._words[item]

    def content(self) -> list[Shaped[Tensor, "..."]]:
        return [self._ids]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "items tokens"]:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def _first_where_none(stays: Tensor, real: Tensor) -> Tensor:
    """A text without any token is none that a model reads: of models without [CLS], the first one stays."""
    first = real & (real.long().cumsum(1) == 1)
    return first & ~stays.any(1, keepdim=True)
