"""How the mean and the second moment of a score change with the distance.

Source: Wang et al. (2025), arXiv 2509.12635; the closed forms of the phase are derived here, for normal q_P and k_P that do not
hang together with the amplitude.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.requirements import require_at_least, require_positive


def rope_mean(
    distance: Float[Tensor, "distances"], width: int, mean: float = 1.0, base: float = 10_000.0, turned: float = 0.0
) -> Float[Tensor, "distances"]:
    """`(mu / sqrt(d)) sum_i cos(D base^(-2 i / d)) + (nu / sqrt(d)) sum_i sin(...)`: the mean score of rotary positions.

    Args:
        distance: D.
        width: d, of a head.
        mean: mu, of `q_2i k_2i + q_2i+1 k_2i+1`, the same for all pairs of channels.
        base: of the frequencies.
        turned: nu, the mean of `q_2i k_2i+1 - q_2i+1 k_2i`.
    """
    require_at_least(2, width=width)
    angle = distance.double()[:, None] * base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (mean * angle.cos().sum(-1) + turned * angle.sin().sum(-1)) / math.sqrt(width)


def phase_mean(
    distance: Float[Tensor, "distances"], phase_width: int, alpha: float = 0.1, amplitude: float = 1.0
) -> Float[Tensor, "distances"]:
    """`E s = E[a] (1 + c^2)^(-d_P / 2)`, `c = 2 pi D^alpha / sqrt(d_P)`.

    Args:
        distance: D.
        phase_width: d_P, of the channels of the phase.
        alpha: as of `TAPA`.
        amplitude: E[a].

    >>> round(float(phase_mean(torch.tensor([0.0]), 8)), 3)
    1.0
    """
    return amplitude * _decay(distance, phase_width, alpha, 1.0)


def phase_second_moment(
    distance: Float[Tensor, "distances"], phase_width: int, alpha: float = 0.1, squared_amplitude: float = 1.0
) -> Float[Tensor, "distances"]:
    """`E s^2 = E[a^2] (1 + (1 + 4 c^2)^(-d_P / 2)) / 2`: with the distance half of the amplitude's is left, not less."""
    return squared_amplitude * (1 + _decay(distance, phase_width, alpha, 2.0)) / 2


def _decay(distance: Tensor, phase_width: int, alpha: float, times: float) -> Float[Tensor, "distances"]:
    """`E cos(times c q . k)`."""
    require_at_least(1, phase_width=phase_width)
    require_positive(alpha=alpha)
    c = times * 2 * math.pi * distance.double().abs() ** alpha / math.sqrt(phase_width)
    return (1 + c.square()) ** (-phase_width / 2)
