"""Norms of what tokens contribute to each other in an encoder layer: in Gram form, and from the vectors themselves.

One layer of BERT's size (12 heads, width 768) in float32; the vectors take `[tokens, tokens, 768]`, the Gram form
`[tokens, 12, 12]`. Both are given the attention and the values.

    python -m benchmarks.explain [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.timing import Pair, run
from torch import nn

from cenote.explain import EncoderLayer, contributions, norms
from cenote.models.live import frozen

HEADS, WIDTH = 12, 768
TOKENS = (64, 128, 256)


@torch.no_grad()
def pairs() -> Iterator[Pair]:
    for tokens in TOKENS:
        torch.manual_seed(0)
        first, second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        x, after, wide = (torch.randn(1, tokens, WIDTH) for _ in range(3))
        weights = torch.randn(1, HEADS, tokens, tokens).softmax(-1)
        values = torch.randn(1, HEADS, tokens, WIDTH // HEADS)
        maps = torch.randn(HEADS, WIDTH // HEADS, WIDTH) * WIDTH**-0.5
        layer = EncoderLayer(x, values, maps, frozen(first, after, first(after)), frozen(second, wide, second(wide)))
        expected = contributions(layer, weights).norm(dim=-1)
        torch.testing.assert_close(norms(layer, weights), expected, rtol=1e-5, atol=1e-5)
        longest = tokens == max(TOKENS)
        yield Pair(
            f"norms of {tokens} x {tokens} vectors",
            "Gram form",
            lambda layer=layer, weights=weights: norms(layer, weights),  # type: ignore[misc]
            "vectors",
            lambda layer=layer, weights=weights: contributions(layer, weights).norm(dim=-1),  # type: ignore[misc]
            target=20 if longest else None,
            memory=True,
            memory_target=50 if longest else None,
        )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.explain", threads=1, rounds=5)
