"""Joined products give what vmap gives, values and gradients, without copying what members share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.jobs.probe.together import WIDE, joined_products

MEMBERS, SETS, TOKENS, DIM, OUT = 3, 4, 5, 6, 2
HIDDEN = WIDE + 2


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


X = randn(SETS, TOKENS, DIM)
SHARED_BIAS = randn(HIDDEN)
CASES = {
    "linear of shared tokens": (lambda w: F.linear(X, w), (OUT, DIM)),
    "linear with a bias": (lambda w: F.linear(X, w[:, :-1], w[:, -1]), (OUT, DIM + 1)),
    "wide linear with a bias": (lambda w: F.linear(X, w[:, :-1], w[:, -1]), (HIDDEN, DIM + 1)),
    "wide linear of own sets": (lambda w: F.linear(X[0] * w.sum(), w[:, :-1], w[:, -1]), (HIDDEN, DIM + 1)),
    "wide linear with a shared bias": (lambda w: F.linear(X, w, SHARED_BIAS), (HIDDEN, DIM)),
    "linear of own tokens": (lambda w: F.linear(X * w.sum(), w), (OUT, DIM)),
    "shared linear of own tokens": (lambda x: F.linear(x, X[0, :OUT]), (SETS, TOKENS, DIM)),
    "tokens times a matrix": (lambda w: X @ w, (DIM, OUT)),
    "a matrix times transposed tokens": (lambda w: w @ X.mT, (OUT, DIM)),
    "expanded queries times transposed tokens": (lambda w: w.expand(SETS, OUT, DIM) @ X.mT, (OUT, DIM)),
    "own queries of each set": (lambda w: w @ X.mT, (SETS, OUT, DIM)),
    "weights times tokens": (lambda w: w.transpose(1, 2) @ X, (SETS, TOKENS, OUT)),
    "tokens times a matrix of each set": (lambda w: X @ w, (SETS, DIM, OUT)),
    "one matrix times own sets": (lambda w: X[0] @ w, (SETS, DIM, OUT)),
    "own sets times one matrix": (lambda w: w @ X[0].mT, (SETS, OUT, DIM)),
    "own sets times own matrix": (lambda w: (X * w.sum()) @ w, (DIM, OUT)),
    "own matrix times own sets": (lambda w: w @ (X * w.sum()).mT, (OUT, DIM)),
    "own times own, sets each": (lambda w: torch.bmm(w, w.mT), (SETS, OUT, DIM)),
    "four dimensions": (lambda w: w @ X.unsqueeze(1).mT, (SETS, 2, OUT, DIM)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_vmap(case):
    function, shape = CASES[case]
    given = [randn(MEMBERS, *shape).requires_grad_() for _ in range(2)]
    expected = torch.func.vmap(function)(given[0])
    with joined_products():
        found = torch.func.vmap(function)(given[1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    wanted, got = (torch.autograd.grad(y, w, upstream)[0] for y, w in ((expected, given[0]), (found, given[1])))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [OUT, HIDDEN])
def test_outside_vmap_nothing_changes(columns):
    linear = nn.Linear(DIM, columns, dtype=torch.float64)
    with joined_products():
        y = linear(X)
    expected = linear(X)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, linear.parameters(), upstream),
        torch.autograd.grad(expected, linear.parameters(), upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
