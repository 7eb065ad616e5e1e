"""Fused attention between projected vectors, against a softmax written out per set and head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.core import InputError
from cenote.core.dense import dense_attention
from tests.core.batches import make_batch


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 3),
    scale=st.sampled_from([None, 0.3]),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_each_set_and_head(
    lengths: list[int], heads: int, queries: int, scale: float | None, masked: bool, seed: int
) -> None:
    if not masked:
        lengths = [max(lengths[0], 1)] * len(lengths)
    batch = make_batch(lengths, 2 * heads, seed, max(lengths) + 1 if masked else None, fill=1e3)
    torch.manual_seed(seed)
    query = torch.randn(len(lengths), queries, 2 * heads, dtype=torch.float64, requires_grad=True)
    x = batch.x.clone().requires_grad_()
    y = dense_attention(query, x, x.sin(), heads, scale, batch.mask if masked else None)
    expected = []
    for q, rows, real in zip(query, x, batch.mask, strict=True):
        k = rows[real]
        v = k.sin()
        pairs = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        of_heads = [torch.softmax(a @ b.T * (2**-0.5 if scale is None else scale), -1) @ c for a, b, c in pairs]
        expected.append(torch.cat(of_heads, -1) if len(k) else torch.zeros_like(q))
    torch.testing.assert_close(y, torch.stack(expected), atol=1e-12, rtol=1e-12)
    if any(lengths):
        got, wanted = (torch.autograd.grad(t.sin().sum(), [query, x]) for t in (y, torch.stack(expected)))
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("heads", "says"), [(0, "heads: 0 does not divide the query width 4"), (3, "heads: 3")])
def test_heads_that_do_not_divide(heads: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        dense_attention(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), heads)
