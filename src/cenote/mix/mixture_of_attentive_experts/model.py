"""A Transformer in which every attention is a mixture of experts, and its encoder as a classifier.

Source: Peng et al. (2020), arXiv 2005.06537; Vaswani et al. (2017), arXiv 1706.03762.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_rate
from cenote.mix.mixture_of_attentive_experts.attention import MixtureAttention

WAVE = 1e4


def sine_positions(tokens: int, dim: int) -> Float[Tensor, "tokens dim"]:
    """Sines and cosines of positions, interleaved.

    >>> sine_positions(1, 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    rates = torch.exp(-math.log(WAVE) * torch.arange(0, dim, 2) / dim)
    angles = torch.arange(tokens)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward part, each added and then normalised.

    Args:
        dim: width.
        hidden: of the feed-forward part.
        dropout: of what is added.
        heads, drop, gate_hidden: of the mixture, whose gate has a width of its own.
    """

    def __init__(
        self, dim: int, hidden: int, dropout: float = 0.0, *, heads: int = 8, drop: int = 1, gate_hidden: int = 256
    ) -> None:
        super().__init__()
        self.attention = MixtureAttention(dim, heads, drop=drop, hidden=gate_hidden)
        self.forward_part = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.norms[0](x + self.dropout(self.attention.attend(x, mask=mask).output))
        return self.norms[1](x + self.dropout(self.forward_part(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to what was read, and a feed-forward part; arguments as of `EncoderLayer`."""

    def __init__(
        self, dim: int, hidden: int, dropout: float = 0.0, *, heads: int = 8, drop: int = 1, gate_hidden: int = 256
    ) -> None:
        super().__init__()
        # the gate of what is read is causal too: it knows the tokens so far
        self.attention, self.cross = (
            MixtureAttention(dim, heads, drop=drop, hidden=gate_hidden, causal=True) for _ in range(2)
        )
        self.forward_part = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        memory: Float[Tensor, "batch sources dim"],
        memory_mask: Bool[Tensor, "batch sources"],
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.norms[0](x + self.dropout(self.attention.attend(x, mask=mask).output))
        read = self.cross.attend(x, memory, mask, memory_mask).output
        x = self.norms[1](x + self.dropout(read))
        return self.norms[2](x + self.dropout(self.forward_part(x)))


class MAETransformer(nn.Module):
    """An encoder-decoder of mixture layers: encoder self, decoder self and cross attention; base size by default.

    Args:
        vocabulary: tokens of source and target together; embeddings and output are one matrix.
        dim, hidden, layers, heads, drop: as of the base Transformer, and heads that each expert is without.
        gate_hidden: of the gates.
        dropout: of embeddings and what is added.
        pad, start, end: numbers of tokens.

    Example:
        >>> model = MAETransformer(20, dim=16, hidden=16, layers=1, heads=4)
        >>> model(torch.tensor([[5, 6, 2]]), torch.tensor([[1, 7]])).shape
        torch.Size([1, 2, 20])

    Source: Peng et al. (2020), arXiv 2005.06537.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 512,
        hidden: int = 2048,
        layers: int = 6,
        heads: int = 8,
        drop: int = 1,
        gate_hidden: int = 256,
        dropout: float = 0.1,
        pad: int = 0,
        start: int = 1,
        end: int = 2,
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, layers=layers)
        require_rate(dropout=dropout)
        if not all(0 <= token < vocabulary for token in (pad, start, end)):
            raise InputError(f"pad, start, end: expected tokens below {vocabulary}, got {pad}, {start} and {end}")
        self.dim, self.pad, self.start, self.end = dim, pad, start, end
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(dropout)
        settings = {"heads": heads, "drop": drop, "gate_hidden": gate_hidden}
        self.encoder = nn.ModuleList(EncoderLayer(dim, hidden, dropout, **settings) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(dim, hidden, dropout, **settings) for _ in range(layers))

    def forward(
        self, source: Int[Tensor, "batch sources"], target: Int[Tensor, "batch targets"]
    ) -> Float[Tensor, "batch targets vocabulary"]:
        """Logits of the token behind each of the target's, which begins with `start`."""
        mask = source != self.pad
        return self.written(target, self.read(source, mask), mask)

    def loss(self, source: Int[Tensor, "batch sources"], target: Int[Tensor, "batch targets"]) -> Float[Tensor, ""]:
        """Cross-entropy of targets that end with `end`, padded behind, with those so far given."""
        so_far = F.pad(target[:, :-1], (1, 0), value=self.start)
        return F.cross_entropy(self(source, so_far).transpose(1, 2), target, ignore_index=self.pad)

    def read(
        self, source: Int[Tensor, "batch sources"], mask: Bool[Tensor, "batch sources"]
    ) -> Float[Tensor, "batch sources dim"]:
        """States of the encoder."""
        x = self._embedded(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def written(
        self,
        target: Int[Tensor, "batch targets"],
        memory: Float[Tensor, "batch sources dim"],
        memory_mask: Bool[Tensor, "batch sources"],
    ) -> Float[Tensor, "batch targets vocabulary"]:
        """Logits of the decoder."""
        x, mask = self._embedded(target), target != self.pad
        for layer in self.decoder:
            x = layer(x, mask, memory, memory_mask)
        return x @ self.embedding.weight.T

    @torch.no_grad()
    def decode(
        self, source: Int[Tensor, "batch sources"], steps: int, beams: int = 1, length_penalty: float = 0.6
    ) -> Int[Tensor, "batch steps"]:
        """Write the likeliest tokens: greedily, or the best of several beams by `log p / ((5 + length) / 6)^penalty`.

        Args:
            source: padded behind.
            steps: at most so many tokens; `pad` behind `end`.
            beams: how many are followed of each item.
            length_penalty: see above.
        """
        require_at_least(1, steps=steps, beams=beams)
        batch, rows = len(source), torch.arange(len(source), device=source.device)[:, None]
        mask = source != self.pad
        memory = self.read(source, mask).repeat_interleave(beams, 0)
        mask = mask.repeat_interleave(beams, 0)
        texts = source.new_full((batch, beams, 1), self.start)
        # at first all beams are one
        scores = memory.new_full((batch, beams), -math.inf)
        scores[:, 0] = 0.0
        ended = torch.zeros(batch, beams, dtype=torch.bool, device=source.device)
        lengths = torch.zeros(batch, beams, device=source.device)
        for _ in range(steps):
            told = texts.flatten(0, 1).masked_fill(texts.flatten(0, 1) == self.pad, self.end)
            logits = self.written(told, memory, mask)[:, -1].log_softmax(-1).view(batch, beams, -1)
            # what has ended goes on with nothing, at no cost
            nothing = torch.full_like(logits, -math.inf)
            nothing[..., self.pad] = 0.0
            logits[..., self.pad] = -math.inf
            totals = scores[..., None] + torch.where(ended[..., None], nothing, logits)
            grown = lengths[..., None] + (~ended)[..., None].float()
            penalised = totals / ((5 + grown) / 6) ** length_penalty if beams > 1 else totals
            best = penalised.flatten(1).topk(beams, 1).indices
            beam, token = best // logits.shape[-1], best % logits.shape[-1]
            scores = totals.flatten(1).gather(1, best)
            texts = torch.cat([texts[rows, beam], token[..., None]], -1)
            lengths = grown.expand(totals.shape).flatten(1).gather(1, best)
            ended = ended.gather(1, beam) | (token == self.end)
            if bool(ended.all()):
                break
        final = (scores / ((5 + lengths) / 6) ** length_penalty).argmax(1) if beams > 1 else rows.new_zeros(batch)
        found = texts[rows[:, 0], final, 1:]
        return F.pad(found, (0, steps - found.shape[1]), value=self.pad)

    def _embedded(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        x = self.embedding(tokens) * math.sqrt(self.dim)
        return self.dropout(x + sine_positions(tokens.shape[1], self.dim).to(x))


class MAEClassifier(nn.Module):
    """An encoder of mixture layers, the mean of its tokens, and a linear classifier.

    Args:
        vocabulary: number of tokens.
        classes: of an item; of each token with `per_token`.
        per_token: logits of every token instead.
        dim, hidden, layers, heads, drop, gate_hidden, dropout, pad: as of `MAETransformer`.

    Example:
        >>> MAEClassifier(20, 3, dim=16, hidden=16, layers=1, heads=4)(torch.tensor([[5, 6, 0]])).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        per_token: bool = False,
        dim: int = 64,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        drop: int = 1,
        gate_hidden: int = 256,
        dropout: float = 0.0,
        pad: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, classes=classes, layers=layers)
        self.dim, self.pad, self.per_token = dim, pad, per_token
        self.embedding = nn.Embedding(vocabulary, dim)
        settings = {"heads": heads, "drop": drop, "gate_hidden": gate_hidden}
        self.layers = nn.ModuleList(EncoderLayer(dim, hidden, dropout, **settings) for _ in range(layers))
        self.output = nn.Linear(dim, classes)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch classes"] | Float[Tensor, "batch tokens classes"]:
        """Logits."""
        mask = tokens != self.pad
        x = self.embedding(tokens)
        x = x + sine_positions(tokens.shape[1], self.dim).to(x)
        for layer in self.layers:
            x = layer(x, mask)
        if self.per_token:
            return self.output(x)
        real = mask.unsqueeze(-1)
        return self.output((x * real).sum(1) / real.sum(1).clamp(min=1))
