"""The architectures of the survey, each on the one generalised attention.

Source: Chaudhari, Mithal, Polatkan and Ramanath, "An Attentive Survey of Attention Models" (2021), arXiv 1904.02874.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least
from cenote.mix.attention_survey.alignments import alignment as alignment_named
from cenote.mix.attention_survey.attention import GeneralAttention
from cenote.mix.attention_survey.order import real_first
from cenote.mix.base import Normaliser
from cenote.mix.normalisers import normaliser, softmax


class Translated(NamedTuple):
    """Logits of every step, and what each step looked at."""

    logits: Float[Tensor, "batch steps vocabulary"]
    weights: Float[Tensor, "batch steps tokens"]


class AttentiveEncoderDecoder(nn.Module):
    """A GRU reads, another writes; before each word the writer looks at the reader's states.

    Args:
        vocabulary: of both sides.
        dim: of embeddings and states.
        alignment, distribution: of the attention, by name.

    Source: Bahdanau, Cho and Bengio (2015), arXiv 1409.0473.
    """

    def __init__(
        self, vocabulary: int, dim: int = 64, alignment: str = "additive", distribution: str | Normaliser = "softmax"
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, dim=dim)
        self.embedding = nn.Embedding(vocabulary, dim)
        self.reader = nn.GRU(dim, dim, batch_first=True)
        self.writer = nn.GRUCell(2 * dim, dim)
        self.attention = GeneralAttention(dim, alignment, distribution)
        self.output = nn.Linear(2 * dim, vocabulary)

    def forward(
        self,
        source: Int[Tensor, "batch tokens"],
        target: Int[Tensor, "batch steps"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Translated:
        """Logits of what follows each token of the target, which starts with a token of its own.

        Args:
            mask: True = a real token of the source; padding may stand anywhere.
        """
        real = torch.ones_like(source, dtype=torch.bool) if mask is None else mask
        order = real_first(real)
        states, _ = self.reader(self.embedding(source.gather(1, order)))
        real = real.gather(1, order)
        last = (real.sum(1) - 1).clamp(min=0)
        state = states[torch.arange(len(states)), last]
        logits, seen = [], []
        for word in self.embedding(target).unbind(1):
            found = self.attention(states, state.unsqueeze(1), mask=real)
            context = found.context[:, 0]
            state = self.writer(torch.cat([word, context], -1), state)
            logits.append(self.output(torch.cat([state, context], -1)))
            seen.append(found.weights[:, 0, 0])
        weights = torch.stack(seen, 1)
        places = order.unsqueeze(1).expand_as(weights)
        return Translated(torch.stack(logits, 1), torch.zeros_like(weights).scatter(2, places, weights))


class MemoryNetwork(nn.Module):
    """A question hops through a memory: `p = softmax(q . A m_i)`, `q <- q + sum_i p_i C m_i`.

    Args:
        dim: of question and memories.
        hops: how many.
        maps: whether memories are mapped, by A and C of all hops.

    Source: Sukhbaatar et al. (2015), arXiv 1503.08895.
    """

    def __init__(self, dim: int, hops: int = 3, maps: bool = True) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hops=hops)
        self.hops = hops
        self.to_key = nn.Linear(dim, dim, bias=False) if maps else nn.Identity()
        self.to_value = nn.Linear(dim, dim, bias=False) if maps else nn.Identity()

    def forward(
        self,
        question: Float[Tensor, "batch dim"],
        memories: Float[Tensor, "batch memories dim"],
        mask: Bool[Tensor, "batch memories"] | None = None,
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch hops memories"]]:
        """The question behind its hops, and what each looked at."""
        memories = cleared(memories, mask)
        keys, values = self.to_key(memories), self.to_value(memories)
        seen = []
        for _ in range(self.hops):
            weights = softmax((keys @ question.unsqueeze(-1)).squeeze(-1), mask)
            question = question + (weights.unsqueeze(1) @ values).squeeze(1)
            seen.append(weights)
        return question, torch.stack(seen, 1)


class PointerNetwork(nn.Module):
    """What is written are places of what is read: the weights are the output.

    Args:
        dim: of the inputs.
        hidden: of the states.
        alignment: by name.

    Source: Vinyals, Fortunato and Jaitly (2015), arXiv 1506.03134.
    """

    def __init__(self, dim: int, hidden: int = 32, alignment: str = "additive") -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden)
        self.reader = nn.LSTM(dim, hidden, batch_first=True)
        self.writer = nn.LSTMCell(dim, hidden)
        self.start = nn.Parameter(torch.zeros(dim))
        self.alignment = alignment_named(alignment, hidden, hidden)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], places: Int[Tensor, "batch steps"] | None = None, steps: int = 1
    ) -> Float[Tensor, "batch steps tokens"]:
        """Scores of every place at every step.

        Args:
            places: those of the answer, each given to the step behind it; without them the most probable one is.
            steps: how many, where no places are given.
        """
        states, (h, c) = self.reader(x)
        h, c, given, scores = h[0], c[0], self.start.expand(len(x), -1), []
        for step in range(steps if places is None else places.shape[1]):
            h, c = self.writer(given, (h, c))
            scores.append(self.alignment(h[:, None, None], states.unsqueeze(1))[:, 0, 0])
            at = scores[-1].argmax(-1) if places is None else places[:, step]
            given = x[torch.arange(len(x)), at]
        return torch.stack(scores, 1)


class AttentionBlock(nn.Module):
    """A Transformer's block: attention of several heads and a feed-forward layer, norms before.

    Args:
        dim, heads: as usual.
        alignment, distribution: of the attention, by name.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 2,
        alignment: str = "scaled dot",
        distribution: str | Normaliser = "softmax",
    ) -> None:
        super().__init__()
        self.attention = GeneralAttention(dim, alignment, distribution, heads=heads)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens behind the block."""
        x = cleared(x, mask)
        x = x + self.attention(self.norms[0](x), mask=mask).context
        return x + self.feed_forward(self.norms[1](x))


class GraphAttention(nn.Module):
    """Nodes attend to their neighbours alone: `h_i = sum_{j in N(i)} p(a(W h_i, W h_j)) W h_j`.

    Args:
        dim: of the nodes.
        out: of what comes out.
        alignment, distribution: by name.

    Source: Velickovic et al. (2018), arXiv 1710.10903.
    """

    def __init__(
        self, dim: int, out: int, alignment: str = "additive", distribution: str | Normaliser = "softmax"
    ) -> None:
        super().__init__()
        self.map = nn.Linear(dim, out, bias=False)
        self.alignment = alignment_named(alignment, out, out)
        self.distribution = normaliser(distribution)

    def forward(
        self, x: Float[Tensor, "batch nodes dim"], edges: Bool[Tensor, "batch nodes nodes"]
    ) -> Float[Tensor, "batch nodes out"]:
        """New nodes; zeros where a row of `edges` is empty."""
        seen = edges.unsqueeze(1)
        # nodes that look at none, and nodes that none looks at, may hold anything
        q, k = self.map(cleared(x, edges.any(2))), self.map(cleared(x, edges.any(1)))
        weights = self.distribution(self.alignment(q.unsqueeze(1), k.unsqueeze(1), seen), seen)
        return weights[:, 0] @ k
