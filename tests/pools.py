"""What the tests of pools share: parameters that hide nothing, and attention written out in full."""

import sys
from collections.abc import Callable, Container, Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import cenote
from cenote.testing.contract import title

P = TypeVar("P", bound=nn.Module)
Check = Callable[..., None]

COSTLY = ("torch compile in one graph", "torch export", "gradients are right")
"""The rules for which PyTorch traces a pool or moves each of its parameters: nine tenths of what a contract costs."""

QUICK_SETTINGS = {"last-layer-trainable": {"latents": 8, "heads": 4}, "gramian": {"branches": 2}}
"""Of pools whose defaults are wide enough, or repeat themselves often enough, to take a test of seconds to minutes."""


def _apart(check: Check, name: str = "") -> list[Any]:
    """The contract in two: without the costly rules, and, thoroughly, these alone."""
    rest = tuple(title(rule) for rule in vars(sys.modules[check.__module__])["_RULES"] if title(rule) not in COSTLY)
    values = (name,) if name else ()
    thorough = pytest.mark.thorough("each pool is traced")
    return [
        pytest.param(*values, COSTLY, id=name or "quick rules"),
        pytest.param(*values, rest, id=f"{name} costly rules".strip(), marks=thorough),
    ]


def by_rules(check: Check) -> pytest.MarkDecorator:
    """A contract's test in two: what further settings do to the costly rules breaks least.

    Args:
        check: what the test calls with `leave_out=left_out`.
    """
    return pytest.mark.parametrize("left_out", _apart(check))


def by_base(check: Check, names: Iterable[str]) -> pytest.MarkDecorator:
    """The contracts of these methods: whole of the first with each base class, in two, as `by_rules`, of the others.

    The test takes `name` and `left_out`.
    """
    first = first_of_bases(names)
    cases = [[pytest.param(name, (), id=name)] if name in first else _apart(check, name) for name in names]
    return pytest.mark.parametrize(("name", "left_out"), [case for apart in cases for case in apart])


with_costly_rules = pytest.mark.parametrize(
    "left_out",
    [
        pytest.param(set(COSTLY), id="quick rules"),
        pytest.param(set(), id="all rules", marks=pytest.mark.thorough("a pool that breaks another rule is traced")),
    ],
)
"""Of a pool that is broken: in the quick suite without the costly rules that it does not break."""


def thoroughly_but(quick: Container[str], names: Iterable[str], why: str) -> list[Any]:
    """These names as parameters, all thorough but the quick ones."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough(why)) for name in names]


def first_of_bases(names: Iterable[str]) -> set[str]:
    """Of the methods with the same base class, the first: what they share is tried once in the quick suite."""
    bases: dict[type | None, str] = {}
    for name in names:
        bases.setdefault(cenote.method(name).load().__base__, name)
    return set(bases.values())


def shaken(pool: P, seed: int = 0) -> P:
    """The pool in float64 and eval mode, every parameter and running statistic drawn anew: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    pool = pool.double().eval()
    with torch.no_grad():
        for p in pool.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for name, b in pool.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator, dtype=torch.float64))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64))
    return pool


def randn(*shape: int) -> Tensor:
    """In float64, from PyTorch's own generator."""
    return torch.randn(*shape, dtype=torch.float64)


def features(batch: int = 2, tokens: int = 9, dim: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`(output [batch, queries, width], weights [batch, heads, queries, tokens])`, every token projected by the caller."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights
