from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive

FLOOR = 1e-6


class FrontState(NamedTuple):
    """What of a stream is not yet in a frame.

    Attributes:
        samples: that the next window begins with.
        rows: the last spectra, for frames that stack them.
        phase: spectra until the next frame is given.
    """

    samples: Float[Tensor, "batch _samples"]
    rows: Float[Tensor, "batch _rows bins"]
    phase: int


class StackedLogMel(nn.Module):
    """Sound to stacked log-mel spectra, packet by packet: 512 numbers every 30 ms.

    Of each window the power spectrum through triangular filters, then the logarithm; each frame stacks a spectrum and those
    before it, and only every `stride`-th is given.

    Args:
        rate: samples a second.
        bins: mel filters.
        window, hop: in seconds.
        stack: spectra in a frame: the present one and those before it.
        stride: spectra from one frame to the next.

    Raises:
        InputError: where a number is not positive, or a filter lies between two frequencies of the spectrum.

    Example:
        >>> front = StackedLogMel()
        >>> frames, state = front.step(torch.randn(1, 16000))
        >>> frames.shape, front.out_dim, round(front.seconds, 3)
        (torch.Size([1, 33, 512]), 512, 0.03)

    Source: the front end of Wang et al., "Attentive Temporal Pooling for Conformer-based Streaming Language Identification in
    Long-form Speech", Odyssey 2022.

    Note:
        The hop is inferred. Before the first spectrum stands that spectrum itself.
    """

    filters: Tensor
    taper: Tensor

    def __init__(
        self,
        rate: int = 16000,
        bins: int = 128,
        window: float = 0.032,
        hop: float = 0.01,
        stack: int = 4,
        stride: int = 3,
    ) -> None:
        super().__init__()
        require_at_least(1, rate=rate, bins=bins, stack=stack, stride=stride)
        require_positive(window=window, hop=hop)
        self.window, self.hop = round(window * rate), round(hop * rate)
        require_at_least(1, samples_in_a_window=self.window, samples_in_a_hop=self.hop)
        self.stack, self.stride = stack, stride
        self.out_dim = bins * stack
        self.seconds = stride * self.hop / rate
        # twice as fine as the window asks for, so that the narrow filters of low tones meet a frequency each
        self.points = 2 ** math.ceil(math.log2(2 * self.window))
        self.register_buffer("filters", mel_filters(self.points, rate, bins))
        self.register_buffer("taper", torch.hann_window(self.window))

    def step(
        self, sound: Float[Tensor, "batch samples"], state: FrontState | None = None
    ) -> tuple[Float[Tensor, "batch frames out_dim"], FrontState]:
        """The frames that these samples complete, and what is left for the next ones."""
        if sound.dim() != 2:
            raise InputError(f"sound: expected [batch, samples], got shape {tuple(sound.shape)}")
        before = (
            FrontState(sound[:, :0], sound.new_zeros(len(sound), 0, len(self.filters)), 0) if state is None else state
        )
        samples = torch.cat([before.samples, sound], 1)
        count = max(0, (samples.shape[1] - self.window) // self.hop + 1)
        if not count:
            return sound.new_zeros(len(sound), 0, self.out_dim), before._replace(samples=samples)
        rows = self._spectra(samples.unfold(1, self.window, self.hop))
        old = before.rows if before.rows.shape[1] else rows[:, :1].expand(-1, self.stack - 1, -1)
        every = torch.cat([old, rows], 1)
        stacked = every.unfold(1, self.stack, 1).transpose(2, 3).flatten(2)
        given = stacked[:, before.phase :: self.stride]
        phase = (before.phase - count) % self.stride
        kept = every[:, every.shape[1] - self.stack + 1 :]
        return given, FrontState(samples[:, count * self.hop :], kept, phase)

    def forward(self, sound: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch frames out_dim"]:
        """All frames of whole sounds."""
        return self.step(sound)[0]

    def _spectra(self, windows: Float[Tensor, "batch rows window"]) -> Float[Tensor, "batch rows bins"]:
        power = torch.fft.rfft(windows * self.taper, self.points).abs().square()
        return (power @ self.filters.T).clamp(min=FLOOR).log()


def mel_filters(points: int, rate: int, bins: int) -> Float[Tensor, "bins frequencies"]:
    """Triangles of equal width on the mel scale, `2595 log10(1 + f / 700)`, from 0 to half the rate; each has the height 1.

    Args:
        points: of the Fourier transform.
        rate: samples a second.
        bins: how many.

    Raises:
        InputError: where a filter lies between two frequencies and hears nothing.

    >>> mel_filters(1024, 16000, 40).shape
    torch.Size([40, 513])
    """
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, bins + 2, dtype=torch.float64) / 2595) - 1)
    at = torch.arange(points // 2 + 1, dtype=torch.float64) * rate / points
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((at - low) / (middle - low), (high - at) / (high - middle)).clamp(min=0)
    if not bool(filters.any(1).all()):
        raise InputError(
            f"bins: {bins} filters are finer than a transform of {points} points at {rate} samples a second; give fewer bins "
            "or a longer window"
        )
    return filters.float()
