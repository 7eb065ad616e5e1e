"""How many pairs of tokens attention compares, and what the maps of tokens cost.

Source: Milbauer et al. (2023), arXiv 2305.19585.
"""

from __future__ import annotations

from collections.abc import Sequence

from cenote.core import InputError
from cenote.core.requirements import require_at_least


def attention_pairs(lengths: Sequence[int], layers: int, split: int) -> int:
    """`P sum_s n_s^2 + (L - P) N^2`.

    Args:
        lengths: tokens of each segment.
        layers: L.
        split: P.

    >>> attention_pairs([3, 1], layers=4, split=3)
    46
    """
    _require(lengths, layers, split)
    return split * sum(n**2 for n in lengths) + (layers - split) * sum(lengths) ** 2


def relative_pairs(lengths: Sequence[int], layers: int, split: int) -> float:
    """Pairs relative to `split=0`: `1 - (P / L) (1 - sum_s n_s^2 / N^2)`.

    >>> round(relative_pairs([8, 8], layers=10, split=8), 6)
    0.6
    """
    return attention_pairs(lengths, layers, split) / attention_pairs(lengths, layers, 0)


def linear_products(
    lengths: Sequence[int], layers: int, split: int, dim: int, inner: int, cached: Sequence[bool] | None = None
) -> int:
    """Products of the maps of tokens, `4 D^2 + 2 D D_inner` for each token and layer; the same for every P, unless segments are
    known.

    Args:
        lengths: tokens of each segment.
        layers: L.
        split: P.
        dim, inner: D and the hidden width of the feed-forward part.
        cached: whether each segment is known up to layer P.

    >>> linear_products([3, 1], 4, 3, dim=2, inner=8), linear_products([3, 1], 4, 3, 2, 8, cached=[True, False])
    (768, 336)
    """
    _require(lengths, layers, split)
    known = [False] * len(lengths) if cached is None else list(cached)
    if len(known) != len(lengths):
        raise InputError(f"cached: expected one for each of {len(lengths)} segments, got {len(known)}")
    tokens = sum(n * (layers - split * is_known) for n, is_known in zip(lengths, known, strict=True))
    return tokens * (4 * dim**2 + 2 * dim * inner)


def _require(lengths: Sequence[int], layers: int, split: int) -> None:
    if not lengths or min(lengths) < 0 or not sum(lengths):
        raise InputError(f"lengths: expected numbers of tokens, one at least above 0, got {list(lengths)}")
    require_at_least(1, layers=layers)
    if not 0 <= split <= layers:
        raise InputError(f"split: expected from 0 to {layers} layers, got {split}")
