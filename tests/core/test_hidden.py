"""Scores in pieces of rows are those of the plain network: values, gradients, gradients of gradients, under vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cenote.core import hidden as module
from cenote.core.hidden import hidden_scores
from cenote.core.tokenwise import tokenwise


class Network(nn.Module):
    def __init__(self, gated: bool, scores: int, bias: bool = False) -> None:
        super().__init__()
        self.tanh = nn.Linear(3, 8)
        self.gate = nn.Linear(3, 8) if gated else None
        self.score = nn.Linear(8, scores, bias=bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return hidden_scores(x, self.tanh, self.gate, self.score)

    def plain(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.tanh(x))
        return self.score(h if self.gate is None else h * torch.sigmoid(self.gate(x)))


@pytest.fixture(autouse=True)
def pieces_of_four_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the pieces that were taken, which says that nothing here went the plain way."""
    taken: list[int] = []
    cut = module._pieces

    def counted(members: int, rows: int, step: int) -> object:
        for member, piece in cut(members, rows, step):
            taken.append(len(range(rows)[piece]))
            yield member, piece

    monkeypatch.setattr(module, "LEAST_NUMBERS", 0)
    monkeypatch.setattr(module, "CACHED_BYTES", 4 * 5 * 8 * 8)
    monkeypatch.setattr(module, "_pieces", counted)
    return taken


NETWORKS = pytest.mark.parametrize(
    ("gated", "scores", "bias"), [(True, 1, False), (False, 1, True), (True, 3, True), (False, 3, False)]
)


@NETWORKS
def test_values_and_gradients(gated: bool, scores: int, bias: bool, pieces_of_four_rows: list[int]) -> None:
    network, x = Network(gated, scores, bias), torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *network.parameters()]
    given, wanted = network(x), network.plain(x)
    assert pieces_of_four_rows == [4, 4, 2]
    torch.testing.assert_close(given, wanted)
    upstream = torch.randn_like(given)
    torch.testing.assert_close(
        torch.autograd.grad(given, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream)
    )
    assert pieces_of_four_rows == [4, 4, 2] * 2
    with torch.no_grad():
        torch.testing.assert_close(network(x), wanted)


@NETWORKS
def test_gradients_of_gradients(gated: bool, scores: int, bias: bool) -> None:
    network, x = Network(gated, scores, bias), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, network.tanh.weight, network.score.weight]
    found = []
    for y in network(x), network.plain(x):
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("own_tokens", [False, True])
@NETWORKS
def test_members_together(gated: bool, scores: int, bias: bool, own_tokens: bool) -> None:
    networks = [Network(gated, scores, bias) for _ in range(3)]
    x = torch.randn(3, 6, 3, dtype=torch.float64, requires_grad=True)
    stacked, _ = torch.func.stack_module_state(networks)

    def call(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(networks[0], weights, tokens)

    tokens = x if own_tokens else x[0]
    given = torch.func.vmap(call, in_dims=(0, 0 if own_tokens else None))(stacked, tokens)
    wanted = torch.stack([n.plain(x[m if own_tokens else 0]) for m, n in enumerate(networks)])
    torch.testing.assert_close(given, wanted)
    upstream = torch.randn_like(given)
    *of_weights, of_x = torch.autograd.grad(given, [*stacked.values(), x], upstream)
    for name, gradient in zip(stacked, of_weights, strict=True):
        own = [dict(n.named_parameters())[name] for n in networks]
        torch.testing.assert_close(gradient, torch.stack(torch.autograd.grad(wanted, own, upstream, retain_graph=True)))
    torch.testing.assert_close(of_x, torch.autograd.grad(wanted, x, upstream)[0])
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.vmap(call, in_dims=(0, 0 if own_tokens else None))(stacked, tokens), wanted
        )


@NETWORKS
def test_hidden_layers_of_many_tokens_are_computed_again(
    gated: bool, scores: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = Network(gated, scores, bias), torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *network.parameters()]
    kept = held_bytes(lambda: network(x))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 8)
    assert held_bytes(lambda: network(x)) == kept - 9 * 8 * 8 * (2 if gated else 1)
    given, wanted = network(x), network.plain(x)
    torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(given.sin().sum(), inputs), torch.autograd.grad(wanted.sin().sum(), inputs)
    )


def held_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that the backward pass is left with."""
    held = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal held
        held += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return held


@NETWORKS
def test_checkpoints_around_them(gated: bool, scores: int, bias: bool) -> None:
    network, x = Network(gated, scores, bias), torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *network.parameters()]
    given, wanted = tokenwise(network, x, rows_at_once=5), network.plain(x)
    torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(given.sin().sum(), inputs), torch.autograd.grad(wanted.sin().sum(), inputs)
    )


def test_half_precision_and_few_numbers_go_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, pieces_of_four_rows: list[int]
) -> None:
    network, x = Network(True, 1), torch.randn(6, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.float()(x.float()).dtype == torch.bfloat16
    monkeypatch.setattr(module, "LEAST_NUMBERS", 49)
    torch.testing.assert_close(network.double()(x), network.plain(x))
    assert not pieces_of_four_rows
