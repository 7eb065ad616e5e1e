"""A network over many tokens in chunks: the same values and gradients, less memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cenote.core import tokenwise as module
from cenote.core.tokenwise import tokenwise


class Network(nn.Module):
    """Remembers how many rows it was given at once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Dropout(dropout), nn.Linear(40, 2)).double()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[:-1].numel())
        return self.layers(x)


def values_and_gradients(network: Network, x: Tensor, rows_at_once: int) -> list[Tensor]:
    y = tokenwise(network, x, rows_at_once)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *network.parameters()])]


def test_chunks_give_the_same_values_and_gradients() -> None:
    network = Network()
    for shape in ((25, 3), (5, 5, 3)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        whole = values_and_gradients(network, x, 25)
        assert network.rows == [25]  # in one piece, and nothing computed again
        network.rows.clear()
        chunked = values_and_gradients(network, x, 10)
        assert network.rows == [10, 10, 5, 5, 10, 10]  # and again, last chunk first, in the backward pass
        network.rows.clear()
        for a, b in zip(whole, chunked, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_nothing_is_computed_twice_without_gradients() -> None:
    network, x = Network(), torch.randn(25, 3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(tokenwise(network, x, 10), torch.cat([network.layers(c) for c in x.split(10)]))
    assert network.rows == [10, 10, 5]


def test_dropout_is_the_same_when_computed_again() -> None:
    torch.manual_seed(0)
    network, x = Network(dropout=0.5), torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    y = tokenwise(network, x, 5)
    (g,) = torch.autograd.grad(y.sum(), x)
    # piecewise smooth: a small step along the gradient with the same dropout mask changes the sum as the gradient says
    torch.manual_seed(0)
    Network(dropout=0.5), torch.randn(20, 3, dtype=torch.float64)
    stepped = tokenwise(network, (x + 1e-6 * g).detach().requires_grad_(), 5)
    change = (stepped.sum() - y.sum()).item() / 1e-6
    assert abs(change / g.square().sum().item() - 1) < 1e-4


def test_transposed_maps_and_no_rows() -> None:
    network = Network()
    x = torch.randn(4, 3, 6, dtype=torch.float64).transpose(1, 2)
    torch.testing.assert_close(tokenwise(network, x, 5), network.layers(x), atol=1e-12, rtol=1e-12)
    assert tokenwise(network, x[:0], 5).shape == (0, 6, 2)


class LargestResult(TorchDispatchMode):
    """The most numbers that any single operation returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.most = max([self.most, *sizes])
        return out


def test_hidden_layers_of_all_tokens_never_exist_at_once() -> None:
    network, x = Network(), torch.randn(1000, 3, dtype=torch.float64)
    for rows_at_once, expected in ((1000, 1000 * 40), (50, 1000 * 3)):
        with LargestResult() as largest:
            tokenwise(network, x, rows_at_once).sum().backward()
        assert largest.most == expected


def test_what_is_kept_for_the_backward_pass() -> None:
    network, x = Network(), torch.randn(1000, 3, dtype=torch.float64)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tokenwise(network, x, 50)
    assert sum(kept) <= 2 * x.numel() + 20 * sum(p.numel() for p in network.parameters())


def test_few_rows_go_through_in_one_piece() -> None:
    network = Network()
    tokenwise(network, torch.randn(module.ROWS_AT_ONCE, 3, dtype=torch.float64))
    tokenwise(network, torch.randn(module.ROWS_AT_ONCE + 1, 3, dtype=torch.float64))
    assert network.rows == [module.ROWS_AT_ONCE, module.ROWS_AT_ONCE, 1]
