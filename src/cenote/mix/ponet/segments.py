"""Which segment each token of a sequence is in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core.requirements import require_at_least


def fixed_segments(mask: Bool[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch tokens"]:
    """Segments of `N // count + 1` tokens, the last may be shorter; `N` is the row's own number of real tokens.

    Args:
        mask: True = a real token, padding on any side.
        count: of segments; there may be fewer.

    Returns:
        Numbers from 0; padding counts to its neighbour.

    Example:
        >>> fixed_segments(torch.tensor([[True] * 5, [True, True, True, False, False]]), 2).tolist()
        [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]

    Note:
        The authors' code takes the padded length for `N`, so that padding changes the segments.
    """
    require_at_least(1, count=count)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    return place // (mask.sum(1, keepdim=True) // count + 1)


def special_tokens(ids: Int[Tensor, "batch tokens"], special: Iterable[int]) -> Bool[Tensor, "batch tokens"]:
    """True where a token is one of these, such as [CLS] and [SEP]."""
    return torch.isin(ids, torch.tensor(list(special), dtype=ids.dtype, device=ids.device))


def segments_between(special: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Every special token is a segment of its own, and so is every stretch between two of them.

    `segment_n = sum_(i <= n) (m_i + m_(i-1)) - 1`, with `m` 1 at special tokens.

    Example:
        >>> segments_between(torch.tensor([[True, False, False, True, False, True]])).tolist()
        [[0, 1, 1, 2, 3, 4]]

    Note:
        Numbers start at -1 in the published form where the first token is not special; here at 0.
    """
    m = special.long()
    before = torch.nn.functional.pad(m[:, :-1], (1, 0))
    return (m + before).cumsum(1) - special[:, :1].long()
