"""Mean opinion scores of clips: the predictor around the pool, its training, and where a clip was judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.pool.sequence.drasp.pool import DraspPool, Variant
from cenote.pool.training import History, train

TEXT = 512


class Opinion(NamedTuple):
    """What a predictor says of clips.

    Attributes:
        quality: `[batch]`.
        match: `[batch]`, how well the clip is what the prompt asked for; `None` without prompts.
        embedding: `[batch, shared]`, of length 1.
    """

    quality: Float[Tensor, "batch"]
    match: Float[Tensor, "batch"] | None
    embedding: Float[Tensor, "batch shared"]


class OpinionBatch(NamedTuple):
    """Clips and what people said of them.

    Attributes:
        x: what the backbone takes, or frames where there is none.
        quality: their mean opinion scores.
        mask: True on real frames; only without a backbone.
        text: vectors of the prompts, for `match`.
        match: mean opinion scores of the match with the prompt.
    """

    x: Tensor
    quality: Float[Tensor, "batch"]
    mask: Bool[Tensor, "batch frames"] | None = None
    text: Float[Tensor, "batch shared"] | None = None
    match: Float[Tensor, "batch"] | None = None


class Attended(NamedTuple):
    """A stretch of a clip, in seconds, and its share of the attention of the fine branch."""

    start: float
    end: float
    share: float


class OpinionPredictor(nn.Module):
    """A clip's quality, and its match with a prompt: frames of a backbone, DRASP, and two heads without non-linearity.

    `e = normalise(W_2 (W_1 pool(frames)))`; quality: three linear maps of `e`, to 256, 64, 1; match: likewise of `[e; t]`, with
    `t` the prompt's vector.

    Args:
        dim: width of a frame.
        backbone: gives `(frames [batch, frames, dim], mask or None)`; it is trained with the rest. `None`: frames are given.
        pooling: by the name of the authors' code, see `DraspPool.variant`.
        segment: number of frames in a segment.
        shared: width of the embedding, and of the prompts' vectors.
        project: the backbone's own map from `dim` to `shared`; default a new one.

    Raises:
        InputError: as `DraspPool`, or where prompts are of another width.

    Example:
        >>> predictor = OpinionPredictor(8, segment=4)
        >>> said = predictor(torch.randn(2, 11, 8), text=torch.randn(2, 512))
        >>> said.quality.shape, said.match.shape
        (torch.Size([2]), torch.Size([2]))

    Source: "DRASP: A Dual-Resolution Attentive Statistics Pooling Framework for Automatic MOS Prediction", APSIPA ASC 2025.
    """

    def __init__(
        self,
        dim: int,
        backbone: nn.Module | None = None,
        pooling: Variant = "drsp",
        segment: int = 1,
        shared: int = TEXT,
        project: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, shared=shared)
        self.backbone = backbone
        self.pool = DraspPool.variant(pooling, dim, segment)
        self.narrow = nn.Linear(self.pool.out_dim, dim)
        self.project = nn.Linear(dim, shared) if project is None else project
        self.quality = _head(shared)
        self.match = _head(2 * shared)
        self.shared = shared

    def frames(
        self, x: Tensor, mask: Bool[Tensor, "batch frames"] | None = None
    ) -> tuple[Float[Tensor, "batch frames dim"], Bool[Tensor, "batch frames"] | None]:
        """What the pool reads."""
        return (x, mask) if self.backbone is None else self.backbone(x)

    def forward(
        self,
        x: Tensor,
        mask: Bool[Tensor, "batch frames"] | None = None,
        text: Float[Tensor, "batch shared"] | None = None,
    ) -> Opinion:
        """The scores of clips; with vectors of their prompts also how well they match."""
        embedding = F.normalize(self.project(self.narrow(self.pool(*self.frames(x, mask)))), dim=-1)
        match = None
        if text is not None:
            if text.shape != embedding.shape:
                raise InputError(
                    f"text: expected one vector of width {self.shared} per clip, {tuple(embedding.shape)}, got "
                    f"{tuple(text.shape)}"
                )
            match = self.match(torch.cat([embedding, text], -1)).squeeze(-1)
        return Opinion(self.quality(embedding).squeeze(-1), match, embedding)

    @torch.no_grad()
    def attended(
        self,
        x: Tensor,
        mask: Bool[Tensor, "batch frames"] | None = None,
        seconds: float = 0.02,
        most: int = 3,
    ) -> list[list[Attended]]:
        """The segments that the fine branch takes most from, in seconds: where the glitch is.

        Args:
            x, mask: as for calling.
            seconds: between two frames of the backbone.
            most: segments per clip.

        Raises:
            InputError: where the pooling has no fine branch.
        """
        require_positive(seconds=seconds)
        if self.pool.branches == "coarse":
            raise InputError("pooling: has no attention; take one of sap, asp, gsap, gasp, drap, drsp")
        frames, mask = self.frames(x, mask)
        weights = self.pool.attend(frames, mask).weights
        assert weights is not None
        size = self.pool.segment
        found = []
        for of_clip in weights[:, -1]:
            shares = torch.stack([part.sum() for part in of_clip.split(size)])
            top = shares.topk(min(most, len(shares)))
            found.append(
                [
                    Attended(i * size * seconds, min((i + 1) * size, len(of_clip)) * seconds, share)
                    for share, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                    if share > 0
                ]
            )
        return found


def opinion_loss(model: OpinionPredictor, batch: OpinionBatch) -> Float[Tensor, ""]:
    """Mean absolute error of the quality, and, where it is known, of the match, added.

    Raises:
        InputError: where the match is known and the prompts are not.
    """
    if batch.match is not None and batch.text is None:
        raise InputError("text: the match with a prompt is learned from the prompts' vectors, and there are none")
    said = model(batch.x, batch.mask, batch.text)
    loss = F.l1_loss(said.quality, batch.quality)
    if batch.match is None or said.match is None:
        return loss
    return loss + F.l1_loss(said.match, batch.match)


def train_opinions(
    model: OpinionPredictor,
    batches: Callable[[], Iterable[OpinionBatch]],
    development: Sequence[OpinionBatch],
    *,
    passes: int = 1000,
    lr: float = 5e-4,
    momentum: float = 0.9,
    patience: int = 20,
) -> History:
    """The authors' recipe: absolute errors, plain descent with momentum, until the loss on development clips stops falling.

    Args:
        model: the backbone included.
        batches: gives those of one pass, of 64 clips of at most 30 s, in a fresh order each time.
        development: other clips; the state that is best on them is kept.
        passes: at most.
        lr, momentum: of the descent.
        patience: passes without a smaller loss after which training stops.

    Returns:
        How it went; scores are negative losses on the development clips.

    Raises:
        InputError: where there is nothing to develop on.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = OpinionPredictor(8, segment=4, shared=16)
        >>> x = torch.randn(64, 12, 8)
        >>> clips = OpinionBatch(x, 3 + x[:, :, 0].mean(1))
        >>> history = train_opinions(model, lambda: [clips], [clips], passes=30, lr=0.05)
        >>> history.losses[-1] < history.losses[0]
        True

    Source: "DRASP: A Dual-Resolution Attentive Statistics Pooling Framework for Automatic MOS Prediction", APSIPA ASC 2025.
    """
    if not development:
        raise InputError("development: expected at least one batch, on whose loss training stops")
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def score() -> float:
        sizes = [len(batch.quality) for batch in development]
        losses = [float(opinion_loss(model, batch)) * n for batch, n in zip(development, sizes, strict=True)]
        return -sum(losses) / sum(sizes)

    return train(
        model, batches, lambda batch: opinion_loss(model, batch), sgd, passes=passes, score=score, patience=patience
    )


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 256), nn.Linear(256, 64), nn.Linear(64, 1))
