"""Ragged aggregations against PyTorch Geometric's and sentence-transformers', which give the same numbers.

Needs the extra `bench`. 500 bags of 1 to 200 tokens of width 256 in float32. `AttentionalAggregation` gets the
score network of plain attention pooling, a linear layer, a tanh and a linear layer; `SoftmaxAggregation` is the
softmax of every channel on its own; `Pooling` is the mean of sentence-transformers, which takes padded sentences: 256
of 1 to 256 tokens of width 768.

    python -m benchmarks.aggregations [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor, nn

from cenote.core import Bags
from cenote.pool import ABMIL, MeanPool

DIM, HIDDEN = 256, 128


def make_bags(count: int, longest: int, dim: int) -> Bags:
    lengths = torch.randint(1, longest + 1, (count,))
    return Bags(torch.randn(int(lengths.sum()), dim), nn.functional.pad(lengths.cumsum(0), (1, 0)))


def double(bags: Bags, count: int) -> Bags:
    few = bags.select(torch.arange(count))
    return Bags(few.values.double(), few.offsets)


def gradients(module: nn.Module, run: Callable[[], Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(), list(module.parameters()), upstream)


def attentional(bags: Bags) -> Iterator[Pair]:
    from torch_geometric.nn import AttentionalAggregation

    ours = ABMIL(DIM, HIDDEN, gated=False)
    theirs = AttentionalAggregation(nn.Sequential(copy.deepcopy(ours.tanh), nn.Tanh(), copy.deepcopy(ours.score)))
    index, upstream = bags.set_index(), torch.randn(bags.batch, DIM)
    few = double(bags, 10)
    require_same(
        copy.deepcopy(ours).double()(few), copy.deepcopy(theirs).double()(few.values, few.set_index(), dim_size=10)
    )

    def run_theirs() -> Tensor:
        return theirs(bags.values, index, dim_size=bags.batch)

    with torch.no_grad():
        require_same(ours(bags), run_theirs())
        yield Pair(
            "plain attention, 500 bags, forward",
            "ABMIL(gated=False)",
            lambda: ours(bags),
            "PyG AttentionalAggregation",
            run_theirs,
            memory=True,
        )
    yield Pair(
        "plain attention, 500 bags, trained",
        "ABMIL(gated=False)",
        lambda: gradients(ours, lambda: ours(bags), upstream),
        "PyG AttentionalAggregation",
        lambda: gradients(theirs, run_theirs, upstream),
        memory=True,
    )


def softmax(bags: Bags) -> Iterator[Pair]:
    from torch_geometric.nn import SoftmaxAggregation

    theirs, index = SoftmaxAggregation(), bags.set_index()

    def ours(bags: Bags) -> Tensor:
        return bags.sum(bags.softmax(bags.values) * bags.values)

    few = double(bags, 10)
    require_same(ours(few), theirs(few.values, few.set_index(), dim_size=10))
    require_same(ours(bags), theirs(bags.values, index, dim_size=bags.batch))
    yield Pair(
        "softmax per channel, 500 bags, forward",
        "Bags.softmax, Bags.sum",
        lambda: ours(bags),
        "PyG SoftmaxAggregation",
        lambda: theirs(bags.values, index, dim_size=bags.batch),
        memory=True,
    )


def sentences() -> Iterator[Pair]:
    from sentence_transformers.sentence_transformer.modules import Pooling

    bags = make_bags(256, 256, 768)
    x, mask = bags.to_padded()
    ours, theirs = MeanPool(768), Pooling(768, "mean")

    def run_theirs(x: Tensor = x, mask: Tensor = mask) -> Tensor:
        return theirs({"token_embeddings": x, "attention_mask": mask.long()})["sentence_embedding"]

    require_same(ours(x[:8].double(), mask[:8]), run_theirs(x[:8].double(), mask[:8]))
    require_same(ours(x, mask), run_theirs())
    require_same(ours(bags), run_theirs())
    for name, run_ours in (("padded", lambda: ours(x, mask)), ("ragged", lambda: ours(bags))):
        yield Pair(
            f"mean of 256 sentences, ours {name}",
            f"MeanPool, {name}",
            run_ours,
            "sentence-transformers Pooling",
            run_theirs,
            memory=True,
        )


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    bags = make_bags(500, 200, DIM)
    yield from attentional(bags)
    yield from softmax(bags)
    yield from sentences()


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.aggregations", rounds=6)
