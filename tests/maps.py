"""What the tests of window pools share."""

import torch
from torch import Tensor

from cenote.pool import LeanWindowPool

SIZES = (9, 7, 6)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """In float64, the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(dims: int = 2, seed: int = 0) -> Tensor:
    """Two maps of three channels in as many dimensions."""
    return randn(2, 3, *SIZES[:dims], seed=seed)


def cells(x: Tensor, k: int, s: int) -> Tensor:
    """`[batch, channels, *windows, cells]`: every window written out."""
    dims = x.dim() - 2
    for axis in range(2, x.dim()):
        x = x.unfold(axis, k, s)
    return x.flatten(-dims)


def assert_same_gradient_both_ways(pool: LeanWindowPool, x: Tensor) -> None:
    """The backward pass that makes weights again agrees with a graph that kept them."""
    x = x.clone().requires_grad_()
    kept, lean = pool.attend(x).output, pool(x)
    assert type(lean.grad_fn).__name__ == "_LeanBackward"
    g = torch.randn_like(kept)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (kept, lean)))


def kept_for_backward(pool: torch.nn.Module, x: Tensor) -> int:
    """Numbers that training holds on to besides the map itself."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pool(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())
