"""The efficient-probing pool with 32 queries against its authors' formula in plain torch.

64 sets of 196 tokens of width 768 in float32. The formula maps every token to a value before the sum; cenote maps the
sums. Both hold the same parameters. "Trained" is forward and backward with frozen tokens.

    python -m benchmarks.efficient_probing [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor

from cenote.pool import EfficientProbing

BATCH, TOKENS, DIM, QUERIES = 64, 196, 768, 32


def formula(pool: EfficientProbing, x: Tensor) -> Tensor:
    """`y_j = sum_n softmax_n(q_j . x_n / sqrt(dim)) v_nj`, with `v_n = W_v x_n` cut into one slice per query."""
    batch, tokens, dim = x.shape
    queries = pool.cls_token.expand(batch, -1, -1)
    weights = (queries @ x.transpose(1, 2) * dim**-0.5).softmax(-1)
    values = pool.v(x).reshape(batch, tokens, QUERIES, -1).transpose(1, 2)
    return (weights.unsqueeze(2) @ values).flatten(1)


def gradients(pool: EfficientProbing, y: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, list(pool.parameters()), upstream)


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    pool, x, upstream = EfficientProbing(DIM, QUERIES), torch.randn(BATCH, TOKENS, DIM), torch.randn(BATCH, DIM)
    require_same(pool(x), formula(pool, x))
    precise, few, g = copy.deepcopy(pool).double(), x[:4].double(), upstream[:4].double()
    ours, theirs = precise(few), formula(precise, few)
    require_same([ours, *gradients(precise, ours, g)], [theirs, *gradients(precise, theirs, g)])

    with torch.no_grad():
        yield Pair(
            "efficient probing, 32 queries, forward",
            "EfficientProbing",
            lambda: pool(x),
            "its formula, values of every token",
            lambda: formula(pool, x),
            target=10,
            memory=True,
        )
    yield Pair(
        "efficient probing, 32 queries, trained",
        "EfficientProbing",
        lambda: gradients(pool, pool(x), upstream),
        "its formula, values of every token",
        lambda: gradients(pool, formula(pool, x), upstream),
        target=10,
        memory=True,
    )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.efficient_probing")
