"""What the tests of pools share: parameters that hide nothing, and attention written out in full."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import cenote
from cenote.testing.contract import title

P = TypeVar("P", bound=nn.Module)
Check = Callable[..., None]

TRACED = ("torch compile in one graph", "torch export")
"""The rules for which PyTorch traces a pool: four fifths of what a contract costs."""

QUICK_SETTINGS = {"last-layer-trainable": {"latents": 8, "heads": 4}, "gramian": {"branches": 2}}
"""Of pools whose defaults are wide enough, or repeat themselves often enough, to take a test of seconds to minutes."""


def _apart(check: Check, name: str = "") -> list[Any]:
    """The contract in two: without the traced rules, and, thoroughly, these alone."""
    rest = tuple(title(rule) for rule in vars(sys.modules[check.__module__])["_RULES"] if title(rule) not in TRACED)
    thorough = pytest.mark.thorough("each setting is traced")
    values = (name,) if name else ()
    return [
        pytest.param(*values, TRACED, id=name or "untraced"),
        pytest.param(*values, rest, id=f"{name} traced".strip(), marks=thorough),
    ]


def by_rules(check: Check) -> pytest.MarkDecorator:
    """A contract's test in two: what further settings do to the traced rules costs most and breaks least.

    Args:
        check: what the test calls with `leave_out=left_out`.
    """
    return pytest.mark.parametrize("left_out", _apart(check))


def by_base(check: Check, names: Iterable[str]) -> pytest.MarkDecorator:
    """The contracts of these methods: whole of the first with each base class, in two, as `by_rules`, of the others.

    What is shared by classes is traced once in the quick suite. The test takes `name` and `left_out`.
    """
    bases: set[type] = set()
    cases: list[Any] = []
    for name in names:
        base = cenote.method(name).load().__base__
        cases += _apart(check, name) if base in bases else [pytest.param(name, (), id=name)]
        bases.add(base)
    return pytest.mark.parametrize(("name", "left_out"), cases)


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
