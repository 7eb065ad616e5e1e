"""A latent-query attention pool against torch.nn.MultiheadAttention with the same weights and the same output.

Learned queries attend to 64 sets of 196 tokens of width 768 (a ViT-B's batch) with 12 heads, in float32. Keys and values are
biased linear maps, and a linear map joins the heads. torch projects every token; cenote.core.cross_attention projects none.
"Trained" is forward and backward with frozen tokens, as a probe on stored features is trained. Outputs and gradients are
compared before anything is timed. One line says how far the pool is from a plain mean. "Bare products" are the two batched
matrix products over the tokens that are left of the attention, without softmax and maps, each as one call.

    python -m benchmarks.latent_attention [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor, nn

from cenote.core import PaddedTokens, cross_attention
from cenote.core.attention import Projection

BATCH, TOKENS, DIM, HEADS = 64, 196, 768, 12


class TorchPool(nn.Module):
    """Learned queries over the tokens by torch's own attention."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, DIM))
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]

    def by_parameter(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in the order of `CenotePool`'s parameters."""
        query, weights, biases, *out = grads
        return [query, *weights.chunk(3), biases[:DIM], biases[-DIM:], *out]


class CenotePool(nn.Module):
    """The same with the same weights, held apart; a bias of the keys adds the same to the scores of all tokens."""

    def __init__(self, like: TorchPool) -> None:
        super().__init__()
        self.query = nn.Parameter(like.query.detach().clone())
        self.weights = nn.ParameterList(w.detach().clone() for w in like.attention.in_proj_weight.chunk(3))
        bias = like.attention.in_proj_bias.detach()
        self.biases = nn.ParameterList([bias[:DIM].clone(), bias[-DIM:].clone()])
        self.out = copy.deepcopy(like.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        (w_q, w_k, w_v), (b_q, b_v) = self.weights, self.biases
        query, key, value = F.linear(self.query, w_q, b_q), Projection(w_k, None), Projection(w_v, b_v)
        output, _ = cross_attention(PaddedTokens(x), query, key=key, value=value, heads=HEADS, need_weights=False)
        return self.out(output)


def gradients(pool: nn.Module, y: Tensor, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, list(pool.parameters()), upstream))


def check(theirs: TorchPool, ours: CenotePool, x: Tensor, upstream: Tensor) -> None:
    """Stop unless both give the same output and gradients, in float32 and, of a few sets, in float64."""
    with torch.no_grad():
        require_same(ours(x), theirs(x))
    precise, few, g = copy.deepcopy(theirs).double(), x[:4].double(), upstream[:4].double()
    pool = CenotePool(precise)
    y, wanted = pool(few), precise(few)
    with torch.no_grad():
        require_same(pool(few), wanted)
    require_same([y, *gradients(pool, y, g)], [wanted, *precise.by_parameter(gradients(precise, wanted, g))])


def bare_products(queries: int, x: Tensor) -> Callable[[], object]:
    """The scores and the weighted sums alone, into memory that is there: no pool by absorbed queries can take less."""
    u = torch.randn(BATCH, HEADS * queries, DIM)
    scores, sums = torch.empty(BATCH, HEADS * queries, TOKENS), torch.empty(BATCH, HEADS * queries, DIM)

    def run() -> None:
        torch.bmm(u, x.mT, out=scores)
        # weights of about 1, as a product with numbers that are almost 0 takes longer
        torch.bmm(scores.fill_(1 / TOKENS), x, out=sums)

    return run


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, DIM)
    for queries in (1, 8):
        their_pool = TorchPool(queries)
        our_pool = CenotePool(their_pool)
        upstream = torch.randn(BATCH, queries, DIM)
        check(their_pool, our_pool, x, upstream)
        name = "1 query" if queries == 1 else f"{queries} queries"

        def ours(pool: CenotePool = our_pool) -> Tensor:
            with torch.no_grad():
                return pool(x)

        def theirs(pool: TorchPool = their_pool) -> Tensor:
            with torch.no_grad():
                return pool(x)

        yield Pair(
            f"{name}, forward",
            "cross_attention",
            ours,
            "MultiheadAttention",
            theirs,
            target=20 if queries == 1 else 8,
            memory=True,
        )
        yield Pair(
            f"{name}, trained",
            "cross_attention",
            lambda pool=our_pool, g=upstream: gradients(pool, pool(x), g),
            "MultiheadAttention",
            lambda pool=their_pool, g=upstream: gradients(pool, pool(x), g),
            target=25 if queries == 1 else 8,
            memory=True,
        )
        products = bare_products(queries, x)
        if queries == 1:
            yield Pair("1 query, against a mean", "cross_attention", ours, "x.mean(1)", lambda: x.mean(1), target=0.5)
            yield Pair(f"{name}, bare products against a mean", "bmm", products, "x.mean(1)", lambda: x.mean(1))
        yield Pair(f"{name}, bare products", "bmm", products, "MultiheadAttention", theirs)


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.latent_attention")
