"""Attention pooling of ragged batches: how cenote does it against one matrix product per set, and against padding.

Many short bags (100,000 of 1 to 5 tokens, say the atoms of a molecule), middling ones and long ones of uneven length. The
weights are given and carry gradients, the tokens are frozen. "Trained" is forward and backward. Results are compared before
anything is timed.

    python -m benchmarks.ragged [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from benchmarks.timing import Pair, run
from torch import Tensor

from cenote.core import Bags, PaddedTokens

SHAPES = (
    ("100,000 bags of 1 to 5", 100_000, 1, 5, 64),
    ("2,000 bags of 5 to 60", 2_000, 5, 60, 256),
    ("200 bags of 20 to 800", 200, 20, 800, 512),
)
HEADS = 4


def one_product_per_set(bags: Bags, weights: Tensor) -> Tensor:
    lengths = bags.lengths().tolist()
    pairs = zip(weights.split(lengths), bags.values.split(lengths), strict=True)
    return torch.stack([w.T @ v for w, v in pairs])


def trained(run: Callable[[Tensor], Tensor], weights: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(run(weights), weights, upstream)[0]


def pairs() -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(0)
    for name, count, shortest, longest, dim in SHAPES:
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        bags = Bags(torch.randn(int(offsets[-1]), dim, generator=generator), offsets)
        weights = torch.rand(len(bags.values), HEADS, generator=generator, requires_grad=True)
        x, mask = bags.to_padded()
        padded_weights = weights.new_zeros(*mask.shape, HEADS)
        padded_weights[mask] = weights.detach()
        padded_weights.requires_grad_()

        def ragged(w: Tensor, bags: Bags = bags) -> Tensor:
            return bags.weighted_sum(w)

        def looped(w: Tensor, bags: Bags = bags) -> Tensor:
            return one_product_per_set(bags, w)

        def padded(w: Tensor, x: Tensor = x, mask: Tensor = mask) -> Tensor:
            return PaddedTokens(x, mask).weighted_sum(w)

        torch.testing.assert_close(ragged(weights), looped(weights), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ragged(weights), padded(padded_weights), rtol=1e-4, atol=1e-4)
        upstream = torch.randn(count, HEADS, dim, generator=generator)
        for other_name, other, other_weights in (
            ("one product per set", looped, weights),
            ("padded", padded, padded_weights),
        ):
            yield Pair(
                f"{name} x {dim}, trained",
                "Bags.weighted_sum",
                lambda run=ragged, w=weights, g=upstream: trained(run, w, g),
                other_name,
                lambda run=other, w=other_weights, g=upstream: trained(run, w, g),
            )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.ragged", rounds=10)
