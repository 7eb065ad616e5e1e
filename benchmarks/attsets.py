"""AttSets against its formula in plain torch: a weight for every token and every channel.

16 sets of 24 views of width 1024, and 8 sets of 2,048 points of width 256, in float32. The formula is what a reader
of the paper writes: softmax over the tokens, product, sum. Both compute the same products, so the linear layer bounds
both.

    python -m benchmarks.attsets [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor

from cenote.core import Bags
from cenote.pool import AttSets


def formula(pool: AttSets, x: Tensor) -> Tensor:
    return (pool.score(x).softmax(1) * x).sum(1)


def one_by_one(pool: AttSets, bags: Bags) -> Tensor:
    return torch.cat([formula(pool, x.unsqueeze(0)) for x in bags])


def gradients(pool: AttSets, y: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(y, pool.score.weight, upstream)[0]


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    for batch, tokens, dim in ((16, 24, 1024), (8, 2048, 256)):
        pool, x, upstream = AttSets(dim), torch.randn(batch, tokens, dim), torch.randn(batch, dim)
        precise, few = copy.deepcopy(pool).double(), x[:2].double()
        require_same(precise(few), formula(precise, few))
        name = f"AttSets, {batch} x {tokens:,} x {dim}"
        with torch.no_grad():
            require_same(pool(x), formula(pool, x))
            yield Pair(
                f"{name}, forward",
                "AttSets",
                lambda pool=pool, x=x: pool(x),
                "its formula",
                lambda pool=pool, x=x: formula(pool, x),
                memory=True,
            )
        yield Pair(
            f"{name}, trained",
            "AttSets",
            lambda pool=pool, x=x, g=upstream: gradients(pool, pool(x), g),
            "its formula",
            lambda pool=pool, x=x, g=upstream: gradients(pool, formula(pool, x), g),
            memory=True,
        )
    dim, lengths = 256, torch.randint(1, 64, (2000,))
    bags = Bags(torch.randn(int(lengths.sum()), dim), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    pool = AttSets(dim)
    with torch.no_grad():
        require_same(pool(bags), one_by_one(pool, bags))
        yield Pair(
            "AttSets, 2,000 bags of 1 to 63 x 256, forward",
            "AttSets, ragged",
            lambda: pool(bags),
            "its formula, bag by bag",
            lambda: one_by_one(pool, bags),
        )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.attsets", rounds=20)
