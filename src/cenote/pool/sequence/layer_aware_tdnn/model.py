from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.core.sets import PaddedTokens, Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import TokenBatchNorm
from cenote.pool.base import Pool, Pooled
from cenote.pool.layers.base import LayerPool, LayersPooled
from cenote.pool.sequence.attentive_statistics import AttentiveStatisticsPool
from cenote.pool.sequence.layer_aware_tdnn.fronts import D3Net, Ecapa2d, LayerFront, MapBatchNorm, cleared


class LayerAttentionPool(nn.Module):
    """A layer for every frame: each head opens or closes the layers of one frame, and the largest value goes on.

    `u = W_in BatchNorm(x)`, per head and frame `g = sigmoid(B(mean_k u) + B(max_k u))` with the bottleneck
    `B(z) = relu(z W1 + b1) W2 + b2` over layers; `y = BatchNorm(W_out max_l g_l u_l)`.

    Args:
        in_channels: of the map.
        out_channels: of the result; divided by `heads`.
        layers: number of layers, as trained; 2 at least.
        heads: each has its own gate and a slice of the channels.
        dropout: on the gates, while training.

    Raises:
        InputError: where the number of layers is not the trained one, or the heads do not divide the channels.

    Example:
        >>> LayerAttentionPool(16, 12, layers=5, heads=3)(torch.randn(2, 16, 5, 9)).shape
        torch.Size([2, 12, 9])

    Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models", ICAIIC 2026.

    Note:
        The gates are independent sigmoids and not a softmax, so that several layers of a frame can be open.
    """

    def __init__(
        self, in_channels: int, out_channels: int = 512, layers: int = 13, heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__()
        require_divides("heads", heads, out_channels)
        if layers < 2:
            raise InputError(
                f"layers: the gate's bottleneck has layers // 2 channels, so it needs 2 at least, got {layers}"
            )
        self.layers = layers
        self.heads = heads
        self.norm = MapBatchNorm(in_channels)
        self.inwards = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        narrow = layers // 2
        self.w1 = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(heads, layers, narrow)))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, narrow))
        self.w2 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, narrow, layers)))
        self.b2 = nn.Parameter(torch.zeros(heads, 1, layers))
        self.dropout = nn.Dropout(dropout)
        self.outwards = nn.Conv1d(out_channels, out_channels, 1, bias=False)
        self.out_norm = TokenBatchNorm(out_channels)

    def forward(
        self, x: Float[Tensor, "batch in_channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch out_channels tokens"]:
        """One vector per frame; zero in frames that are not real."""
        return self._largest(self._gated(x, mask), mask)

    def attend(
        self, x: Float[Tensor, "batch in_channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch out_channels tokens"], Float[Tensor, "batch layers tokens"]]:
        """As calling it, and also per frame the share of the channels in which each layer is the largest."""
        gated = self._gated(x, mask)
        chosen = F.one_hot(gated.flatten(1, 2).argmax(2), self.layers).to(gated.dtype)
        return self._largest(gated, mask), chosen.mean(1).transpose(1, 2)

    def _largest(
        self, gated: Float[Tensor, "batch heads channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_channels tokens"]:
        frames = self.outwards(gated.amax(3).flatten(1, 2)).transpose(1, 2)
        tokens = PaddedTokens(frames, mask)
        return tokens.replace(self.out_norm.normalised(tokens, tokens.values)).values.transpose(1, 2)

    def _gated(
        self, x: Float[Tensor, "batch in_channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch heads channels layers tokens"]:
        u = self.projected(x, mask)
        return u.unflatten(1, (self.heads, -1)) * self.dropout(self.gates(u)).unsqueeze(2)

    def projected(
        self, x: Float[Tensor, "batch in_channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch out_channels layers tokens"]:
        """The map that the gates choose from."""
        if x.shape[2] != self.layers:
            raise InputError(f"x: this module was built for {self.layers} layers, got {x.shape[2]}")
        return self.inwards(self.norm(x, mask))

    def gates(self, u: Float[Tensor, "batch out_channels layers tokens"]) -> Float[Tensor, "batch heads layers tokens"]:
        """How far each layer of each frame is open, from 0 to 1, of the projected map `u`."""
        by_head = u.unflatten(1, (self.heads, -1))
        return torch.sigmoid(self._bottleneck(by_head.mean(2)) + self._bottleneck(by_head.amax(2)))

    def _bottleneck(self, z: Float[Tensor, "batch heads layers tokens"]) -> Float[Tensor, "batch heads layers tokens"]:
        rows = z.transpose(2, 3)
        return (torch.relu(rows @ self.w1 + self.b1) @ self.w2 + self.b2).transpose(2, 3)


class SpeakerStatisticsPool(Pool):
    """Attentive statistics with context, normalised and mapped to the embedding.

    `y = BatchNorm(W BatchNorm(attentive_statistics(x)) + b)`, with a ReLU and a BatchNorm in the score network.

    Args:
        dim: width of a frame.
        out_dim: width of the embedding.
        dropout: on the attention, while training.

    Example:
        >>> SpeakerStatisticsPool(16, 5).eval()(torch.randn(2, 9, 16)).shape
        torch.Size([2, 5])

    Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models", ICAIIC 2026.

    Note:
        The deviation that the attention sees divides by the number of frames, with and without a mask; without one the
        authors' code divides by one less, which is NaN for a single frame.
        The bias of the last map drops out of the BatchNorm while training; it is kept so that published weights load.
    """

    def __init__(self, dim: int, out_dim: int = 192, dropout: float = 0.1) -> None:
        super().__init__(dim, out_dim)
        self.statistics = AttentiveStatisticsPool(
            dim, max(dim // 2, 1), activation="relu", batch_norm=True, eps=1e-4, dropout=dropout
        )
        self.norm = nn.BatchNorm1d(2 * dim)
        self.projection = nn.Linear(2 * dim, out_dim)
        self.out_norm = nn.BatchNorm1d(out_dim)
        self.inert_parameters = (
            *(f"statistics.{name}" for name in self.statistics.inert_parameters),
            "norm.bias",
            "projection.bias",
        )

    def pool(self, tokens: Tokens) -> Pooled:
        if self.training and tokens.batch < 2:
            raise InputError("x: the BatchNorm of the embedding cannot train on one set; give a batch of two or more")
        statistics, weights = self.statistics.pool(tokens)
        return Pooled(self.out_norm(self.projection(self.norm(statistics))), weights)


class LayerAwareTDNN(LayerPool):
    """One vector from all hidden states of a clip: mix layers and frames, choose layers per frame, pool over frames.

    A convolution network over the map of layers and frames, `LayerAttentionPool`, `SpeakerStatisticsPool`. The weights are what
    the last pooling took from each frame, mean over channels, times the share of the channels in which each layer was chosen.

    Args:
        dim: width of a hidden state.
        layers: number of hidden states of a frame, the embedding output included.
        out_dim: width of the embedding.
        channels: inside the convolutions.
        front: `"ecapa"` (`Ecapa2d`), `"d3net"` (`D3Net`), or `None`: the layer pooling alone.
        hidden: width after the layer pooling.
        heads: of the layer pooling; `None`: 8, or the largest divisor of `hidden` below it.
        loss_heads: slices of the embedding that are normalised on their own, as many as the loss has heads.
        dropout: on gates and attention, while training.

    Raises:
        InputError: naming the argument, what came and what was expected.

    Example:
        >>> model = LayerAwareTDNN(16, layers=5, channels=16, hidden=24).eval()
        >>> model(torch.randn(2, 5, 9, 16)).shape
        torch.Size([2, 192])

    Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models", ICAIIC 2026 (first
    version: arXiv 2409.07770, 2024).

    Note:
        A mask holds for the whole network; in the authors' code it reaches the last pooling only, and padding leaks through
        the convolutions.
    """

    def __init__(
        self,
        dim: int,
        layers: int = 13,
        out_dim: int = 192,
        channels: int = 256,
        front: Literal["ecapa", "d3net"] | None = "ecapa",
        hidden: int = 512,
        heads: int | None = None,
        loss_heads: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(dim, layers, out_dim)
        require_one_of(("ecapa", "d3net", None), front=front)
        require_divides("loss_heads", loss_heads, out_dim)
        self.loss_heads = loss_heads
        self.permutation_invariant = front is None
        self.front: LayerFront | None = None
        if front is not None:
            self.front = Ecapa2d(dim, channels) if front == "ecapa" else D3Net(dim, channels)
        width = dim if self.front is None else self.front.out_channels
        heads = largest_divisor(hidden, 8) if heads is None else heads
        self.layer_pool = LayerAttentionPool(width, hidden, layers, heads, dropout)
        self.time_pool = SpeakerStatisticsPool(hidden, out_dim, dropout)
        self.inert_parameters = tuple(f"time_pool.{name}" for name in self.time_pool.inert_parameters)

    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        if x.shape[2] == 0:
            return LayersPooled(x.new_zeros((x.shape[0], self.out_dim)), x.new_zeros((x.shape[0], 1, x.shape[1], 0)))
        frames, shares = self.layer_pool.attend(self._map(x, mask), mask)
        output, weights = self.time_pool.attend(frames.transpose(1, 2), mask)
        assert weights is not None
        return LayersPooled(output, (weights.mean(1, keepdim=True) * shares).unsqueeze(1))

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        if x.shape[2] == 0:
            return x.new_zeros((x.shape[0], self.out_dim))
        return self.time_pool(self._frames(x, mask), mask)

    def embed(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch loss_heads slice"]:
        """The embedding as it is compared at test time: cut for the heads of the loss, each slice of length one."""
        return F.normalize(self(x, mask).unflatten(-1, (self.loss_heads, -1)), dim=-1)

    def frames(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens hidden"]:
        """One vector per frame, before pooling over time; zero in frames that are not real."""
        return self._frames(self._checked(x, mask), mask)

    def layer_gates(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads layers tokens"]:
        """How far each layer of each frame is open, from 0 to 1; 0 in frames that are not real."""
        y = self._map(self._checked(x, mask), mask)
        return cleared(self.layer_pool.gates(self.layer_pool.projected(y, mask)), mask)

    def _frames(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens hidden"]:
        return self.layer_pool(self._map(x, mask), mask).transpose(1, 2)

    def _map(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch channels layers tokens"]:
        maps = x.permute(0, 3, 1, 2)
        return maps if self.front is None else self.front(maps, mask)
