"""Speech as a filter bank would show it, made up: phones with formants, speakers with vocal tracts of their own length.

Nothing is downloaded or played: frames are drawn as log energies of 20 bands on the mel scale.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BANDS = 20
PHONES = 24
FORMANTS = 3
BROAD = 1.3
FLOOR = -4.0


def inventory(seed: int) -> Float[Tensor, "phones formants"]:
    """The formants of all phones, as positions among the bands.

    >>> inventory(0).shape
    torch.Size([24, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    low = torch.tensor([1.0, 5.0, 11.0])
    width = torch.tensor([5.0, 7.0, 6.0])
    return low + width * torch.rand(PHONES, FORMANTS, generator=generator)


def phone_sequences(
    frequencies: Float[Tensor, "clips phones"], frames: int, generator: torch.Generator
) -> Int[Tensor, "clips frames"]:
    """Phones drawn by their frequencies, each 3 to 8 frames long.

    >>> phone_sequences(torch.ones(2, 24), 10, torch.Generator()).shape
    torch.Size([2, 10])
    """
    clips, most = len(frequencies), frames // 3 + 1
    drawn = torch.multinomial(frequencies, most, replacement=True, generator=generator)
    lengths = torch.randint(3, 9, (clips, most), generator=generator)
    ends = lengths.cumsum(1)
    place = torch.searchsorted(ends, torch.arange(frames).expand(clips, -1).contiguous(), right=True)
    return drawn.gather(1, place.clamp(max=most - 1))


def spoken(
    phones: Int[Tensor, "clips frames"],
    formants: Float[Tensor, "phones formants"],
    tract: Float[Tensor, "clips"],
    tilt: Float[Tensor, "clips"],
    noise: float,
    generator: torch.Generator,
) -> Float[Tensor, "clips frames bands"]:
    """Log energies: a bump at each formant, stretched by the speaker's vocal tract, a spectral tilt, and noise.

    Args:
        phones: of each frame.
        formants: see `inventory`.
        tract: factor on the formants of each clip's speaker, about 1.
        tilt: of the spectrum of each clip's speaker, in log energy from the first band to the last.
        noise: standard deviation of what is added to every band of every frame.
        generator: of the noise.
    """
    at = formants[phones] * tract.view(-1, 1, 1)
    bands = torch.arange(BANDS)
    bumps = (-0.5 * ((bands - at.unsqueeze(-1)) / BROAD).square()).exp().sum(-2)
    envelope = FLOOR + 4 * bumps + tilt.view(-1, 1, 1) * torch.linspace(0, 1, BANDS)
    return envelope + noise * torch.randn(envelope.shape, generator=generator)


def stretches(clips: int, frames: int, share: float, generator: torch.Generator) -> Bool[Tensor, "clips frames"]:
    """True in stretches of 5 to 14 frames that make up about `share` of each clip.

    >>> round(stretches(500, 100, 0.5, torch.Generator().manual_seed(0)).float().mean().item(), 1)
    0.5
    """
    most = frames // 5 + 1
    lengths = torch.randint(5, 15, (clips, most), generator=generator)
    inside = torch.rand(clips, most, generator=generator) < share
    place = torch.searchsorted(lengths.cumsum(1), torch.arange(frames).expand(clips, -1).contiguous(), right=True)
    return inside.gather(1, place.clamp(max=most - 1))
