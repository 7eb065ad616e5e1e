"""The power mean of a huge set, read piece by piece, against its formula in plain torch.

`y = (mean_n max(x_n, 1e-6)^3)^(1/3)` of one set of 100,000 tokens of width 384 (154 MB), in float32. The formula
makes copies of the set: clamped, and raised to the power; training keeps them. The formula overflows where `x^3`
does; cenote's, in the domain of logarithms, never does, and pays for it with a logarithm and an exponential per
number.

    python -m benchmarks.power_means [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor

from cenote.pool import GeM

TOKENS, DIM = 100_000, 384


def formula(pool: GeM, x: Tensor) -> Tensor:
    return x.clamp(min=pool.eps).pow(pool.p).mean(1).pow(1 / pool.p)


def gradient(pool: GeM, y: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), pool.p)[0]


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    pool, x = GeM(DIM), torch.randn(1, TOKENS, DIM)
    precise, few = copy.deepcopy(pool).double(), x[:, :500].double()
    require_same(
        [precise(few), gradient(precise, precise(few))],
        [formula(precise, few), gradient(precise, formula(precise, few))],
    )
    with torch.no_grad():
        require_same(pool(x), formula(pool, x))
        yield Pair(
            "power mean, 1 x 100,000 x 384, forward",
            "GeM",
            lambda: pool(x),
            "its formula",
            lambda: formula(pool, x),
            memory=True,
        )
    yield Pair(
        "power mean, 1 x 100,000 x 384, trained",
        "GeM",
        lambda: gradient(pool, pool(x)),
        "its formula",
        lambda: gradient(pool, formula(pool, x)),
        memory=True,
    )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.power_means", rounds=6)
