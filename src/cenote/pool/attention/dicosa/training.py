"""The whole retrieval model, towers included, and the authors' recipe for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive, require_rate
from cenote.pool.attention.dicosa.similarity import DiCoSA
from cenote.pool.attention.dicosa.temporal import TemporalTransformer
from cenote.pool.training import History, cosine_schedule, gathered, train

Aggregation = Literal["transformer", "lstm", "none"]


class Pairs(NamedTuple):
    """Texts and the videos that they belong to, one by one.

    Attributes:
        text: what the text tower takes, or vectors `[pairs, dim]` where there is none.
        frames: what the frame tower takes, `[pairs, frames, ...]`, or vectors `[pairs, frames, dim]`.
        mask: True on real frames.
    """

    text: Tensor
    frames: Tensor
    mask: Bool[Tensor, "pairs frames"] | None = None


class TemporalLSTM(nn.Module):
    """Frames that know those before them: `y = x + LSTM(x)`, the other aggregation of the authors' code.

    >>> TemporalLSTM(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, batch_first=True)

    def forward(
        self, x: Float[Tensor, "videos frames dim"], mask: Bool[Tensor, "videos frames"] | None = None
    ) -> Float[Tensor, "videos frames dim"]:
        """The frames; `mask` is True on real ones, which come first; padded ones hold zeros."""
        if mask is None:
            return x + self.lstm(x)[0]
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
        packed = pack_padded_sequence(x, mask.sum(1).clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        found, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return (x + found).masked_fill(~mask.unsqueeze(-1), 0)


class TextVideoRetrieval(nn.Module):
    """Two towers, frames that see each other, and the similarity concept by concept.

    Args:
        dim: width of what the towers give.
        text_tower: texts to `[texts, dim]`; `None`: vectors are given.
        frame_tower: frames `[videos x frames, ...]` to `[videos x frames, dim]`; `None`: vectors are given.
        aggregation: of the frames before they are compared: `"transformer"`, `"lstm"`, or `"none"`.
        layers, frames: of `TemporalTransformer`.
        settings: of `DiCoSA`.

    Raises:
        InputError: as its parts.

    Example:
        >>> model = TextVideoRetrieval(16, layers=1, frames=12, blocks=4)
        >>> model(torch.randn(5, 16), torch.randn(3, 7, 16)).shape
        torch.Size([5, 3])

    Source: Jin et al., "Text-Video Retrieval with Disentangled Conceptualization and Set-to-Set Alignment", IJCAI 2023.
    """

    def __init__(
        self,
        dim: int,
        text_tower: nn.Module | None = None,
        frame_tower: nn.Module | None = None,
        aggregation: Aggregation = "transformer",
        layers: int = 4,
        frames: int = 77,
        **settings: Any,
    ) -> None:
        super().__init__()
        require_one_of(("transformer", "lstm", "none"), aggregation=aggregation)
        self.text_tower = text_tower
        self.frame_tower = frame_tower
        self.temporal: nn.Module | None = None
        if aggregation != "none":
            self.temporal = (
                TemporalLSTM(dim) if aggregation == "lstm" else TemporalTransformer(dim, layers, None, frames)
            )
        self.similarity = DiCoSA(dim, **settings)

    def texts(self, text: Tensor) -> Float[Tensor, "texts dim"]:
        """Vectors of texts."""
        return text if self.text_tower is None else self.text_tower(text)

    def index(
        self, frames: Tensor, mask: Bool[Tensor, "videos frames"] | None = None
    ) -> Float[Tensor, "videos frames dim"]:
        """The frames of each video as they are compared: computed once, kept, and searched with any number of texts."""
        if self.frame_tower is not None:
            frames = self.frame_tower(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return frames if self.temporal is None else self.temporal(frames, mask)

    def forward(
        self, text: Tensor, frames: Tensor, mask: Bool[Tensor, "videos frames"] | None = None
    ) -> Float[Tensor, "texts videos"]:
        """The similarity of every text with every video."""
        return self.similarity(self.texts(text), self.index(frames, mask), mask)

    def search(
        self,
        text: Tensor,
        index: Float[Tensor, "videos frames dim"],
        mask: Bool[Tensor, "videos frames"] | None = None,
    ) -> Float[Tensor, "texts videos"]:
        """Likewise, of videos that `index` has read."""
        return self.similarity(self.texts(text), index, mask)

    def loss(self, pairs: Pairs) -> Float[Tensor, ""]:
        """Contrastive and decoupling loss of a batch; over all processes of a distributed training together."""
        text, frames = gathered(self.texts(pairs.text)), gathered(self.index(pairs.frames, pairs.mask))
        mask = None if pairs.mask is None else gathered(pairs.mask.to(torch.uint8)).bool()
        return self.similarity.losses(text, frames, mask).total

    def parameter_groups(self, lr: float = 1e-4, tower_lr: float = 1e-7) -> list[dict[str, Any]]:
        """What an optimiser is given: the towers at a rate of their own, all else at `lr`."""
        towers = [p for t in (self.text_tower, self.frame_tower) if t is not None for p in t.parameters()]
        own = {id(p) for p in towers}
        rest = [p for p in self.parameters() if id(p) not in own]
        groups = [{"params": rest, "lr": lr}]
        # a tower that serves both sides stands once
        return [*groups, {"params": list({id(p): p for p in towers}.values()), "lr": tower_lr}] if towers else groups


def train_retrieval(
    model: TextVideoRetrieval,
    batches: Callable[[], Iterable[Pairs]],
    *,
    passes: int = 5,
    lr: float = 1e-4,
    tower_lr: float = 1e-7,
    weight_decay: float = 0.2,
    warm_up: float = 0.1,
    score: Callable[[], float] | None = None,
) -> History:
    """The authors' recipe: both losses on batches of matched pairs, the towers at a thousandth of the rate of what is new.

    Args:
        model: what is trained; in eval mode afterwards.
        batches: gives those of one pass, of 128 pairs with 12 frames and 32 words, in a fresh order each time and as many
            each time.
        passes: 5; 10 for long videos.
        lr: of the head and the temporal part.
        tower_lr: of the towers.
        weight_decay: decoupled.
        warm_up: share of the steps in which the rates rise; they then fall along a cosine.
        score: of the model on other pairs, recall say; the best state is kept.

    Returns:
        How it went.

    Raises:
        InputError: where a pass has no batch or a number makes no sense.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> text = torch.randn(32, 16)
        >>> pairs = Pairs(text, text.unsqueeze(1) + torch.randn(32, 6, 16))
        >>> model = TextVideoRetrieval(16, layers=1, frames=12, blocks=4)
        >>> history = train_retrieval(model, lambda: [pairs], passes=30, lr=5e-3)
        >>> history.losses[-1] < history.losses[0]
        True
        >>> videos = model.index(pairs.frames)  # once, for any number of texts
        >>> model.search(text, videos).shape
        torch.Size([32, 32])

    Source: Jin et al., "Text-Video Retrieval with Disentangled Conceptualization and Set-to-Set Alignment", IJCAI 2023.
    """
    require_at_least(1, passes=passes)
    require_positive(lr=lr, tower_lr=tower_lr)
    require_rate(warm_up=warm_up)
    each = sum(1 for _ in batches())
    if not each:
        raise InputError("batches: gave nothing in a pass; an iterator is spent after one, so give what makes one")
    adam = torch.optim.AdamW(model.parameter_groups(lr, tower_lr), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    steps = passes * each
    return train(
        model,
        batches,
        model.loss,
        adam,
        passes=passes,
        schedule=cosine_schedule(adam, steps, int(warm_up * steps)),
        score=score,
    )
