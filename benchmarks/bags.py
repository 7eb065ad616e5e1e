"""Gated attention pooling of bags of very uneven length, against torchmil's, which pads. Needs the extra `bench`.

Lengths are log-uniform between 1 and 20,000, dim 384, hidden width 128, float32; parameters and results are the same.
512 bags padded to the longest would take 15.7 GB before the first product, so both get 32 bags at a time; how much is
padding does not depend on the number of bags, but for the longest of them. The padding itself is made beforehand and
not timed.

    python -m benchmarks.bags [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor, nn

from cenote.core import Bags
from cenote.pool import ABMIL

COUNT, LONGEST, DIM, HIDDEN = 32, 20_000, 384, 128


def make_bags(count: int, longest: int) -> Bags:
    """Lengths at the middles of `count` equal parts of the logarithmic range: no seed makes them short or long."""
    parts = (torch.arange(count) + 0.5) / count
    lengths = (parts * math.log(longest)).exp().round().long()
    lengths = lengths[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return Bags(torch.randn(int(offsets[-1]), DIM, generator=torch.Generator().manual_seed(0)), offsets)


def same_parameters(theirs: nn.Module) -> ABMIL:
    pool = ABMIL(DIM, HIDDEN, gated=True)
    names = {"fc1": "tanh", "fc_gated": "gate", "fc2": "score"}
    state = {}
    for name, value in theirs.state_dict().items():
        module, kind = name.split(".")[0], name.split(".")[-1]
        state[f"{names[module]}.{kind}"] = value
    pool.load_state_dict(state)
    return pool


def gradients(pool: nn.Module, y: Tensor, upstream: Tensor) -> list[Tensor]:
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(y, list(pool.parameters()), upstream)]


def pairs() -> Iterator[Pair]:
    from torchmil.nn.attention import AttentionPool

    torch.manual_seed(0)
    theirs = AttentionPool(DIM, HIDDEN, gated=True)
    ours = same_parameters(theirs)
    few = make_bags(6, 200)
    few = Bags(few.values.double(), few.offsets)
    require_same(copy.deepcopy(ours).double()(few), copy.deepcopy(theirs).double()(*few.to_padded()))

    bags = make_bags(COUNT, LONGEST)
    x, mask = bags.to_padded()
    upstream = torch.randn(COUNT, DIM)
    note = (
        f"Bags: {COUNT} of them, {len(bags.values):,} tokens; padded to the longest, {mask.numel():,}. "
        "512 padded bags would take 15.7 GB."
    )
    with torch.no_grad():
        require_same(ours(bags), theirs(x, mask))
        yield Pair(
            "gated attention on bags of 1 to 20,000, forward",
            "ABMIL, ragged",
            lambda: ours(bags),
            "torchmil, padded",
            lambda: theirs(x, mask),
            target=6,
            memory_target=6,
            note=note,
        )
    yield Pair(
        "gated attention on bags of 1 to 20,000, trained",
        "ABMIL, ragged",
        lambda: gradients(ours, ours(bags), upstream),
        "torchmil, padded",
        lambda: gradients(theirs, theirs(x, mask), upstream),
        target=6,
        memory_target=6,
        note=note,
    )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.bags", rounds=5)
