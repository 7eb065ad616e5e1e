"""PoNet's whole encoders: as BERT is built, with a head for masked words and the order of segments, and as for LRA.

Source: Tan et al., "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import first_of
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.base import Mixer
from cenote.mix.basic.attention import AttentionMixer
from cenote.mix.basic.efficient import FourierMixer, LinearAttention, Linformer, NystromAttention
from cenote.mix.basic.grids import MeanMixer
from cenote.mix.ponet.mixer import PoNetMixer
from cenote.mix.ponet.segments import segments_between, special_tokens

EPS = 1e-12
ORDERS = ("next", "previous", "other")
MixerMaker = Callable[[int, int, int], Mixer]
"""Builds a mixer from the width, the number of heads and the largest number of tokens."""


def variants(segments: int = 64, window: int = 3) -> dict[str, MixerMaker]:
    """PoNet, its ablations and its rivals by name, for `PoNetEncoder`.

    Args:
        segments: of equal length, where texts are not cut at special tokens.
        window: of the local view.
    """

    def ponet(**settings: Any) -> MixerMaker:
        return lambda dim, heads, _longest: PoNetMixer(dim, heads, segments, **{"window": window, **settings})

    return {
        "ponet": ponet(),
        "without global": ponet(views=("segment", "local")),
        "without segment": ponet(views=("global", "local")),
        "without local": ponet(views=("global", "segment")),
        "sum": ponet(product=False),
        "plain mean": ponet(weighted=False),
        "separate value": ponet(separate_value=True),
        "window 1": ponet(window=1),
        "window 5": ponet(window=5),
        "attention": lambda dim, heads, _longest: AttentionMixer(dim, heads, bias=True),
        "fnet": lambda _dim, _heads, _longest: FourierMixer(),
        "linear attention": lambda dim, heads, _longest: LinearAttention(dim, heads),
        "linformer": lambda dim, heads, longest: Linformer(dim, heads, longest, min(64, longest)),
        "nystrom": lambda dim, heads, _longest: NystromAttention(dim, heads),
        "mean": lambda _dim, _heads, _longest: MeanMixer(),
    }


class Encoded(NamedTuple):
    """What an encoder makes of a text.

    Attributes:
        states: of the tokens, zeros at padding.
        weights: of the global view in each block; empty for other mixers.
    """

    states: Float[Tensor, "batch tokens dim"]
    weights: list[Float[Tensor, "batch heads tokens"]]


class PoNetBlock(nn.Module):
    """A mixer and a perceptron, each with a skip, a norm before (`"pre"`) or behind the sum (`"post"`)."""

    def __init__(self, mixer: Mixer, dim: int, inner: int, order: str, dropout: float, eps: float) -> None:
        super().__init__()
        self.mixer, self.order = mixer, order
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        segments: Int[Tensor, "batch tokens"] | None,
        special: Bool[Tensor, "batch tokens"] | None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads tokens"] | None]:
        """The next states, and the weights of the global view."""
        pre = self.order == "pre"
        given = self.norm1(x) if pre else x
        if isinstance(self.mixer, PoNetMixer):
            mixed, weights = self.mixer.view(given, mask, segments, special)
        else:
            mixed, weights = self.mixer(given, mask), None
        x = x + self.dropout(mixed)
        x = x if pre else self.norm1(x)
        given = self.norm2(x) if pre else x
        x = x + self.dropout(self.fc2(F.gelu(self.fc1(given))))
        return x if pre else self.norm2(x), weights


class PoNetEncoder(nn.Module):
    """Token ids to states, with a mixer in attention's place in every block.

    Args:
        vocabulary: number of tokens.
        dim, heads, depth, inner: of the network; the defaults are BERT-base's.
        longest: number of positions.
        order: `"post"`: norms behind sums, as BERT; `"pre"`: before, and one at the end, as for LRA.
        special: ids, such as those of [CLS] and [SEP], that cut a text into segments and keep to themselves; None for segments
            of equal length.
        apart: whether special tokens neither give nor take local and segment views, as in the pre-trained model.
        segments: of equal length, of the default mixer.
        mixer: by name, as of `variants`, or a function that builds one.
        types: kinds of segments of the input, 0 for none.
        padding: id of what is no token, told from the ids where no mask is given; None where there is none.
        dropout: in training.

    Example:
        >>> encoder = PoNetEncoder(30, dim=8, heads=2, depth=2, inner=16, longest=12, special=(1, 2))
        >>> found = encoder(torch.tensor([[1, 5, 6, 2, 7, 2, 0, 0]]))
        >>> found.states.shape, len(found.weights), found.weights[0].shape
        (torch.Size([1, 8, 8]), 2, torch.Size([1, 2, 8]))

    Source:
        Tan et al. 2022, arXiv 2110.02442.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 768,
        heads: int = 12,
        depth: int = 12,
        inner: int = 3072,
        longest: int = 512,
        order: Literal["post", "pre"] = "post",
        special: Sequence[int] | None = None,
        apart: bool = True,
        segments: int = 64,
        mixer: str | MixerMaker = "ponet",
        types: int = 2,
        padding: int | None = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, dim=dim, depth=depth, longest=longest)
        require_one_of(("post", "pre"), order=order)
        known = variants(segments)
        if isinstance(mixer, str):
            require_one_of(known, mixer=mixer)
            mixer = known[mixer]
        self.longest, self.order, self.padding = longest, order, padding
        self.special, self.apart = None if special is None else tuple(special), apart
        eps = EPS if order == "post" else 1e-5
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(longest, dim)
        self.types = nn.Embedding(types, dim) if types else None
        self.norm = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PoNetBlock(mixer(dim, heads, longest), dim, inner, order, dropout, eps) for _ in range(depth)
        )
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)

    @classmethod
    def lra(cls, vocabulary: int, longest: int, segments: int = 64, **settings: Any) -> PoNetEncoder:
        """The network of the Long Range Arena: two blocks of width 64, two heads, norms before.

        Args:
            vocabulary: number of tokens.
            longest: number of positions.
            segments: 64 for 2,000 to 4,000 tokens, 32 for 1,024.
            settings: of the encoder.
        """
        sizes = {"dim": 64, "heads": 2, "depth": 2, "inner": 128, "order": "pre", "types": 0, "padding": None}
        return cls(vocabulary, longest=longest, segments=segments, **{**sizes, **settings})

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        types: Int[Tensor, "batch tokens"] | None = None,
    ) -> Encoded:
        """States of the tokens.

        Args:
            ids: tokens.
            mask: True = a real token; None for those that are not `padding`.
            types: kinds of segments, default 0.
        """
        if ids.shape[1] > self.longest:
            raise InputError(f"ids: expected at most longest = {self.longest} tokens, got {ids.shape[1]}")
        mask = self.real(ids) if mask is None else mask
        x = self.words(ids) + self.places((mask.cumsum(1) - 1).clamp(min=0))
        if self.types is not None:
            x = x + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.dropout(self.norm(x) if self.order == "post" else x)
        segments = special = None
        if self.special is not None:
            special = special_tokens(ids, self.special) & mask
            segments = segments_between(special)
        weights = []
        for block in self.blocks:
            x, of_block = block(x, mask, segments, special if self.apart else None)
            weights += [] if of_block is None else [of_block]
        x = x if self.order == "post" else self.norm(x)
        return Encoded(x.masked_fill(~mask.unsqueeze(-1), 0.0), weights)

    def real(self, ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which ids are not `padding`."""
        return torch.ones_like(ids, dtype=torch.bool) if self.padding is None else ids != self.padding


class Predicted(NamedTuple):
    """Logits of the word at each place, and of how the second part of a text stands to the first."""

    words: Float[Tensor, "batch tokens vocabulary"]
    order: Float[Tensor, "batch 3"]


class PoNetForPretraining(nn.Module):
    """An encoder with heads for masked words and for the order of two segments: next, previous, or of elsewhere.

    Args:
        encoder: built with norms behind sums; its first token is read for the order.
    """

    def __init__(self, encoder: PoNetEncoder) -> None:
        super().__init__()
        vocabulary, dim = encoder.words.weight.shape
        self.encoder = encoder
        self.transform, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, EPS)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.pooler, self.order = nn.Linear(dim, dim), nn.Linear(dim, len(ORDERS))

    def forward(self, ids: Int[Tensor, "batch tokens"], types: Int[Tensor, "batch tokens"] | None = None) -> Predicted:
        """Logits of both tasks."""
        states = self.encoder(ids, types=types).states
        words = F.linear(self.norm(F.gelu(self.transform(states))), self.encoder.words.weight, self.bias)
        return Predicted(words, self.order(self.pooler(first_of(states, self.encoder.real(ids))).tanh()))


class PoNetClassifier(nn.Module):
    """An encoder and a classifier on the mean of the states, as for LRA, or on the first token's, as for GLUE.

    Args:
        encoder: any.
        classes: number of logits.
        read: `"mean"` or `"first"`.
    """

    def __init__(self, encoder: PoNetEncoder, classes: int, read: Literal["mean", "first"] = "mean") -> None:
        super().__init__()
        require_one_of(("mean", "first"), read=read)
        self.encoder, self.read = encoder, read
        self.head = nn.Linear(encoder.words.weight.shape[1], classes)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the texts."""
        mask = self.encoder.real(ids) if mask is None else mask
        states = self.encoder(ids, mask).states
        if self.read == "first":
            return self.head(first_of(states, mask))
        return self.head(states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
