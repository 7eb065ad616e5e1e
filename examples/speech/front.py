"""Sound -> log-mel frames -> a small network over frames: what stands before the pooling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from torch import Tensor, nn

WINDOW, HOP = 0.025, 0.010
LOG_FLOOR = 1e-6


def read_wav(path: Path) -> tuple[Tensor, int]:
    """Samples in [-1, 1] of one channel, and their rate."""
    rate, samples = wavfile.read(path)
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise ValueError(f"{path}: expected 16 bit, one channel, got {samples.dtype} of shape {samples.shape}")
    return torch.from_numpy(samples.astype(np.float32) / 2**15), rate


class LogMel(nn.Module):
    """`log(mel @ |fft(window * frame)|^2)`, one row every 10 ms.

    Args:
        rate: samples per second.
        bins: triangles, evenly spaced on the mel scale from 60 Hz to half the rate, at most to 8 kHz.
    """

    def __init__(self, rate: int, bins: int = 40) -> None:
        super().__init__()
        self.length, self.hop = round(WINDOW * rate), round(HOP * rate)
        self.points = 2 ** math.ceil(math.log2(self.length))
        self.register_buffer("window", torch.hann_window(self.length, periodic=False))
        low, high = (2595 * math.log10(1 + f / 700) for f in (60.0, min(rate / 2, 8000.0)))
        edges = 700 * (10 ** (torch.linspace(low, high, bins + 2) / 2595) - 1)
        hertz = torch.arange(self.points // 2 + 1) * rate / self.points
        rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
        falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
        self.register_buffer("mel", torch.minimum(rising, falling).clamp(min=0))

    def forward(self, samples: Tensor) -> Tensor:
        """`[samples] -> [frames, bins]`."""
        samples = F.pad(samples, (0, max(0, self.length - len(samples))))
        frames = samples.unfold(0, self.length, self.hop) * self.window
        power = torch.fft.rfft(frames, self.points).abs().square()
        return (power @ self.mel.T + LOG_FLOOR).log()


class Padded(NamedTuple):
    """Clips of different lengths side by side."""

    x: Tensor
    mask: Tensor


def padded(clips: list[Tensor]) -> Padded:
    lengths = torch.tensor([len(c) for c in clips])
    return Padded(nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.arange(lengths.max()) < lengths[:, None])


class TimeDelay(nn.Module):
    """`x + relu(LayerNorm(conv(x)))` over frames; a causal one sees no frame of the future.

    Args:
        width: of a frame.
        dilation: between the three frames that it sees.
        causal: whether they all lie in the past.
    """

    def __init__(self, width: int, dilation: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.context = causal, 2 * dilation
        self.conv = nn.Conv1d(width, width, 3, dilation=dilation)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
        left = self.context if self.causal else self.context // 2
        return self.joined(x, F.pad(seen, (0, 0, left, self.context - left)))

    def step(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next frames of a stream, and what to remember: the last `context` frames."""
        seen = torch.cat([x.new_zeros(len(x), self.context, x.shape[2]) if past is None else past, x], 1)
        return self.joined(x, seen), seen[:, seen.shape[1] - self.context :].clone()

    def joined(self, x: Tensor, seen: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(seen.transpose(1, 2)).transpose(1, 2)))


class Tdnn(nn.Module):
    """Pairs of log-mel frames, and time delays of 1, 2, 3 of them: one vector every 20 ms that sees 270 ms."""

    def __init__(self, bins: int, width: int) -> None:
        super().__init__()
        self.out_dim = width
        self.enter = nn.Linear(2 * bins, width)
        self.blocks = nn.ModuleList(TimeDelay(width, d, causal=False) for d in (1, 2, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Padded:
        x, mask = paired(x, mask)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, mask)
        return Padded(x, mask)


class Conformer(nn.Module):
    """Pairs of log-mel frames, and conformer blocks: half feed-forward, attention, convolution, half feed-forward."""

    def __init__(self, bins: int, width: int, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.out_dim = width
        self.enter = nn.Linear(2 * bins, width)
        self.blocks = nn.ModuleList(ConformerBlock(width, heads) for _ in range(blocks))

    def forward(self, x: Tensor, mask: Tensor) -> Padded:
        x, mask = paired(x, mask)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, mask)
        return Padded(x, mask)


class ConformerBlock(nn.Module):
    """Gulati et al., "Conformer", Interspeech 2020, with LayerNorm in the convolution and no positions."""

    def __init__(self, width: int, heads: int, kernel: int = 15) -> None:
        super().__init__()
        self.first, self.second = (feed_forward(width) for _ in range(2))
        self.attention_norm, self.conv_norm, self.depth_norm, self.norm = (nn.LayerNorm(width) for _ in range(4))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.gate = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=~mask, need_weights=False)[0]
        y = F.glu(self.gate(self.conv_norm(x))).masked_fill(~mask.unsqueeze(-1), 0)
        y = self.depthwise(y.transpose(1, 2)).transpose(1, 2)
        x = x + self.leave(F.silu(self.depth_norm(y)))
        return self.norm(x + 0.5 * self.second(x))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))


def paired(x: Tensor, mask: Tensor) -> Padded:
    """Every two frames side by side; the last of an odd number stands with zeros."""
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    if x.shape[1] % 2:
        x, mask = F.pad(x, (0, 0, 0, 1)), F.pad(mask, (0, 1))
    return Padded(x.unflatten(1, (-1, 2)).flatten(2), mask[:, ::2])


class StreamingTdnn(nn.Module):
    """A causal network: every frame sees its past alone, so that a stream can be taken piece by piece."""

    def __init__(self, dim: int, width: int, dilations: tuple[int, ...] = (1, 2, 3)) -> None:
        super().__init__()
        self.out_dim = width
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(TimeDelay(width, d, causal=True) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x

    def step(self, x: Tensor, state: list[Tensor | None] | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """The next frames, and what to remember of these."""
        past = [None] * len(self.blocks) if state is None else state
        x, after = self.enter(x), []
        for block, own in zip(self.blocks, past, strict=True):
            x, kept = block.step(x, own)
            after.append(kept)
        return x, after
