"""Window pools against the forms that unfold the map, on 32 x 64 x 112 x 112 with windows of 2 x 2, stride 2, in float32.

`unfold` copies the map so that each window stands in a row of its own; cenote loops over the cells of the kernel and
keeps strided views. Both compute the same numbers.

    python -m benchmarks.windows [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.checks import require_same
from benchmarks.timing import Pair, run
from torch import Tensor

from cenote.pool import EDSCWPool2d, SoftPool2d

SHAPE = (32, 64, 112, 112)


def unfolded(x: Tensor) -> Tensor:
    """`[batch, channels, 4, windows]`."""
    return F.unfold(x, 2, stride=2).unflatten(1, (x.shape[1], 4))


def folded(y: Tensor, x: Tensor) -> Tensor:
    return y.unflatten(-1, (x.shape[2] // 2, x.shape[3] // 2))


def softpool(x: Tensor) -> Tensor:
    cells = unfolded(x)
    return folded((cells.softmax(2) * cells).sum(2), x)


def edscw(x: Tensor) -> Tensor:
    cells = unfolded(x)
    mean = cells.mean(2, keepdim=True)
    similarity = 2 * (cells * mean).abs() / (cells.square() + mean.square())
    return folded((similarity.softmax(2) * cells).sum(2), x)


def gradient(run: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(run(x), x, upstream)[0]


def pairs() -> Iterator[Pair]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    upstream = torch.randn(*SHAPE[:2], 56, 56)
    for name, ours, theirs, target, memory_target in (
        ("softpool", SoftPool2d(2), softpool, 1.5, 3),
        ("eDSCW", EDSCWPool2d(2), edscw, None, None),
    ):
        few = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
        g = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        require_same([ours(few), gradient(ours, few, g)], [theirs(few), gradient(theirs, few, g)])
        with torch.no_grad():
            require_same(ours(x), theirs(x))
            yield Pair(
                f"{name} 2x2/2 on 32 x 64 x 112 x 112, forward",
                type(ours).__name__,
                lambda ours=ours: ours(x),
                "unfold",
                lambda theirs=theirs: theirs(x),
                target=target,
                memory=True,
                memory_target=memory_target,
            )
        leaf = x.clone().requires_grad_()
        yield Pair(
            f"{name} 2x2/2 on 32 x 64 x 112 x 112, trained",
            type(ours).__name__,
            lambda ours=ours, leaf=leaf: gradient(ours, leaf, upstream),
            "unfold",
            lambda theirs=theirs, leaf=leaf: gradient(theirs, leaf, upstream),
            target=target,
            memory=True,
            memory_target=memory_target,
        )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.windows", rounds=6)
