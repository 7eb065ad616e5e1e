"""Pooling by multihead attention on one set of 100,000 tokens of width 384, against PyTorch Geometric's.

Needs the extra `bench`. PyTorch Geometric's `PoolingByMultiheadAttention` maps every token by a linear layer before
its attention block; the authors' code does not. Both comparisons are made: the attention block alone (its `mab` on
the seeds and the tokens, our `PMA`), and the whole of it (our `PMA(ff_before=True)` with the second layer of its
feed-forward part left out). There both must map every token once: `D^2` products each, of the `3 D^2` that theirs
takes, so no more than 3 times faster is possible.

    python -m benchmarks.pma [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor, nn

from cenote.pool import PMA

TOKENS, DIM, HEADS = 100_000, 384, 4
BOUND = (
    "PMA with a linear layer on every token: both map each token once, `D^2` products of the `3 D^2` that PyTorch Geometric "
    "takes, so 3 times faster is the bound."
)


def same_parameters(theirs: nn.Module, ff_before: bool) -> PMA:
    """Our `PMA` of the paper's equations, which computes what `theirs` does."""
    pool = PMA(DIM, heads=HEADS, ln=True, variant="paper", ff_before=ff_before)
    mab, block = pool.mab, theirs.mab
    assert mab.merge is not None
    assert mab.fc_2 is not None
    assert mab.ln0 is not None
    assert mab.ln1 is not None
    w, b = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
    # they scale the scores by the width of a head, the Set Transformer by the whole width
    scale = HEADS**0.5
    given = {
        "S": theirs.seed,
        "mab.fc_q.weight": w[0] * scale,
        "mab.fc_q.bias": b[0] * scale,
        "mab.fc_k.weight": w[1],
        "mab.fc_k.bias": b[1],
        "mab.fc_v.weight": w[2],
        "mab.fc_v.bias": b[2],
        "mab.merge.weight": block.attn.out_proj.weight,
        "mab.merge.bias": block.attn.out_proj.bias,
        "mab.fc_o.weight": block.lin.weight,
        "mab.fc_o.bias": block.lin.bias,
        "mab.fc_2.weight": torch.eye(DIM),
        "mab.fc_2.bias": torch.zeros(DIM),
        "mab.ln0.weight": block.layer_norm1.weight,
        "mab.ln0.bias": block.layer_norm1.bias,
        "mab.ln1.weight": block.layer_norm2.weight,
        "mab.ln1.bias": block.layer_norm2.bias,
    }
    if ff_before:
        pool.ff = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())
        given |= {"ff.0.weight": theirs.lin.weight, "ff.0.bias": theirs.lin.bias}
    pool.load_state_dict({name: value.detach() for name, value in given.items()})
    return pool


def pairs() -> Iterator[Pair]:
    from torch_geometric.nn.aggr.utils import PoolingByMultiheadAttention

    torch.manual_seed(0)
    whole = PoolingByMultiheadAttention(DIM, 1, HEADS)
    nn.init.normal_(whole.mab.attn.in_proj_bias)
    x = torch.randn(1, TOKENS, DIM)

    def block(module: nn.Module, x: Tensor) -> Tensor:
        return module.mab(module.seed.expand(len(x), -1, -1), x).squeeze(1)

    def all_of_it(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).squeeze(1)

    for name, theirs, ff_before, target in (
        ("the attention block", block, False, 20),
        ("with a linear layer on every token", all_of_it, True, None),
    ):
        ours = same_parameters(whole, ff_before)
        few = x[:, :500].double()
        require_same(copy.deepcopy(ours).double()(few), theirs(copy.deepcopy(whole).double(), few))
        with torch.no_grad():
            require_same(ours(x), theirs(whole, x))
            yield Pair(
                f"PMA, 1 x 100,000 x 384, {name}",
                "PMA",
                lambda ours=ours: ours(x),
                "PyTorch Geometric",
                lambda theirs=theirs: theirs(whole, x),
                target=target,
                memory_target=None if target is None else 4,
                memory=True,
                note="" if target else BOUND,
            )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.pma", rounds=10)
