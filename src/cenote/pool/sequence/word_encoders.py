"""Encoders that give a vector for each word of a sentence: convolutions, LSTMs, convolutions over a tree; and words' places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import real_tokens
from cenote.core.requirements import require_all_positive, require_at_least, require_rate


class PlaceEmbedding(nn.Module):
    """A vector for the distance of each word to a certain one, `E[n - p]`.

    Args:
        reach: distances from `-reach` to `reach - 1` have vectors; further words have that of the furthest.
        width: of a vector.

    Example:
        >>> PlaceEmbedding(5, 3)(torch.tensor([[0], [4]]), 7).shape
        torch.Size([2, 7, 3])
    """

    def __init__(self, reach: int, width: int) -> None:
        super().__init__()
        require_at_least(1, reach=reach, width=width)
        self.reach = reach
        self.table = nn.Embedding(2 * reach, width)

    def forward(self, place: Int[Tensor, "batch 1"], words: int) -> Float[Tensor, "batch words width"]:
        """Vectors of `words` words; `place` is the one they are measured from."""
        distance = torch.arange(words, device=place.device) - place
        return self.table(distance.clamp(-self.reach, self.reach - 1) + self.reach)


class ConvolutionEncoder(nn.Module):
    """Convolutions over the words, side by side: `h_n = [ReLU(W_1 x_{n-..n+..} + b_1) ; ...]`, one per window.

    Args:
        dim: width of a word.
        filters: of each window.
        windows: words that a filter sees; an even one sees one more to the right.

    Attributes:
        out_dim: `filters * len(windows)`.

    Example:
        >>> ConvolutionEncoder(8, 6)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 24])
    """

    def __init__(self, dim: int, filters: int, windows: Sequence[int] = (2, 3, 4, 5)) -> None:
        super().__init__()
        require_at_least(1, dim=dim, filters=filters)
        require_all_positive(windows=windows)
        self.out_dim = filters * len(windows)
        self.maps = nn.ModuleList(nn.Conv1d(dim, filters, window, padding=(window - 1) // 2) for window in windows)

    def forward(
        self, x: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"] | None = None
    ) -> Float[Tensor, "batch words out_dim"]:
        """A vector per word; beyond the sentence, and in padded slots, stand zeros."""
        channels = _cleaned(x, mask).transpose(1, 2)
        found = []
        for map_ in self.maps:
            assert isinstance(map_, nn.Conv1d)
            even = map_.kernel_size[0] % 2 == 0
            h = map_(F.pad(channels, (0, 1)))[..., : x.shape[1]] if even else map_(channels)
            found.append(torch.relu(h))
        return torch.cat(found, 1).transpose(1, 2)


class RecurrentEncoder(nn.Module):
    """An LSTM over the words, one way or both.

    Args:
        dim: width of a word.
        hidden: width of the states of one direction.
        bidirectional: whether a second one reads from the end.
        layers: one on the other.
        dropout: between layers.

    Attributes:
        out_dim: `hidden`, twice that of both directions.

    Example:
        >>> RecurrentEncoder(8, 6)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 12])

    Note:
        Padding stands behind the words, so that both directions read words alone; a mask with other padding is refused.
    """

    def __init__(
        self, dim: int, hidden: int, bidirectional: bool = True, layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden, layers=layers)
        require_rate(dropout=dropout)
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(dim, hidden, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
        self.hidden = hidden
        self.out_dim = hidden * (1 + bidirectional)

    def forward(
        self, x: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"] | None = None
    ) -> Float[Tensor, "batch words out_dim"]:
        """A state per word, zeros in padded slots."""
        if mask is None or not x.numel():
            return self.lstm(x)[0]
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise InputError("mask: expected padding behind the words, so that an LSTM reads words alone")
        lengths = mask.sum(1)
        # an empty sentence is read as one word and left out again
        packed = nn.utils.rnn.pack_padded_sequence(
            _cleaned(x, mask), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        states = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], True, total_length=x.shape[1])[0]
        return states.masked_fill(~mask.unsqueeze(-1), 0)

    def ends(
        self, states: Float[Tensor, "batch words out_dim"], mask: Bool[Tensor, "batch words"] | None = None
    ) -> Float[Tensor, "batch out_dim"]:
        """The last state of each direction: that of the last word, and of the other that of the first."""
        last = (real_tokens(states, mask).sum(1) - 1).clamp(min=0)
        rows = torch.arange(len(states), device=states.device)
        return torch.cat([states[rows, last, : self.hidden], states[:, 0, self.hidden :]], -1)


class TreeConvolution(nn.Module):
    """Graph convolutions over the dependency tree: each word sees itself and those that it hangs on or that hang on it.

    `h_i = ReLU((sum_{j = i or beside i} W h_j) / (1 + d_i) + b)`, `d_i` the number of its neighbours, layer by layer.

    Args:
        dim: width of a word.
        hidden: width of a layer.
        layers: how many steps of the tree a word sees.
        dropout: between layers.

    Attributes:
        out_dim: `hidden`.

    Example:
        >>> TreeConvolution(8, 6)(torch.randn(1, 3, 8), torch.tensor([[1, -1, 1]])).shape
        torch.Size([1, 3, 6])

    Source: Zhang, Qi, Manning, "Graph Convolution over Pruned Dependency Trees Improves Relation Extraction", EMNLP 2018.
    """

    def __init__(self, dim: int, hidden: int, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden, layers=layers)
        require_rate(dropout=dropout)
        self.out_dim = hidden
        self.maps = nn.ModuleList(nn.Linear(dim if i == 0 else hidden, hidden) for i in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch words dim"],
        heads: Int[Tensor, "batch words"],
        mask: Bool[Tensor, "batch words"] | None = None,
    ) -> Float[Tensor, "batch words out_dim"]:
        """A vector per word; `heads` of each the index of its head (-1: root, -2: padding)."""
        beside = neighbours(heads, real_tokens(x, mask)).to(x.dtype)
        share = beside / beside.sum(-1, keepdim=True).clamp(min=1)
        h = _cleaned(x, mask)
        for i, map_ in enumerate(self.maps):
            assert isinstance(map_, nn.Linear)
            h = torch.relu(share @ F.linear(h, map_.weight) + map_.bias)
            h = self.dropout(h) if i + 1 < len(self.maps) else h
        return h if mask is None else h.masked_fill(~mask.unsqueeze(-1), 0)


class TreeEncoder(nn.Module):
    """A bidirectional LSTM, and graph convolutions over the tree on its states.

    Args:
        dim: width of a word.
        hidden: width of the states of one direction, and of the convolutions.
        layers: of the convolutions.
        dropout: between them.

    Attributes:
        out_dim: `hidden`.

    Example:
        >>> TreeEncoder(8, 6)(torch.randn(1, 3, 8), None, torch.tensor([[1, -1, 1]])).shape
        torch.Size([1, 3, 6])
    """

    def __init__(self, dim: int, hidden: int, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.states = RecurrentEncoder(dim, hidden)
        self.tree = TreeConvolution(self.states.out_dim, hidden, layers, dropout)
        self.out_dim = hidden

    def forward(
        self,
        x: Float[Tensor, "batch words dim"],
        mask: Bool[Tensor, "batch words"] | None = None,
        heads: Int[Tensor, "batch words"] | None = None,
    ) -> Float[Tensor, "batch words out_dim"]:
        """A vector per word.

        Raises:
            InputError: where no heads are given.
        """
        if heads is None:
            raise InputError("heads: this encoder reads the tree of each sentence; give the head of each word")
        return self.tree(self.states(x, mask), heads, mask)


def neighbours(
    heads: Int[Tensor, "batch words"], real: Bool[Tensor, "batch words"]
) -> Bool[Tensor, "batch words words"]:
    """Which words each one sees: itself, the one that it hangs on, and those that hang on it.

    >>> neighbours(torch.tensor([[1, -1, -2]]), torch.tensor([[True, True, False]]))[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    slots = torch.arange(heads.shape[1], device=heads.device)
    hangs = heads.unsqueeze(-1) == slots
    seen = hangs | hangs.transpose(1, 2) | (slots.unsqueeze(-1) == slots)
    return seen & real.unsqueeze(-1) & real.unsqueeze(-2)


def _cleaned(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
