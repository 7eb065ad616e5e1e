"""Encoders of streams that see no future: what a frame becomes does not change when later ones come."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.widths import require_divides

EncoderKind = Literal["conformer", "transformer", "lstm"]
LayerState = tuple[Tensor, Tensor]
"""What a layer remembers: the inputs of attention and of the convolution, or of an LSTM its two states."""


class CausalAttention(nn.Module):
    """Each frame reads itself and the `context` frames before it, with a learned number for each distance.

    Args:
        dim: width of a frame.
        heads: divides `dim`.
        context: frames before.
    """

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        require_divides("heads", heads, dim)
        require_at_least(0, context=context)
        self.heads = heads
        self.context = context
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.distance = nn.Parameter(torch.zeros(heads, context + 1))

    def step(
        self, x: Float[Tensor, "batch frames dim"], before: Float[Tensor, "batch _before dim"]
    ) -> tuple[Float[Tensor, "batch frames dim"], Float[Tensor, "batch _kept dim"]]:
        """What is added to the frames, and the frames that the next ones may read."""
        seen = torch.cat([before, self.norm(x)], 1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(seen).chunk(3, -1))
        q = q[:, :, before.shape[1] :]
        places = torch.arange(seen.shape[1], device=x.device)
        apart = places[before.shape[1] :, None] - places[None, :]
        allowed = (apart >= 0) & (apart <= self.context)
        bias = self.distance[:, apart.clamp(0, self.context)].masked_fill(~allowed, float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return self.out(y.transpose(1, 2).flatten(2)), seen[:, max(seen.shape[1] - self.context, 0) :]


class CausalConvolution(nn.Module):
    """The convolution of a Conformer over a frame and those before it: gate, one filter per channel, swish.

    Args:
        dim: width of a frame.
        kernel: frames that a filter reads, the last of them the present one.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        require_at_least(1, kernel=kernel)
        self.kernel = kernel
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim)
        self.filter = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.inner = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def step(
        self, x: Float[Tensor, "batch frames dim"], before: Float[Tensor, "batch _before dim"]
    ) -> tuple[Float[Tensor, "batch frames dim"], Float[Tensor, "batch _kept dim"]]:
        """What is added to the frames, and what the filters will read again."""
        seen = torch.cat([before, F.glu(self.gate(self.norm(x)), -1)], 1)
        # before the first frame there is silence
        filled = F.pad(seen, (0, 0, self.kernel - 1 - before.shape[1], 0)).transpose(1, 2)
        y = self.filter(filled).transpose(1, 2)
        return self.out(F.silu(self.inner(y))), seen[:, max(seen.shape[1] - self.kernel + 1, 0) :]


class CausalBlock(nn.Module):
    """A block of a Conformer that sees no future, or with `kernel=None` of a transformer.

    Conformer: half a feed-forward, attention, convolution, half a feed-forward, each added, then a norm. Transformer:
    attention and a feed-forward, each added.

    Args:
        dim, heads, context: of `CausalAttention`.
        kernel: of `CausalConvolution`; `None`: there is none.
        hidden: width of the feed-forward.
        dropout: of what is added, while training.
    """

    def __init__(
        self, dim: int, heads: int, context: int, kernel: int | None, hidden: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.attention = CausalAttention(dim, heads, context)
        self.convolution = None if kernel is None else CausalConvolution(dim, kernel)
        self.first = None if kernel is None else _feed_forward(dim, hidden)
        self.last = _feed_forward(dim, hidden)
        self.norm = nn.Identity() if kernel is None else nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def step(
        self, x: Float[Tensor, "batch frames dim"], state: LayerState | None
    ) -> tuple[Float[Tensor, "batch frames dim"], LayerState]:
        """The next frames, and what the block remembers."""
        attended, filtered = (x[:, :0], x[:, :0]) if state is None else state
        half = 1.0 if self.first is None else 0.5
        if self.first is not None:
            x = x + half * self.dropout(self.first(x))
        added, attended = self.attention.step(x, attended)
        x = x + self.dropout(added)
        if self.convolution is not None:
            added, filtered = self.convolution.step(x, filtered)
            x = x + self.dropout(added)
        return self.norm(x + half * self.dropout(self.last(x))), (attended, filtered)


class StreamingEncoder(nn.Module):
    """Frames of a stream, each aware of those before it: a Conformer, a transformer, or an LSTM.

    Packets of any size give what the whole stream gives; the state does not grow.

    Args:
        in_dim: width of a frame as it comes.
        dim: width inside and of the result.
        layers: number of blocks.
        kind: `"conformer"`, `"transformer"` or `"lstm"`.
        heads: divides `dim`; an LSTM has none.
        context: frames before the present one that attention reads.
        kernel: frames that the convolution of a Conformer reads.
        hidden: width of the feed-forward; default `4 dim`. `matched` chooses widths so that encoders are of one size.
        dropout: while training.

    Raises:
        InputError: where an argument is out of range.

    Example:
        >>> encoder = StreamingEncoder(20, dim=16, layers=2).eval()
        >>> state, pieces = None, []
        >>> stream = torch.randn(3, 30, 20)
        >>> for packet in stream.split(7, dim=1):
        ...     piece, state = encoder.step(packet, state)
        ...     pieces.append(piece)
        >>> torch.allclose(torch.cat(pieces, 1), encoder(stream), atol=1e-5)
        True

    Source: Gulati et al., "Conformer", Interspeech 2020, causal as for Wang et al., "Attentive Temporal Pooling for
    Conformer-based Streaming Language Identification in Long-form Speech", Odyssey 2022.

    Note:
        Distances are learned biases, and the convolution is normalised frame by frame, so that a stream needs no look ahead;
        the authors' sizes were not read.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int = 144,
        layers: int = 4,
        kind: EncoderKind = "conformer",
        heads: int = 4,
        context: int = 64,
        kernel: int = 15,
        hidden: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_one_of(get_args(EncoderKind), kind=kind)
        require_at_least(1, in_dim=in_dim, dim=dim, layers=layers)
        self.kind = kind
        self.dim = dim
        self.inwards = nn.Linear(in_dim, dim)
        hidden = 4 * dim if hidden is None else hidden
        self.layers = nn.ModuleList(
            nn.LSTM(dim, dim, batch_first=True)
            if kind == "lstm"
            else CausalBlock(dim, heads, context, kernel if kind == "conformer" else None, hidden, dropout)
            for _ in range(layers)
        )

    def step(
        self, x: Float[Tensor, "batch frames in_dim"], state: list[LayerState] | None = None
    ) -> tuple[Float[Tensor, "batch frames dim"], list[LayerState]]:
        """The next frames of each stream, any number of them, and the state to go on with."""
        y, kept = self.inwards(x), []
        if not x.shape[1]:
            return y, self._silence(y) if state is None else state
        for number, layer in enumerate(self.layers):
            own = None if state is None else state[number]
            y, now = layer(y, own) if isinstance(layer, nn.LSTM) else layer.step(y, own)  # type: ignore[operator]
            kept.append(now)
        return y, kept

    def _silence(self, y: Float[Tensor, "batch 0 dim"]) -> list[LayerState]:
        zeros = y.new_zeros(1, len(y), self.dim)
        return [(zeros, zeros) if isinstance(layer, nn.LSTM) else (y, y) for layer in self.layers]

    def forward(self, x: Float[Tensor, "batch frames in_dim"]) -> Float[Tensor, "batch frames dim"]:
        """All frames of whole streams; what is padded must stand at the end."""
        return self.step(x)[0]


def matched(like: StreamingEncoder, in_dim: int, kind: EncoderKind, **settings: int) -> StreamingEncoder:
    """An encoder of another kind with about as many parameters, its width chosen so.

    >>> conformer = StreamingEncoder(8, dim=16, layers=2)
    >>> count = lambda m: sum(p.numel() for p in m.parameters())
    >>> abs(count(matched(conformer, 8, "lstm", layers=2)) / count(conformer) - 1) < 0.1
    True
    """
    wanted = _size(like)
    heads = settings.get("heads", 4)
    widths = range(heads, 8 * like.dim, heads)
    with torch.device("meta"):
        best = min(widths, key=lambda d: abs(_size(StreamingEncoder(in_dim, d, kind=kind, **settings)) - wanted))
    return StreamingEncoder(in_dim, best, kind=kind, **settings)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _feed_forward(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
