"""A causal language model whose layers' scores are chosen: the whole model that ways of encoding positions are compared in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.mix.base import ScoreModifier
from cenote.mix.scored_attention import Read, ScoredAttention

Norm = Literal["layer", "rms"]
FeedForward = Literal["relu", "gelu", "gated"]


class Decoded(NamedTuple):
    """What a decoder makes of its tokens.

    Attributes:
        logits: of the token behind each.
        cache: what each layer has read, to go on from.
    """

    logits: Float[Tensor, "batch tokens vocabulary"]
    cache: tuple[Read, ...]


class ScoredDecoder(nn.Module):
    """A decoder of blocks of attention and feed-forward layers, with scores of your own in every block.

    Args:
        vocabulary: number of tokens.
        scores: makes the scores of the layer of each number; called once per layer, and may give the same object again, which
            then is shared.
        layers, dim, heads, kv_heads: as usual.
        inner: width of the feed-forward layers; `4 dim` by default.
        absolute: so many learned positions are added to the embeddings; None for none.
        norm: `"layer"` or `"rms"`.
        pre_norm: norms stand before attention and feed-forward layers, with one behind the last; otherwise behind each sum.
        feed_forward: `"relu"`, `"gelu"`, or `"gated"` (SwiGLU).
        tied: the output map is the embedding.
        bias: of the maps.
        dropout: of embeddings, weights, and what is added to the stream.

    Example:
        >>> from cenote.mix.position_scores import Rotary
        >>> model = ScoredDecoder(11, lambda layer: Rotary(8), layers=2, dim=16, heads=2).eval()
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape, model.generate(torch.tensor([[1, 2, 3]]), 2).shape
        (torch.Size([1, 3, 11]), torch.Size([1, 5]))
    """

    def __init__(
        self,
        vocabulary: int,
        scores: Callable[[int], ScoreModifier],
        layers: int = 4,
        dim: int = 256,
        heads: int = 4,
        kv_heads: int | None = None,
        inner: int | None = None,
        absolute: int | None = None,
        norm: Norm = "layer",
        pre_norm: bool = True,
        feed_forward: FeedForward = "relu",
        tied: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least(1, vocabulary=vocabulary, layers=layers, dim=dim, heads=heads)
        require_one_of(get_args(Norm), norm=norm)
        require_one_of(get_args(FeedForward), feed_forward=feed_forward)
        require_rate(dropout=dropout)
        inner = 4 * dim if inner is None else inner
        self.embedding = nn.Embedding(vocabulary, dim)
        self.places = None if absolute is None else nn.Embedding(absolute, dim)
        for table in (self.embedding, self.places):
            if table is not None:
                nn.init.normal_(table.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(
            Block(
                ScoredAttention(dim, heads, scores(i), kv_heads=kv_heads, causal=True, bias=bias, dropout=dropout),
                Gated(dim, inner, bias) if feed_forward == "gated" else _plain(dim, inner, bias, feed_forward),
                [_norm(norm, dim) for _ in range(2)],
                pre_norm,
                dropout,
            )
            for i in range(layers)
        )
        self.norm = _norm(norm, dim) if pre_norm else nn.Identity()
        self.output = None if tied else nn.Linear(dim, vocabulary, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        cache: Sequence[Read] | None = None,
    ) -> Decoded:
        """Read tokens, behind those that the cache holds.

        Args:
            tokens: their numbers.
            mask: True = a real token; padding may stand at either end, and is read by none.
            cache: of an earlier call.

        Raises:
            InputError: for more tokens than there are learned positions.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        before = 0 if cache is None else cache[0].real.sum(1, keepdim=True)
        positions = (before + mask.long().cumsum(1) - 1).clamp(min=0)
        h = self.embedding(tokens)
        if self.places is not None:
            if positions.numel() and int(positions.max()) >= self.places.num_embeddings:
                raise InputError(
                    f"tokens: {int(positions.max()) + 1} of an item, and this model has {self.places.num_embeddings} positions"
                )
            h = h + self.places(positions)
        h, kept = self.dropout(h), []
        for i, block in enumerate(self.blocks):
            h, read = block(h, mask, positions, None if cache is None else cache[i])
            kept.append(read)
        h = self.norm(h)
        return Decoded(h @ self.embedding.weight.mT if self.output is None else self.output(h), tuple(kept))

    @torch.no_grad()
    def generate(
        self, tokens: Int[Tensor, "batch tokens"], count: int, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Int[Tensor, "batch longer"]:
        """The most probable tokens, `count` of them one by one, behind a prompt that is padded on the left or not at all.

        Raises:
            InputError: where an item ends in padding.
        """
        require_at_least(1, count=count)
        if mask is not None and not bool(mask[:, -1].all()):
            raise InputError("mask: an item ends in padding, and what follows would stand behind it; pad on the left")
        found, cache = [tokens], None
        for _ in range(count):
            logits, cache = self(found[-1], mask, cache)
            mask = None
            found.append(logits[:, -1:].argmax(-1))
        return torch.cat(found, 1)


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to the stream."""

    def __init__(
        self,
        attention: ScoredAttention,
        feed_forward: nn.Module,
        norms: Sequence[nn.Module],
        pre_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.norms = attention, feed_forward, nn.ModuleList(norms)
        self.pre_norm, self.dropout = pre_norm, nn.Dropout(dropout)

    def forward(
        self,
        h: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
        past: Read | None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Read]:
        """The stream behind the block, and what its attention has read."""
        first, second = self.norms
        given = first(h) if self.pre_norm else h
        y, kept = self.attention.read(given, mask, positions, past)
        h = h + self.dropout(y)
        h = h if self.pre_norm else first(h)
        h = h + self.dropout(self.feed_forward(second(h) if self.pre_norm else h))
        return h if self.pre_norm else second(h), kept


class Gated(nn.Module):
    """`W_3 (silu(W_1 x) * W_2 x)`.

    Source: Shazeer (2020), arXiv 2002.05202.
    """

    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, inner, bias), nn.Linear(dim, inner, bias)
        self.down = nn.Linear(inner, dim, bias)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Each token for itself."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def next_token_losses(
    logits: Float[Tensor, "batch tokens vocabulary"], tokens: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch following"]:
    """Cross-entropy of every token but the first, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


def _norm(name: Norm, dim: int) -> nn.Module:
    return nn.LayerNorm(dim) if name == "layer" else nn.RMSNorm(dim)


def _plain(dim: int, inner: int, bias: bool, activation: FeedForward) -> nn.Module:
    between = nn.ReLU() if activation == "relu" else nn.GELU()
    return nn.Sequential(nn.Linear(dim, inner, bias), between, nn.Linear(inner, dim, bias))
