"""Words to sentences to documents, each by attention.

Source: Yang et al., "Hierarchical Attention Networks for Document Classification" (2016); Chaudhari et al. (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_rate
from cenote.mix.attention_survey.order import real_first
from cenote.mix.normalisers import softmax


class Document(NamedTuple):
    """What a `HierarchicalAttentionNetwork` makes of documents.

    Attributes:
        logits: of the classes.
        words, sentences: weights of each sentence's words, and of each document's sentences.
        vectors: of the documents.
    """

    logits: Float[Tensor, "batch classes"]
    words: Float[Tensor, "batch sentences words"]
    sentences: Float[Tensor, "batch sentences"]
    vectors: Float[Tensor, "batch width"]


class HierarchicalAttentionNetwork(nn.Module):
    """A document classifier: a two-way GRU and attention over the words of each sentence, the same over sentences.

        u_t = tanh(W h_t + b),   a = softmax(u_t . u_w),   s = sum_t a_t h_t

    Args:
        vocabulary: number of words.
        classes: number of classes.
        dim: of the embeddings.
        hidden: of each direction of a GRU.
        dropout: of sentences' and documents' vectors, in training.

    Example:
        >>> model = HierarchicalAttentionNetwork(20, 3, dim=8, hidden=4).eval()
        >>> model(torch.randint(0, 20, (2, 3, 5))).logits.shape
        torch.Size([2, 3])
    """

    def __init__(self, vocabulary: int, classes: int, dim: int = 200, hidden: int = 50, dropout: float = 0.0) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, classes=classes, dim=dim, hidden=hidden)
        require_rate(dropout=dropout)
        self.embedding = nn.Embedding(vocabulary, dim)
        self.of_words, self.of_sentences = Level(dim, hidden), Level(2 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * hidden, classes)

    def forward(
        self, tokens: Int[Tensor, "batch sentences words"], mask: Bool[Tensor, "batch sentences words"] | None = None
    ) -> Document:
        """Classify.

        Args:
            tokens: numbers of words; padding may stand anywhere.
            mask: True = a real word; a sentence without one is none.
        """
        batch, count = tokens.shape[:2]
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        of_sentences, words = self.of_words(self.embedding(tokens).flatten(0, 1), real.flatten(0, 1))
        there = real.any(-1)
        vectors, sentences = self.of_sentences(self.dropout(of_sentences).unflatten(0, (batch, count)), there)
        return Document(self.classifier(self.dropout(vectors)), words.unflatten(0, (batch, count)), sentences, vectors)


class Level(nn.Module):
    """A two-way GRU over a sequence, and attention over its states."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, hidden, batch_first=True, bidirectional=True)
        self.map = nn.Linear(2 * hidden, 2 * hidden)
        self.context = nn.Parameter(torch.randn(2 * hidden) / (2 * hidden) ** 0.5)

    def forward(
        self, x: Float[Tensor, "rows tokens dim"], mask: Bool[Tensor, "rows tokens"]
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows tokens"]]:
        """One vector of each row, and the weights; zeros of rows without a token."""
        order, lengths = real_first(mask), mask.sum(1).clamp(min=1).cpu()
        front = x.masked_fill(~mask.unsqueeze(-1), 0.0).gather(1, order.unsqueeze(-1).expand_as(x))
        packed = nn.utils.rnn.pack_padded_sequence(front, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        weights = softmax(torch.tanh(self.map(h)) @ self.context, mask.gather(1, order))
        return (weights.unsqueeze(-1) * h).sum(1), torch.zeros_like(weights).scatter(1, order, weights)
