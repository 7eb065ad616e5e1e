"""What attention costs, counted as published, and measured.

Source: Zhang, Li, Seo and Cao (2024), arXiv 2410.23608.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.requirements import require_at_least
from cenote.reduce.select_and_pack.block import SelectAndPackAttention
from cenote.reduce.select_and_pack.packing import Fill, Packing, fill_of


class Timed(NamedTuple):
    """Seconds of one pass, the fastest of some, and how full the containers were."""

    seconds: float
    fill: Fill


def dense_products(batch: int, tokens: int, dim: int) -> int:
    """`B (4 N C^2 + 2 N^2 C)`.

    >>> dense_products(1, 64, 48)
    983040
    """
    return batch * (4 * tokens * dim**2 + 2 * tokens**2 * dim)


def window_products(batch: int, tokens: int, dim: int, side: int = 7) -> int:
    """`B (4 N C^2 + 2 M^2 N C)`.

    >>> window_products(1, 64, 48, side=4)
    688128
    """
    return batch * (4 * tokens * dim**2 + 2 * side**2 * tokens * dim)


def packed_products(batch: int, tokens: int, dim: int, containers: int, length: int) -> int:
    """`B (N C + N C^2) + B_c (3 L C^2 + 2 L^2 C)`, of the whole packed batch.

    Note: as published; its `N C^2` per image is a map of all tokens, which the published text does not name. Where only the
        tokens in containers are mapped, as here, it is `B_c L C^2`.

    >>> packed_products(1, 64, 48, containers=1, length=16)
    285696
    """
    return batch * (tokens * dim + tokens * dim**2) + containers * (3 * length * dim**2 + 2 * length**2 * dim)


@torch.no_grad()
def packing_time(
    attention: SelectAndPackAttention, x: Float[Tensor, "batch tokens dim"], packing: Packing, repeats: int = 3
) -> Timed:
    """One layer with its containers filled in another way: what packing saves against padding to the longest.

    Args:
        attention: in eval mode; left as it was.
        x: tokens.
        packing: how they are packed.
        repeats: how many passes.
    """
    require_at_least(1, repeats=repeats)
    own, attention.packing = attention.packing, packing
    try:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            found = attention(x)
            times.append(time.perf_counter() - start)
    finally:
        attention.packing = own
    return Timed(min(times), fill_of(found.info))
