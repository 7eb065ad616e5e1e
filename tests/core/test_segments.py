"""Reductions over ragged segments, against the same thing computed set by set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cenote.core import segments
from tests.core.batches import Batch, batches, make_batch

LENGTHS = [3, 0, 1, 5, 3]

Reduction = Callable[[Tensor, Tensor], Tensor]

# our function, and the same thing of one set that is not empty
PER_SET: dict[str, tuple[Reduction, Callable[[Tensor], Tensor]]] = {
    "sum": (segments.segment_sum, lambda v: v.sum(0)),
    "mean": (segments.segment_mean, lambda v: v.mean(0)),
    "std": (segments.segment_std, lambda v: (v.var(0, correction=0) + 1e-8).sqrt()),
    "max": (segments.segment_max, lambda v: v.amax(0)),
    "logsumexp": (segments.segment_logsumexp, lambda v: v.logsumexp(0)),
}


def ragged(batch: Batch) -> tuple[Tensor, Tensor]:
    bags = batch.bags()
    return bags.values, bags.offsets


@pytest.mark.parametrize("name", PER_SET)
@given(batch=batches())
def test_reduction_is_that_of_each_set(name: str, batch: Batch) -> None:
    ours, of_one = PER_SET[name]
    values, offsets = ragged(batch)
    y = ours(values, offsets)
    assert y.shape == (len(batch.sets), batch.dim)
    for got, v in zip(y, batch.sets, strict=True):
        expected = of_one(v) if len(v) else torch.zeros(batch.dim, dtype=v.dtype)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", PER_SET)
def test_reduction_gradients(name: str) -> None:
    values, offsets = ragged(make_batch(LENGTHS, 2, 0))
    reduction = PER_SET[name][0]
    values.requires_grad_()
    assert gradcheck(lambda v: reduction(v, offsets), values)
    assert gradgradcheck(lambda v: reduction(v, offsets), values)


@pytest.mark.parametrize("name", PER_SET)
def test_reduction_of_more_channels_than_one(name: str) -> None:
    values, offsets = ragged(make_batch(LENGTHS, 6, 0))
    reduction = PER_SET[name][0]
    torch.testing.assert_close(
        reduction(values.unflatten(1, (2, 3)), offsets), reduction(values, offsets).unflatten(1, (2, 3))
    )


@pytest.mark.parametrize("name", [*PER_SET, "softmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    # a sum kept in bfloat16 would stop at 256
    values = torch.cat([torch.ones(300, 1), torch.full((300, 1), 0.5)]).to(dtype)
    offsets = torch.tensor([0, 600])
    reduction = segments.segment_softmax if name == "softmax" else PER_SET[name][0]
    y = reduction(values, offsets)
    assert y.dtype == dtype
    exact = reduction(values.double(), offsets)
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=max(torch.finfo(dtype).eps, 2e-6))


def test_mean_does_not_overflow_in_float16() -> None:
    values = torch.full((4000, 1), 60.0, dtype=torch.float16)
    offsets = torch.tensor([0, 4000])
    assert segments.segment_mean(values, offsets).item() == 60.0
    assert segments.segment_std(values, offsets).isfinite().all()


@given(batch=batches())
def test_softmax_is_that_of_each_set(batch: Batch) -> None:
    values, offsets = ragged(batch)
    expected = torch.cat([v.softmax(0) for v in batch.sets])
    torch.testing.assert_close(segments.segment_softmax(values, offsets), expected, atol=1e-12, rtol=1e-12)


def test_softmax_gradients() -> None:
    values, offsets = ragged(make_batch(LENGTHS, 2, 0))
    values.requires_grad_()
    assert gradcheck(lambda v: segments.segment_softmax(v, offsets), values)
    assert gradgradcheck(lambda v: segments.segment_softmax(v, offsets), values)


def test_softmax_of_large_scores_and_of_minus_infinity() -> None:
    scores = torch.tensor([[1e4], [1e4 + 1], [float("-inf")], [-1e30]], dtype=torch.float64)
    weights = segments.segment_softmax(scores, torch.tensor([0, 3, 4]))
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.2689414214, 0.7310585786, 0, 1], dtype=torch.float64))


def test_weights_too_small_for_a_normal_number_are_zero() -> None:
    weights = segments.segment_softmax(torch.tensor([[0.0], [-60.0], [-95.0]]), torch.tensor([0, 3]))
    assert weights[1] > 0
    assert weights[2] == 0  # exp(-95) is a denormal number in float32
    assert segments.flush_tiny(torch.tensor([2e-30, 1e-31, float("nan")])).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")])
def test_logsumexp_of_infinite_values(infinite: float) -> None:
    values = torch.tensor([[infinite], [infinite], [1.0], [infinite]])
    expected = torch.stack([values[:2].logsumexp(0), values[2:].logsumexp(0)])
    torch.testing.assert_close(segments.segment_logsumexp(values, torch.tensor([0, 2, 4])), expected)


def test_no_sets_and_no_tokens() -> None:
    none, no_sets = torch.zeros(0, 3), torch.tensor([0])
    for reduction, _ in PER_SET.values():
        assert reduction(none, no_sets).shape == (0, 3)
        assert torch.equal(reduction(none, torch.tensor([0, 0, 0])), torch.zeros(2, 3))
    assert segments.segment_softmax(none, no_sets).shape == (0, 3)
    assert segments.segment_matmul(none, torch.zeros(0, 2), no_sets).shape == (0, 3, 2)
    assert segments.segment_scores(none, torch.zeros(0, 4, 3), no_sets).shape == (0, 4)
    assert torch.equal(segments.segment_matmul(none, torch.zeros(0, 2), torch.tensor([0, 0])), torch.zeros(1, 3, 2))
    assert segments.segment_scores(none, torch.zeros(1, 4, 3), torch.tensor([0, 0])).shape == (0, 4)


def products_set_by_set(values: Tensor, weights: Tensor, queries: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    bounds = list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
    pooled = torch.stack([weights[i:j].T @ values[i:j] for i, j in bounds])
    return pooled, torch.cat([values[i:j] @ queries[b].T for b, (i, j) in enumerate(bounds)])


PLANS = pytest.mark.parametrize(
    "small_set", [pytest.param(0, id="one product per set"), pytest.param(2**40, id="one product per length")]
)


@contextmanager
def small_sets_below(small_set: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SMALL_SET", small_set)
        yield


@PLANS
@given(
    lengths=st.one_of(
        st.lists(st.integers(0, 4), min_size=1, max_size=9),
        st.integers(0, 3).flatmap(lambda n: st.lists(st.just(n), min_size=1, max_size=4)),
    ),
    dim=st.integers(1, 3),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_products_and_their_gradients(small_set: int, lengths: list[int], dim: int, heads: int, seed: int) -> None:
    values, offsets = ragged(make_batch(lengths, dim, seed))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(values), heads, dtype=torch.float64, generator=generator)
    queries = torch.randn(len(lengths), heads, dim, dtype=torch.float64, generator=generator)
    inputs = [values.requires_grad_(), weights.requires_grad_(), queries.requires_grad_()]
    expected = products_set_by_set(*inputs, offsets)
    with small_sets_below(small_set):
        got = segments.segment_matmul(weights, values, offsets), segments.segment_scores(values, queries, offsets)
    grads = [torch.randn(y.shape, dtype=torch.float64, generator=generator) for y in expected]
    for a, b in zip(
        (*got, *torch.autograd.grad(got, inputs, grads)),
        (*expected, *torch.autograd.grad(expected, inputs, grads)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@PLANS
def test_products_gradients_against_finite_differences(small_set: int) -> None:
    values, offsets = ragged(make_batch(LENGTHS, 2, 0))
    weights = torch.randn(len(values), 2, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(len(LENGTHS), 2, 2, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    with small_sets_below(small_set):
        assert gradcheck(lambda w, v: segments.segment_matmul(w, v, offsets), (weights, values))
        assert gradcheck(lambda v, q: segments.segment_scores(v, q, offsets), (values, queries))
        assert gradgradcheck(lambda w, v: segments.segment_matmul(w, v, offsets), (weights, values))


def test_plan_is_chosen_by_mean_size() -> None:
    short = make_batch([2] * 10, 4, 0).bags()
    long = make_batch([1100], 4, 0).bags()
    assert segments._sets_are_small(short.values, short.offsets)
    assert not segments._sets_are_small(long.values, long.offsets)


class Counted(TorchDispatchMode):
    """Counts operations, and the bytes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operations += 1
        if not func.is_view:
            tensors = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return made


@pytest.mark.parametrize("sets", [200, 2_000])
def test_many_short_sets_take_no_operations_of_their_own(sets: int) -> None:
    lengths = torch.arange(sets) % 5 + 1
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    values = torch.randn(int(offsets[-1]), 64)
    weights = torch.rand(len(values), 1, requires_grad=True)
    queries = torch.randn(sets, 1, 64, requires_grad=True)
    with Counted() as counted:
        segments.segment_matmul(weights, values, offsets).sum().backward()
        segments.segment_scores(values, queries, offsets).sum().backward()
    # one product per length; a loop over the sets takes thousands, forward alone
    assert counted.operations < 300


def test_gradient_of_many_long_sets_takes_linear_memory() -> None:
    values = torch.randn(500 * 60, 64, requires_grad=True)
    weights = torch.rand(len(values), 1)
    offsets = torch.arange(0, len(values) + 1, 500)
    assert not segments._sets_are_small(values, offsets)
    with Counted() as counted:
        torch.autograd.grad(segments.segment_matmul(weights, values, offsets).sum(), values)
    # slices instead of a split would write all tokens once per set: 60 times as much
    assert counted.bytes < 4 * values.numel() * values.element_size()
