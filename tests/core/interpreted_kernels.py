"""The Triton kernels under Triton's interpreter against plain torch in float64. Prints JSON: largest errors of each case.

    TRITON_INTERPRET=1 python tests/core/interpreted_kernels.py

A process of its own: triton decides when it is imported whether its functions are interpreted.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from cenote.core import Bags, PaddedTokens, Tokens, absorbed
from cenote.core.absorbed import Normalise, Sums, fused, plain
from cenote.pool import PMA, EfficientProbing, JepaPool, SimPool

DIM = 20


@dataclass(frozen=True)
class Case:
    """Sets in one form, and what is asked of them."""

    form: str
    lengths: tuple[int, ...] = (9, 1, 40)
    queries: int = 3
    per_set: bool = False
    normalise: Normalise = "none"
    bias: bool = False
    frozen: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.form, "x".join(map(str, self.lengths)), f"{self.queries} queries", str(self.dtype)[6:]]
        words += [f"{self.normalise} normalised"] if self.normalise != "none" else []
        return ", ".join(
            words
            + [w for w, there in (("per set", self.per_set), ("bias", self.bias), ("frozen", self.frozen)) if there]
        )


def cases() -> Iterator[Case]:
    kinds: tuple[Normalise, ...] = ("none", "keys", "values", "both")
    for form, normalise, (per_set, bias) in itertools.product(
        ("padded", "masked", "ragged"), kinds, ((False, True), (True, False))
    ):
        yield Case(form, normalise=normalise, per_set=per_set, bias=bias)
    for form in ("without the first token", "map"):
        yield Case(form)
    for form in ("padded", "ragged"):
        for per_set in (False, True):
            yield Case(form, (700, 300, 700), per_set=per_set)  # several chunks
        yield Case(form, (5, 2), queries=70)  # several blocks of queries
        yield Case(form, (5,) * 30, frozen=True)  # more sets than programs
        # the interpreter has no products of bfloat16
        yield Case(form, dtype=torch.float16, normalise="both")
    yield Case("masked", (0, 4, 0))
    yield Case("ragged", (0, 4, 0, 300), bias=True)
    yield Case("ragged", (0, 0))


def run(case: Case) -> dict[str, float]:
    """Largest error of each result, relative to the largest number of the result."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        # numbers that half precision holds exactly
        return torch.randn(shape, generator=generator).to(torch.bfloat16).double()

    longest = max(case.lengths)
    x = randn(len(case.lengths), longest + 1, DIM) + 0.5
    mask = torch.arange(longest + 1) < torch.tensor(case.lengths).unsqueeze(1)
    queries = randn(*([len(case.lengths)] if case.per_set else []), case.queries, DIM)
    bias = randn(len(case.lengths), longest + 1)
    bias[:, 1:2] = float("-inf")

    def leaves(dtype: torch.dtype) -> tuple[Tokens, list[Tensor]]:
        values, b = x.to(dtype), bias.to(dtype)
        if case.form == "ragged":
            offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
            values, b = values[mask].requires_grad_(not case.frozen), b[mask].requires_grad_()
            tokens: Tokens = Bags(values, offsets)
        elif case.form == "masked":
            values = values.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_(not case.frozen)
            b = b.masked_fill(~mask, float("nan")).requires_grad_()
            tokens = PaddedTokens(values, mask)
        else:
            values, b = values.requires_grad_(not case.frozen), b.requires_grad_()
            if case.form == "without the first token":
                tokens = PaddedTokens(values).drop_first(1)
            elif case.form == "map":
                tokens = PaddedTokens(values.transpose(1, 2).contiguous().transpose(1, 2))
            else:
                tokens = PaddedTokens(values)
        return tokens, [
            queries.to(dtype).requires_grad_(),
            *([] if case.frozen else [values]),
            *([b] if case.bias else []),
        ]

    def results(dtype: torch.dtype, how: object) -> list[Tensor]:
        tokens, wanted = leaves(dtype)
        sums: Sums = how(  # type: ignore[operator]
            tokens, wanted[0], scale=0.7, bias=wanted[-1] if case.bias else None, normalise=case.normalise
        )
        upstream = torch.Generator().manual_seed(1)
        total = sum((y.double() * torch.randn(y.shape, generator=upstream, dtype=torch.float64)).sum() for y in sums)
        return [*sums, *torch.autograd.grad(total, wanted)]  # type: ignore[arg-type]

    names = ["output", "logsumexp", "queries", *([] if case.frozen else ["tokens"]), *(["bias"] if case.bias else [])]
    pairs = zip(results(case.dtype, fused), results(torch.float64, plain), strict=True)
    errors = {}
    for name, (ours, right) in zip(names, pairs, strict=True):
        assert ours.isfinite().all(), (case, name)
        assert right.isfinite().all(), (case, name)
        assert ours.shape == right.shape, (case, name)
        largest = right.abs().max().clamp(min=1).item() if right.numel() else 1.0
        errors[name] = (ours.double() - right).abs().max().item() / largest if right.numel() else 0.0
    return errors


def run_pool(pool: nn.Module, form: str) -> dict[str, float]:
    """Largest error of a pool's output and gradients, which must have come from the kernel."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 40, DIM, generator=generator)
    mask = torch.arange(40) < torch.tensor([40, 9, 31]).unsqueeze(1)

    def results(pool: nn.Module, x: Tensor) -> list[Tensor]:
        y = pool(x, mask) if form == "masked" else pool(Bags(x[mask], torch.tensor([0, 40, 49, 80])))
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = [p for p in pool.parameters() if p.requires_grad]
        total = (y.double() * upstream).sum()
        return [y, *(g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None)]

    right = results(copy.deepcopy(pool).double(), values.double())
    calls = []

    def counted(*arguments: Any, **more: Any) -> Sums:
        calls.append(arguments)
        return fused(*arguments, **more)

    with (
        mock.patch.object(absorbed, "available", lambda x: x.dtype == torch.float32),
        mock.patch.object(absorbed, "fused", counted),
    ):
        ours = results(pool, values)
    assert len(calls) == 1, (type(pool), form)
    return {
        str(number): (a.double() - b).abs().max().item() / b.abs().max().clamp(min=1).item()
        for number, (a, b) in enumerate(zip(ours, right, strict=True))
    }


def pools() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield EfficientProbing(DIM, queries=4)
    yield SimPool(DIM, heads=2, plan="absorbed")
    yield JepaPool(DIM, heads=2, queries=1)
    yield PMA(DIM, heads=2, plan="absorbed")


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    found = {str(case): run(case) for case in cases()}
    for pool, form in itertools.product(pools(), ("masked", "ragged")):
        found[f"{type(pool).__name__}, {form}, float32"] = run_pool(pool, form)
    print(json.dumps(found))
