"""Is it the same speaker? Trials, and the rate at which misses and false alarms are equally frequent."""

from __future__ import annotations

import numpy as np


def trials(speakers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of clips: the first, the second, and whether the speaker is the same."""
    first, second = np.triu_indices(len(speakers), 1)
    return first, second, speakers[first] == speakers[second]


def equal_error_rate(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Where the share of missed targets meets the share of accepted others, as the threshold moves.

    Args:
        scores: `[trials]`, high where the speaker seems the same.
        same: `[trials]`.
        weights: `[draws, trials]` how often a trial was drawn; default: once.

    Returns:
        `[draws]`, NaN where a draw has no trial of one kind.

    >>> float(equal_error_rate(np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, False, True, False]))[0])
    0.5
    >>> float(equal_error_rate(np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, True, False, False]))[0])
    0.0
    """
    # scores that are equal fall on the same side of every threshold
    values, group = np.unique(scores, return_inverse=True)
    weights = np.ones((1, len(scores))) if weights is None else weights
    out = np.full(len(weights), np.nan)
    for i, w in enumerate(weights):
        targets = np.bincount(group, w * same, len(values))
        others = np.bincount(group, w * ~same, len(values))
        if not targets.sum() or not others.sum():
            continue
        misses = np.concatenate([[0.0], targets.cumsum()]) / targets.sum()
        alarms = 1 - np.concatenate([[0.0], others.cumsum()]) / others.sum()
        # misses rise and alarms fall with the threshold: between the last point below and the first above, a line
        after = int(np.argmax(misses >= alarms))
        if after == 0 or misses[after] == alarms[after]:
            out[i] = misses[after]
            continue
        before = after - 1
        gap_before, gap_after = alarms[before] - misses[before], misses[after] - alarms[after]
        share = gap_before / (gap_before + gap_after)
        out[i] = misses[before] + share * (misses[after] - misses[before])
    return out
