"""The two convolution networks of the Layer-aware TDNN, over a map of layers and frames with the features as channels.

A `mask` is True on real frames. What stands in other frames never reaches a real one: every map is cleared before a
convolution reads it, as if the clip ended there, and the averages and running statistics leave it out.

Source: "Layer-aware TDNN: Speaker Recognition Using Multi-Layer Features from Pre-Trained Models", ICAIIC 2026. The blocks
are two-dimensional forms of those of ECAPA-TDNN (Desplanques, Thienpondt, Demuynck, Interspeech 2020) and D3Net
(Takahashi, Mitsufuji, CVPR 2021).

Note: the authors' code takes no mask here, so that there padding leaks into the frames beside it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.sets import PaddedTokens
from cenote.core.widths import require_divides
from cenote.pool.attention.blocks import TokenBatchNorm

BOTTLENECK = 128


def cleared(
    x: Float[Tensor, "batch channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch channels layers tokens"]:
    """The map with zeros in frames that are not real."""
    return x if mask is None else x.masked_fill(~mask[:, None, None], 0)


class MapBatchNorm(TokenBatchNorm):
    """BatchNorm over the layers and real frames of maps.

    Args:
        num_features: number of channels.
    """

    def forward(
        self, x: Float[Tensor, "batch channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch channels layers tokens"]:
        """The normalised map; frames that are not real become zero."""
        layers, frames = x.shape[2:]
        real = None if mask is None else mask.unsqueeze(1).expand(-1, layers, -1).flatten(1)
        rows = PaddedTokens(x.flatten(2).transpose(1, 2), real)
        y = self.normalised(rows, rows.values).transpose(1, 2).unflatten(2, (layers, frames))
        return cleared(y, mask)


class ConvReluBn(nn.Module):
    """`BatchNorm(relu(conv(x)))`, the map keeping its size.

    Args:
        in_channels, out_channels: of the map.
        kernel: layers and frames that one output sees.
        dilation: in both directions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int] = (1, 1), dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding="same", dilation=dilation)
        self.bn = MapBatchNorm(out_channels)
        _initialise(self.conv)

    def forward(
        self, x: Float[Tensor, "batch in_channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch out_channels layers tokens"]:
        return self.bn(torch.relu(self.conv(cleared(x, mask))), mask)


class SqueezeExcitation(nn.Module):
    """`x * sigmoid(W2 relu(W1 mean(x)))`, the mean over layers and real frames.

    Args:
        channels: of the map.
        bottleneck: width between the two maps.
    """

    def __init__(self, channels: int, bottleneck: int = BOTTLENECK) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, bottleneck, 1)
        self.up = nn.Conv2d(bottleneck, channels, 1)
        _initialise(self.down, self.up)

    def forward(
        self, x: Float[Tensor, "batch channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch channels layers tokens"]:
        mean = PaddedTokens(x.mean(2).transpose(1, 2), mask).mean()[..., None, None]
        return x * torch.sigmoid(self.up(torch.relu(self.down(mean))))


class Res2Block(nn.Module):
    """`y = x + SE(conv1x1(Res2(conv1x1(x))))`, in Res2 each slice of channels reading the result of the slice before.

    Args:
        channels: of the map; divided by `slices`.
        dilation: of the 3x3 convolutions.
        slices: number of slices; the last passes unchanged.
    """

    def __init__(self, channels: int, dilation: int, slices: int = 8) -> None:
        super().__init__()
        require_divides("slices", slices, channels)
        self.slices = slices
        self.before = ConvReluBn(channels, channels)
        width = channels // slices
        self.convs = nn.ModuleList(ConvReluBn(width, width, (3, 3), dilation) for _ in range(slices - 1))
        self.after = ConvReluBn(channels, channels)
        self.se = SqueezeExcitation(channels)

    def forward(
        self, x: Float[Tensor, "batch channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch channels layers tokens"]:
        *slices, last = self.before(x, mask).chunk(self.slices, 1)
        out: list[Tensor] = []
        for conv, piece in zip(self.convs, slices, strict=True):
            out.append(conv(out[-1] + piece if out else piece, mask))
        return x + self.se(self.after(torch.cat([*out, last], 1), mask), mask)


class D2Block(nn.Module):
    """Dilations 1, 2, 4, ... on ever fewer channels: each step adds a convolution and lets the last channels go.

    Args:
        channels: of the map; divided by `depth`.
        depth: number of steps.
    """

    def __init__(self, channels: int, depth: int = 4) -> None:
        super().__init__()
        require_divides("depth", depth, channels)
        self.kept = [channels * (depth - d) // depth for d in range(depth)]
        self.convs = nn.ModuleList(ConvReluBn(c, c, (3, 3), 2**d) for d, c in enumerate(self.kept))
        self.se = SqueezeExcitation(channels)

    def forward(
        self, x: Float[Tensor, "batch channels layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch channels layers tokens"]:
        done: list[Tensor] = []
        for conv, following in zip(self.convs, [*self.kept[1:], 0], strict=True):
            x = x + conv(x, mask)
            done.append(x[:, following:])
            x = x[:, :following]
        return self.se(torch.cat(done, 1), mask)


class LayerFront(nn.Module):
    """What both fronts share: a first convolution, blocks one after the other, and a 1x1 map of all their results.

    Args:
        dim: width of a hidden state.
        channels: of the map inside.
        kernel: of the first convolution, layers and frames.
        blocks: take and give `channels` channels.

    Attributes:
        out_channels: of the result, `len(blocks) * channels`.
    """

    def __init__(self, dim: int, channels: int, kernel: tuple[int, int], blocks: list[nn.Module]) -> None:
        super().__init__()
        if not blocks:
            raise InputError("blocks: a front needs at least one block")
        self.out_channels = len(blocks) * channels
        self.norm = MapBatchNorm(dim)
        self.conv = ConvReluBn(dim, channels, kernel)
        self.blocks = nn.ModuleList(blocks)
        self.fusion = nn.Conv2d(self.out_channels, self.out_channels, 1)
        _initialise(self.fusion)

    def forward(
        self, x: Float[Tensor, "batch dim layers tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch out_channels layers tokens"]:
        """The map of every layer and frame; zero in frames that are not real."""
        y = self.conv(self.norm(cleared(x, mask), mask), mask)
        outputs: list[Tensor] = []
        for block in self.blocks:
            y = block(y, mask)
            outputs.append(y)
        return cleared(torch.relu(self.fusion(torch.cat(outputs, 1))), mask)


class Ecapa2d(LayerFront):
    """The front that the authors' command line names: three squeeze-excitation Res2 blocks with dilations 2, 3, 4.

    Args:
        dim: width of a hidden state.
        channels: of the map inside; divided by `slices`.
        slices: of the Res2 blocks.

    Example:
        >>> Ecapa2d(16, channels=8)(torch.randn(2, 16, 5, 9)).shape
        torch.Size([2, 24, 5, 9])
    """

    def __init__(self, dim: int, channels: int = 256, slices: int = 8) -> None:
        super().__init__(dim, channels, (5, 3), [Res2Block(channels, d, slices) for d in (2, 3, 4)])


class D3Net(LayerFront):
    """The other front: blocks of dilations 1, 2, 4, 8 on ever fewer channels.

    Args:
        dim: width of a hidden state.
        channels: of the map inside; divided by `depth`.
        blocks: their number.
        depth: number of dilations in a block.

    Example:
        >>> D3Net(16, channels=8)(torch.randn(2, 16, 5, 9)).shape
        torch.Size([2, 24, 5, 9])
    """

    def __init__(self, dim: int, channels: int = 256, blocks: int = 3, depth: int = 4) -> None:
        super().__init__(dim, channels, (1, 5), [D2Block(channels, depth) for _ in range(blocks)])


def _initialise(*convolutions: nn.Conv2d) -> None:
    for conv in convolutions:
        nn.init.xavier_uniform_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
