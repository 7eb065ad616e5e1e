"""An encoder-decoder with attention whose alignment can be hidden, and the tasks on which alignment is known.

Source: Pruthi et al. (2020), arXiv 1909.07913.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.deceptive_attention.penalty import aligned_mass_penalty
from cenote.explain.fitting import Fitted, fit

Task = Literal["flip", "copy", "reverse"]
PAD, START, END, FIRST_WORD = 0, 1, 2, 3


class Pairs(NamedTuple):
    """Sources and targets, and the source that each target step is made of.

    Attributes:
        source: `START words END`, padded behind.
        target: `words END`, padded behind.
        aligned: the place in the source of each target step.
    """

    source: Int[Tensor, "items sources"]
    target: Int[Tensor, "items targets"]
    aligned: Int[Tensor, "items targets"]

    @property
    def impermissible(self) -> Bool[Tensor, "items targets sources"]:
        """For each target step the source it is made of; the first and the last token of a source may always be read."""
        hidden = F.one_hot(self.aligned, self.source.shape[1]).bool()
        allowed = (self.source == START) | (self.source == END) | (self.source == PAD)
        return hidden & ~allowed[:, None] & (self.target != PAD)[..., None]


class Decoded(NamedTuple):
    """`logits [batch, targets, words]` and `weights [batch, targets, sources]`."""

    logits: Float[Tensor, "batch targets words"]
    weights: Float[Tensor, "batch targets sources"]


class AttentiveSeq2Seq(nn.Module):
    """A GRU in both directions reads the source; a GRU writes the target, attending to the source by dot products.

    Args:
        vocabulary: number of tokens, of source and target.
        dim: width of the embeddings.
        hidden: width of the decoder, and of both directions of the encoder together.

    Example:
        >>> model = AttentiveSeq2Seq(12, 8, 8)
        >>> model.decode(torch.tensor([[1, 5, 6, 2]]), steps=3).shape
        torch.Size([1, 3])

    Source: Bahdanau et al. (2015), arXiv 1409.0473, with dot products; Pruthi et al. (2020), arXiv 1909.07913.
    """

    def __init__(self, vocabulary: int, dim: int = 64, hidden: int = 64) -> None:
        super().__init__()
        require_at_least(FIRST_WORD + 1, vocabulary=vocabulary)
        if hidden % 2:
            raise InputError(f"hidden: expected an even width, for two directions, got {hidden}")
        self.source = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.target = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.encoder = nn.GRU(dim, hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRUCell(dim + hidden, hidden)
        self.first = nn.Linear(hidden, hidden)
        self.output = nn.Linear(2 * hidden, vocabulary)

    def forward(
        self,
        source: Int[Tensor, "batch sources"],
        target: Int[Tensor, "batch targets"],
        blocked: Bool[Tensor, "batch targets sources"] | None = None,
    ) -> Decoded:
        """With the target as it should be written so far (teacher forcing).

        Args:
            source: `START words END`, padded behind.
            target: `words END`, padded behind.
            blocked: sources whose weight is set to 0 at a target step, and what is left not made to sum to 1.
        """
        written = F.pad(target[:, :-1], (1, 0), value=START)
        h, state, context = self._read(source)
        steps = []
        for t in range(target.shape[1]):
            now = None if blocked is None else blocked[:, t]
            state, context, logits, weights = self._step(written[:, t], state, context, h, source, now)
            steps.append((logits, weights))
        return Decoded(*(torch.stack(part, 1) for part in zip(*steps, strict=True)))

    @torch.no_grad()
    def decode(
        self,
        source: Int[Tensor, "batch sources"],
        steps: int,
        blocked: Bool[Tensor, "batch targets sources"] | None = None,
    ) -> Int[Tensor, "batch steps"]:
        """Write the likeliest token, step by step; `PAD` behind `END`."""
        h, state, context = self._read(source)
        token = torch.full_like(source[:, 0], START)
        ended, found = torch.zeros_like(token, dtype=torch.bool), []
        for t in range(steps):
            now = None if blocked is None else blocked[:, t]
            state, context, logits, _ = self._step(token, state, context, h, source, now)
            token = logits.argmax(-1).masked_fill(ended, PAD)
            ended = ended | (token == END)
            found.append(token)
        return torch.stack(found, 1)

    def _read(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lengths = (source != PAD).sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.source(source), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        h, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        state = self.first(last.transpose(0, 1).flatten(1)).tanh()
        return h, state, torch.zeros_like(state)

    def _step(
        self, token: Tensor, state: Tensor, context: Tensor, h: Tensor, source: Tensor, blocked: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state = self.decoder(torch.cat([self.target(token), context], -1), state)
        scores = (h @ state[..., None]).squeeze(-1) * h.shape[-1] ** -0.5
        weights = scores.masked_fill(source == PAD, -torch.inf).softmax(1)
        if blocked is not None:
            weights = weights.masked_fill(blocked, 0.0)
        context = (weights[..., None] * h).sum(1)
        return state, context, self.output(torch.cat([state, context], -1)), weights


def pairs_of(task: Task, items: int, generator: torch.Generator, words: int = 30, length: int = 8) -> Pairs:
    """Random words: copied, reversed, or with each two neighbours flipped.

    Args:
        task: `"flip"`, `"copy"` or `"reverse"`.
        items: how many.
        generator: of the words and lengths.
        words: how many different ones.
        length: of the longest source; the shortest has 2 words, and all have an even number.

    >>> made = pairs_of("flip", 1, torch.Generator().manual_seed(0), length=2)
    >>> made.source[0, 1:3].tolist() == made.target[0, [1, 0]].tolist()
    True
    """
    require_one_of(get_args(Task), task=task)
    require_at_least(2, length=length)
    counts = 2 * torch.randint(1, length // 2 + 1, (items, 1), generator=generator)
    at = torch.arange(length)
    text = torch.randint(FIRST_WORD, FIRST_WORD + words, (items, length), generator=generator)
    text = text.masked_fill(at >= counts, PAD)
    source = F.pad(text, (1, 1), value=PAD)
    source[:, 0] = START
    source.scatter_(1, counts + 1, END)
    of = {"copy": at.expand(items, -1), "flip": (at ^ 1).expand(items, -1), "reverse": counts - 1 - at}[task]
    # the step behind the words is made of END, those behind it of nothing
    aligned = torch.where(at < counts, of + 1, counts + 1)
    aligned = torch.cat([aligned, counts + 1], 1)
    target = source.gather(1, aligned)
    steps = torch.arange(length + 1)
    target = target.masked_fill(steps > counts, PAD)
    return Pairs(source, target, aligned)


def train_seq2seq(
    model: AttentiveSeq2Seq,
    pairs: Pairs,
    lam: float = 1.0,
    *,
    epochs: int = 10,
    batch: int = 64,
    lr: float = 1e-3,
    random_state: int = 0,
) -> Fitted:
    """Train with cross-entropy per target token and `aligned_mass_penalty`.

    Args:
        model: to train.
        pairs: to train on.
        lam: strength of the penalty; with 0 it is not computed.
        epochs, batch, lr: of Adam.
        random_state: of the order.
    """
    impermissible = pairs.impermissible

    def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
        source, target = pairs.source[chosen], pairs.target[chosen]
        found = model(source, target)
        value = F.cross_entropy(found.logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        if not lam:
            return value
        return value + aligned_mass_penalty(found.weights, impermissible[chosen], lam, target != PAD).loss

    return fit(model, len(pairs.source), loss, epochs=epochs, batch=batch, lr=lr, random_state=random_state)


class Written(NamedTuple):
    """Of greedily written targets: share of `tokens` and of whole `sequences` that are right; `mass` on impermissible
    sources, with the true target given."""

    tokens: float
    sequences: float
    mass: float


@torch.no_grad()
def audit_seq2seq(
    model: AttentiveSeq2Seq, pairs: Pairs, blocked: Bool[Tensor, "items targets sources"] | None = None
) -> Written:
    """How well a model writes, and how much of its attention lies on what each step is made of.

    Args:
        model: in eval mode.
        pairs: to test on.
        blocked: see `AttentiveSeq2Seq.forward`; `pairs.impermissible` shows whether the model needs what it should not read.
    """
    real: Shaped[Tensor, "items targets"] = pairs.target != PAD
    right = (model.decode(pairs.source, pairs.target.shape[1], blocked) == pairs.target) | ~real
    found = model(pairs.source, pairs.target, blocked)
    mass = aligned_mass_penalty(found.weights, pairs.impermissible, target_mask=real).mass
    return Written(float(right[real].double().mean()), float(right.all(1).double().mean()), float(mass))
