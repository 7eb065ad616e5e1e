"""A decision at every moment of a stream: encoder, attentive pooling and classifier; its training, and how soon it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_positive
from cenote.pool.sequence.attentive_temporal_pooling.encoders import LayerState, StreamingEncoder
from cenote.pool.sequence.attentive_temporal_pooling.pool import AttentiveTemporalPool, TemporalState
from cenote.pool.training import History, train

FRAME = 0.03
"""Seconds between two frames of the paper's front end."""


class StreamState(NamedTuple):
    """All that a classifier of streams remembers."""

    encoder: list[LayerState]
    pool: TemporalState


class Streams(NamedTuple):
    """Streams and what each is.

    Attributes:
        x: `[batch, frames, dim]`.
        labels: `[batch]`.
        mask: `[batch, frames]`, True on real frames, which come first.
    """

    x: Float[Tensor, "batch frames dim"]
    labels: Int[Tensor, "batch"]
    mask: Bool[Tensor, "batch frames"] | None = None


class Heard(NamedTuple):
    """A decision at one moment of each stream.

    Attributes:
        seconds: since the beginning.
        decision: `[batch]`, the likeliest class.
        confidence: `[batch]`, its probability.
        probabilities: `[batch, classes]`.
    """

    seconds: float
    decision: Int[Tensor, "batch"]
    confidence: Float[Tensor, "batch"]
    probabilities: Float[Tensor, "batch classes"]


class StreamingClassifier(nn.Module):
    """What a stream is, at every frame, from all that was heard so far.

    Args:
        encoder: of the frames.
        pool: over what it gives.
        classes: number of classes.

    Raises:
        InputError: where the pool is of another width than the encoder.

    Example:
        >>> encoder = StreamingEncoder(20, dim=16, layers=1)
        >>> model = StreamingClassifier(encoder, AttentiveTemporalPool(16), classes=6).eval()
        >>> [round(heard.seconds, 2) for heard in model.listen(torch.randn(1, 10, 20).split(5, dim=1))][-1]
        0.3

    Source: Wang et al., "Attentive Temporal Pooling for Conformer-based Streaming Language Identification in Long-form
    Speech", Odyssey 2022.
    """

    def __init__(self, encoder: StreamingEncoder, pool: AttentiveTemporalPool, classes: int) -> None:
        super().__init__()
        if pool.dim != encoder.dim:
            raise InputError(f"pool: expected one of width {encoder.dim} as the encoder gives, got {pool.dim}")
        self.encoder = encoder
        self.pool = pool
        self.classifier = nn.Linear(pool.out_dim, classes)

    def step(
        self,
        x: Float[Tensor, "batch frames dim"],
        state: StreamState | None = None,
        mask: Bool[Tensor, "batch frames"] | None = None,
    ) -> tuple[Float[Tensor, "batch frames classes"], StreamState]:
        """Logits after each of the next frames, and the state to go on with."""
        encoded, kept = self.encoder.step(x, None if state is None else state.encoder)
        pooled, sums = self.pool.step(encoded, None if state is None else state.pool, mask)
        return self.classifier(pooled), StreamState(kept, sums)

    def forward(
        self, x: Float[Tensor, "batch frames dim"], mask: Bool[Tensor, "batch frames"] | None = None
    ) -> Float[Tensor, "batch frames classes"]:
        """Logits after every frame of whole streams; what is padded must stand at the end."""
        return self.step(x, None, mask)[0]

    def listen(self, packets: Iterable[Float[Tensor, "batch _frames dim"]], seconds: float = FRAME) -> Iterator[Heard]:
        """A decision for each frame as packets of frames arrive, of one stream or several; memory does not grow.

        Args:
            packets: of frames, each of any length.
            seconds: between two frames.
        """
        require_positive(seconds=seconds)
        state, frames = None, 0
        for packet in packets:
            with torch.inference_mode():
                logits, state = self.step(packet, state)
                probabilities = logits.softmax(-1)
            for p in probabilities.unbind(1):
                frames += 1
                confidence, decision = p.max(-1)
                yield Heard(frames * seconds, decision, confidence, p)


def stream_loss(
    model: StreamingClassifier, streams: Streams, over: Literal["last", "frames"] = "last"
) -> Float[Tensor, ""]:
    """Cross-entropy of what is said after the last real frame, or its mean over all of them.

    Args:
        model: a classifier.
        streams: with labels.
        over: which.
    """
    require_one_of(("last", "frames"), over=over)
    logits, (_, labels, mask) = model(streams.x, streams.mask), streams
    batch, frames, _ = logits.shape
    real = torch.ones(batch, frames, dtype=torch.bool, device=logits.device) if mask is None else mask
    if over == "last":
        last = (real.sum(1) - 1).clamp(min=0)
        return F.cross_entropy(logits[torch.arange(batch, device=logits.device), last], labels)
    return F.cross_entropy(logits[real], labels.unsqueeze(1).expand(batch, frames)[real])


def train_streams(
    model: StreamingClassifier,
    batches: Callable[[], Iterable[Streams]],
    *,
    passes: int,
    lr: float = 1e-3,
    over: Literal["last", "frames"] = "last",
    clip: float | None = 1.0,
    score: Callable[[], float] | None = None,
    patience: int | None = None,
) -> History:
    """Train encoder, pooling and classifier together, with Adam.

    Args:
        model: what is trained; in eval mode afterwards.
        batches: gives those of one pass, in a fresh order each time.
        passes: at most.
        lr: rate of Adam.
        over: which frames the loss is of, see `stream_loss`.
        clip: largest norm of the gradient.
        score, patience: see `cenote.pool.training.train`.

    Returns:
        How it went.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(32) % 2
        >>> streams = Streams(torch.randn(32, 12, 8) + labels[:, None, None], labels)
        >>> encoder = StreamingEncoder(8, dim=8, layers=1, heads=2, dropout=0.0)
        >>> model = StreamingClassifier(encoder, AttentiveTemporalPool(8), classes=2)
        >>> history = train_streams(model, lambda: [streams], passes=15, lr=1e-2)
        >>> history.losses[-1] < history.losses[0]
        True

    Source: Wang et al., "Attentive Temporal Pooling for Conformer-based Streaming Language Identification in Long-form
    Speech", Odyssey 2022; optimiser and rate were not found out.
    """
    return train(
        model,
        batches,
        lambda streams: stream_loss(model, streams, over),
        torch.optim.Adam(model.parameters(), lr=lr),
        passes=passes,
        clip=clip,
        score=score,
        patience=patience,
    )


def accuracy_over_time(
    logits: Float[Tensor, "streams frames classes"],
    labels: Int[Tensor, "streams"],
    mask: Bool[Tensor, "streams frames"] | None = None,
) -> Float[Tensor, "frames"]:
    """Share of the streams that are named right after each frame; NaN where none goes on so long.

    >>> accuracy_over_time(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.tensor([0])).tolist()
    [0.0, 1.0]
    """
    right = (logits.argmax(-1) == labels.unsqueeze(1)).double()
    if mask is None:
        return right.mean(0)
    return (right * mask).sum(0) / mask.sum(0)


def time_to_decision(
    logits: Float[Tensor, "streams frames classes"],
    mask: Bool[Tensor, "streams frames"] | None = None,
    seconds: float = FRAME,
) -> Float[Tensor, "streams"]:
    """Seconds after which the decision no longer changes; 0 for a stream without frames.

    >>> time_to_decision(torch.tensor([[[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]]), seconds=1.0).tolist()
    [2.0]
    """
    require_positive(seconds=seconds)
    said = logits.argmax(-1)
    real = torch.ones_like(said, dtype=torch.bool) if mask is None else mask
    lengths = real.sum(1)
    final = said.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
    other = (said != final) & real
    frames = torch.arange(1, said.shape[1] + 1, device=said.device)
    last_other = (frames * other).amax(1)
    return torch.where(lengths > 0, last_other + 1, 0).to(logits.dtype) * seconds
