"""Layers that know how far apart tokens are, as those of Transformer-XL, without memory of earlier chunks.

    s_ij = ((q_i + u) . k_j + (q_i + v) . W_r R_{i-j}) / sqrt(width of a head)

`R` is a sinusoid of the distance; `u` and `v` are shared by all layers of a model.

Source: Dai et al. (2019), arXiv 1901.02860; Nawrot et al. (2023), arXiv 2211.09761.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_rate
from cenote.reduce.dynamic_token_pooling.boundaries import activated


class Shared(NamedTuple):
    """What all layers of a stack are given besides the tokens.

    Attributes:
        content, distance: `u` and `v`, added to queries.
        table: `R`, of the distances from `tokens - 1` down to 0, or to `1 - tokens`.
        hidden: True = a key that a query may not read.
    """

    content: Float[Tensor, "heads width"]
    distance: Float[Tensor, "heads width"]
    table: Float[Tensor, "distances dim"]
    hidden: Bool[Tensor, "*items tokens tokens"]


class Past:
    """What a layer has read so far, some items having read more than others: keys, values, and the distances' own keys."""

    def __init__(self, batch: int, heads: int, width: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, 0, heads, width)
        self.values = like.new_zeros(batch, 0, heads, width)
        self.by_distance = like.new_zeros(0, heads, width)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)

    def add(
        self,
        items: Int[Tensor, "some"],
        key: Float[Tensor, "some heads width"],
        value: Float[Tensor, "some heads width"],
    ) -> None:
        """A token of some items."""
        at = self.lengths[items]
        room = int(at.max()) + 1 - self.keys.shape[1]
        if room > 0:
            # twice as many at a time, so that most steps copy nothing
            more = (0, 0, 0, 0, 0, max(room, self.keys.shape[1]))
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[items, at], self.values[items, at] = key, value
        self.lengths[items] = at + 1


class RelativeLayer(nn.Module):
    """Attention by content and distance, then a network of two layers on each token.

    Args:
        dim: of the tokens.
        heads, head_dim: of the attention.
        inner: hidden width of the network.
        dropout, attention_dropout: of outputs, and of weights.
        pre_norm: whether norms stand before attention and network, and not behind their sums with the tokens.
        activation: `"gelu"` or `"relu"`.

    Source: Dai et al. (2019), arXiv 1901.02860.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        inner: int,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        pre_norm: bool = False,
        activation: Literal["gelu", "relu"] = "gelu",
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, head_dim=head_dim, inner=inner)
        require_rate(dropout=dropout, attention_dropout=attention_dropout)
        self.heads, self.pre_norm, self.scale = heads, pre_norm, head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.distances = nn.Linear(dim, heads * head_dim)
        self.output = nn.Linear(heads * head_dim, dim)
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.network = nn.Sequential(
            nn.Linear(dim, inner),
            activated(activation),
            nn.Dropout(dropout),
            nn.Linear(inner, dim),
            nn.Dropout(dropout),
        )
        self.weight_dropout, self.output_dropout = nn.Dropout(attention_dropout), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch tokens dim"], shared: Shared) -> Float[Tensor, "batch tokens dim"]:
        """All tokens at once."""
        q, k, v = self._projected(x)
        r = self.distances(shared.table).unflatten(-1, (self.heads, -1))
        by_content = torch.einsum("bihd,bjhd->bhij", (q + shared.content) * self.scale, k)
        by_distance = shifted(torch.einsum("bihd,nhd->bhin", (q + shared.distance) * self.scale, r))
        hidden = shared.hidden if shared.hidden.dim() == 2 else shared.hidden[:, None]
        scores = (by_content + by_distance).masked_fill_(hidden, -torch.inf)
        weights = self.weight_dropout(scores.softmax(-1))
        return self._behind(x, torch.einsum("bhij,bjhd->bihd", weights, v))

    def step(
        self,
        x: Float[Tensor, "some dim"],
        content: Float[Tensor, "heads width"],
        distance: Float[Tensor, "heads width"],
        past: Past,
        items: Int[Tensor, "some"],
    ) -> Float[Tensor, "some dim"]:
        """One more token of some items, behind all that they have read.

        Args:
            x: the token of each of them.
            content, distance: see `Shared`.
            past: what this layer has read; it is given the token.
            items: their numbers in it.
        """
        q, k, v = self._projected(x)
        past.add(items, k, v)
        lengths = past.lengths[items]
        keys, values = (t[items, : int(lengths.max())] for t in (past.keys, past.values))
        if len(past.by_distance) < keys.shape[1]:
            table = sinusoids(torch.arange(past.keys.shape[1], device=x.device).to(x.dtype), x.shape[-1])
            past.by_distance = self.distances(table).unflatten(-1, (self.heads, -1))
        apart = lengths[:, None] - 1 - torch.arange(keys.shape[1], device=x.device)
        by_content = torch.einsum("bhd,bjhd->bhj", q + content, keys)
        by_distance = torch.einsum("bhd,nhd->bhn", q + distance, past.by_distance)
        by_distance = by_distance.gather(-1, apart.clamp(min=0)[:, None].expand_as(by_content))
        scores = ((by_content + by_distance) * self.scale).masked_fill((apart < 0)[:, None], -torch.inf)
        return self._behind(x, torch.einsum("bhj,bjhd->bhd", self.weight_dropout(scores.softmax(-1)), values))

    def _projected(self, x: Float[Tensor, "*rows dim"]) -> tuple[Tensor, ...]:
        read = self.attention_norm(x) if self.pre_norm else x
        return self.qkv(read).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def _behind(
        self, x: Float[Tensor, "*rows dim"], found: Float[Tensor, "*rows heads width"]
    ) -> Float[Tensor, "*rows dim"]:
        attended = x + self.output_dropout(self.output(found.flatten(-2)))
        if self.pre_norm:
            return attended + self.network(self.norm(attended))
        attended = self.attention_norm(attended)
        return self.norm(attended + self.network(attended))


def shifted(scores: Float[Tensor, "*rows queries distances"]) -> Float[Tensor, "*rows queries queries"]:
    """From scores of distances, the largest first, to scores of keys: `y_ij = x_i,(queries - 1 - (i - j))`.

    With as many distances as queries, what stands above the diagonal means nothing.

    >>> shifted(torch.tensor([[10.0, 11.0, 12.0], [20.0, 21.0, 22.0], [30.0, 31.0, 32.0]])).tril()
    tensor([[12.,  0.,  0.],
            [21., 22.,  0.],
            [30., 31., 32.]])
    """
    queries, distances = scores.shape[-2:]
    # one column more, read with rows that are one shorter: each row begins one column later than the row above
    skewed = F.pad(scores, (1, 0)).flatten(-2)[..., queries:].unflatten(-1, (queries, distances))
    return skewed[..., :queries]


def sinusoids(distances: Float[Tensor, "distances"], dim: int) -> Float[Tensor, "distances dim"]:
    """`sin(d f_c)` of all frequencies `f_c = 10000^(-2c / dim)`, and behind them `cos(d f_c)`."""
    if dim % 2:
        raise InputError(f"dim: expected an even width, for sines and cosines, got {dim}")
    frequencies = 10_000 ** -(torch.arange(0, dim, 2, device=distances.device, dtype=distances.dtype) / dim)
    angles = distances[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
