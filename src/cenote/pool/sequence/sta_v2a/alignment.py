"""How well the onsets of two sounds agree.

Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cenote.core.errors import InputError


def aa_align(
    reference: Sequence[float], generated: Sequence[float], tolerance: float = 0.1, one_to_one: bool = False
) -> float:
    """Audio-audio alignment of onset times: `hits / (|generated| + |reference| - hits)`.

    A generated onset is a hit where some reference onset lies nearer than `tolerance`. Two generated onsets may hit the same
    reference onset, so that the score can exceed 1, unless it is to be `one_to_one`; the same sound twice scores 1.

    Args:
        reference, generated: onset times in seconds.
        tolerance: in seconds; an onset exactly so far away is no hit.
        one_to_one: whether each reference onset can be hit once; then as many hits are made as can be.

    Returns:
        The score; 1 where neither sound has an onset, 0 where one of them has none.

    Raises:
        InputError: where `tolerance` is not positive.

    Example:
        >>> aa_align([0.5, 1.5], [0.55, 2.5])
        0.3333333333333333

    Source: "STA-V2A", ICASSP 2025, by the name AA-Align.

    Note:
        Two sounds without onsets divide zero by zero in the formula; they agree, so 1 is returned. `one_to_one` is ours.
    """
    if tolerance <= 0:
        raise InputError(f"tolerance: expected positive seconds, got {tolerance}")
    there, made = np.asarray(reference, float), np.asarray(generated, float)
    if there.size == made.size == 0:
        return 1.0
    # 1e-9: 0.6 - 0.5 is below 0.1 by rounding
    near = np.abs(made[:, None] - there[None, :]) < tolerance - 1e-9
    hits = _pairs(np.sort(there), np.sort(made), tolerance - 1e-9) if one_to_one else int(near.any(1).sum())
    return hits / (made.size + there.size - hits)


def _pairs(there: Float[np.ndarray, "there"], made: Float[np.ndarray, "made"], tolerance: float) -> int:
    """The most pairs of sorted onsets nearer than `tolerance`: on a line the earliest two that fit always may be paired."""
    pairs = first = second = 0
    while first < len(there) and second < len(made):
        if abs(made[second] - there[first]) < tolerance:
            pairs, first, second = pairs + 1, first + 1, second + 1
        elif there[first] < made[second]:
            first += 1
        else:
            second += 1
    return pairs


def onset_times(
    audio: Float[Tensor, "samples"] | Float[np.ndarray, "samples"], sample_rate: int, **settings: Any
) -> list[float]:
    """Onsets of a sound in seconds, by librosa's onset strength and peak picking.

    Args:
        audio: one channel.
        sample_rate: samples per second.
        settings: of `librosa.onset.onset_detect`.

    Raises:
        InputError: where librosa is not installed, or the sound is not one channel of finite numbers.
    """
    try:
        import librosa
    except ImportError as error:
        raise InputError("onset_times: needs librosa; install it with pip install 'cenote[audio]'") from error
    samples = np.asarray(audio.detach().cpu() if isinstance(audio, Tensor) else audio, dtype=np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise InputError(f"audio: expected one channel of finite numbers, got shape {samples.shape}")
    if not samples.any():
        return []
    found = librosa.onset.onset_detect(y=samples, sr=sample_rate, units="time", **settings)
    return [float(t) for t in found]
