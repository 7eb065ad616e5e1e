from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.maps import SIZES, assert_same_gradient_both_ways, cells, kept_for_backward, maps
from torch import Tensor

from cenote import InputError
from cenote.pool import SoftPool1d, SoftPool2d, SoftPool3d, WeightedWindowPool
from cenote.testing import check_spatial_pool

CLASSES = {1: SoftPool1d, 2: SoftPool2d, 3: SoftPool3d}


def by_definition(x: Tensor, k: int, s: int, p: int = 0, t: float = 1.0, shared: bool = False) -> Tensor:
    """Window by window, cell by cell."""
    dims = x.dim() - 2
    out = [(n + 2 * p - k) // s + 1 for n in x.shape[2:]]
    y = x.new_zeros(*x.shape[:2], *out)
    for place in itertools.product(*(range(n) for n in out)):
        window = x[(..., *(slice(max(0, o * s - p), o * s - p + k) for o in place))].flatten(-dims)
        e = (window / t).exp()
        e = e.sum(1, keepdim=True) if shared else e
        y[(..., *place)] = (e / e.sum(-1, keepdim=True) * window).sum(-1)
    return y


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("k", "s", "p"), [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 0), (2, 3, 0)])
@pytest.mark.parametrize("weights", ["channel", "shared"])
def test_every_window_stride_and_padding(dims: int, k: int, s: int, p: int, weights: Any) -> None:
    x = maps(dims)
    expected = by_definition(x, k, s, p, t=0.7, shared=weights == "shared")
    torch.testing.assert_close(CLASSES[dims](k, s, p, weights=weights, temperature=0.7)(x), expected)


def test_large_activations_give_the_maximum_and_small_ones_the_mean() -> None:
    x = maps()
    pool = SoftPool2d(3, 2)
    torch.testing.assert_close(pool(1e6 * x) / 1e6, F.max_pool2d(x, 3, 2))
    torch.testing.assert_close(pool(1e-7 * x) / 1e-7, F.avg_pool2d(x, 3, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(SoftPool2d(3, 2, temperature=1e-6)(x), F.max_pool2d(x, 3, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=16, max_size=16), st.floats(-100, 100))
def test_between_mean_and_maximum_and_shifts_pass_through(values: list[float], shift: float) -> None:
    x = torch.tensor(values, dtype=torch.float64).view(1, 1, 4, 4)
    y = SoftPool2d(2)(x)
    assert (y <= F.max_pool2d(x, 2) + 1e-12).all()
    assert (y >= F.avg_pool2d(x, 2) - 1e-12).all()
    torch.testing.assert_close(SoftPool2d(2)(x + shift), y + shift)


@pytest.mark.parametrize("weights", ["channel", "shared"])
@pytest.mark.parametrize("grad", ["full", "weights"])
def test_gradients_over_a_window_sum_to_one(weights: Any, grad: Any) -> None:
    x = maps()[:, :, :8, :6].clone().requires_grad_()
    pool = SoftPool2d(2, weights=weights, grad=grad)
    (g,) = torch.autograd.grad(pool(x).sum(), x)
    per_window = F.avg_pool2d(g, 2) * 4
    # a shared weight lets channels trade gradient: it is their sum that is fixed
    total = per_window if weights == "channel" else per_window.mean(1)
    torch.testing.assert_close(total, torch.ones_like(total))
    if grad == "weights":
        assert (g >= 0).all()


def test_the_gradient_is_the_formula_of_the_paper_or_the_derivative() -> None:
    x = maps()[:, :, :8, :6].clone().requires_grad_()
    y, w = SoftPool2d(2).attend(x)
    w = w.movedim((4, 5), (3, 5)).reshape(x.shape)
    spread = F.interpolate(y, scale_factor=2)
    full, held = (torch.autograd.grad(SoftPool2d(2, grad=g)(x).sum(), x)[0] for g in ("full", "weights"))
    torch.testing.assert_close(held, w)
    torch.testing.assert_close(full, w * (1 + x - spread))
    assert (full < 0).any()


def test_windows_of_one_cell_change_nothing() -> None:
    torch.testing.assert_close(SoftPool2d(1)(maps()), maps(), rtol=0, atol=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_constant_window_keeps_it_and_a_window_larger_than_the_map_is_refused(dims: int) -> None:
    for level in (-3.25, 0.0, 200.0):
        x = torch.full((1, 2, *(4,) * dims), level)
        assert torch.equal(CLASSES[dims](2)(x), torch.full((1, 2, *(2,) * dims), level))
    with pytest.raises(InputError, match="x:"):
        CLASSES[dims](5)(torch.zeros(1, 2, *(4,) * dims))


def test_not_monotone() -> None:
    """`(0, -x)` gives `-x e^-x / (1 + e^-x)`, which dips where `e^-x = x - 1`: at 1.278, to -0.278."""
    depth = torch.linspace(0, 6, 6001, dtype=torch.float64)
    pairs = torch.stack([torch.zeros_like(depth), -depth], -1).unsqueeze(1)
    y = SoftPool1d(2)(pairs).flatten()
    torch.testing.assert_close(y, -depth * (-depth).exp() / (1 + (-depth).exp()))
    lowest = int(y.argmin())
    assert abs(float(depth[lowest]) - 1.278) < 2e-3
    assert float(y[lowest]) == pytest.approx(1 - 1.278465, abs=1e-4)
    assert y[-1] > y[lowest] + 0.2


def test_one_window_over_the_whole_map() -> None:
    x = maps()
    y = SoftPool2d(SIZES[:2])(x).flatten(1)
    a = x.flatten(2)
    torch.testing.assert_close(y, (a.softmax(-1) * a).sum(-1))


def test_peer_softmax_aggregation() -> None:
    a = maps().flatten(2)
    y = SoftPool2d(SIZES[:2])(maps()).flatten(1)
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    by_set = aggr.SoftmaxAggregation(t=1.0)(
        a.transpose(1, 2).flatten(0, 1), index=torch.arange(2).repeat_interleave(63)
    )
    torch.testing.assert_close(by_set, y)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 90.0, 1e4, 1e30])
def test_no_magnitude_overflows(scale: float) -> None:
    x = (scale * maps()).float()
    y = SoftPool2d(3, 2)(x)
    torch.testing.assert_close(y.double(), by_definition_shifted(x.double(), 3, 2), rtol=1e-5, atol=1e-6 * scale)


def by_definition_shifted(x: Tensor, k: int, s: int) -> Tensor:
    a = cells(x, k, s)
    return (a.softmax(-1) * a).sum(-1)


@pytest.mark.parametrize(("dtype", "top"), [(torch.float16, 6e4), (torch.bfloat16, 1e30)])
def test_half_precision_of_large_values(dtype: torch.dtype, top: float) -> None:
    x = (maps() / maps().abs().max() * top).to(dtype)
    y = SoftPool2d(3, 2)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, by_definition_shifted(x.double(), 3, 2).to(dtype))


@pytest.mark.parametrize("level", [0.0, 1e3, 1e30, -1e30])
def test_gradients_of_ties_are_exact_at_any_level(level: float) -> None:
    x = torch.full((1, 1, 3, 3), level, requires_grad=True)
    for run in (SoftPool2d(3), torch.compile(SoftPool2d(3), fullgraph=True, backend="aot_eager")):
        (g,) = torch.autograd.grad(run(x).sum(), x)
        torch.testing.assert_close(g, torch.full_like(g, 1 / 9))


def test_clamped_output() -> None:
    x = maps()
    torch.testing.assert_close(SoftPool2d(2, clamp_output=True)(x), SoftPool2d(2)(x).clamp(min=0))
    torch.testing.assert_close(SoftPool2d(2, clamp_output=True).attend(x).output, SoftPool2d(2)(x).clamp(min=0))


POOLS: dict[str, WeightedWindowPool] = {
    "plain": SoftPool2d(3, 2, 1, ceil_mode=True),
    "temperature": SoftPool2d(2, temperature=0.3),
    "shared": SoftPool2d(3, 2, weights="shared", temperature=2.0),
    "held weights": SoftPool2d(3, 2, grad="weights"),
}


@pytest.mark.parametrize("name", POOLS)
def test_made_again_gradients_are_those_of_autograd(name: str) -> None:
    assert_same_gradient_both_ways(POOLS[name], maps())


class DistancePool(WeightedWindowPool):
    """Somebody's own pool: it says how cells score, and nothing of gradients."""

    dims = 2

    def score(self, a: Tensor, context: Tensor) -> Tensor:
        return -(a - context).abs()


def test_a_pool_of_ones_own_needs_a_score_only() -> None:
    x = maps().requires_grad_()
    a = cells(x, 3, 2)
    w = (-(a - a.mean(-1, keepdim=True)).abs()).softmax(-1)
    y = DistancePool(3, 2)(x)
    torch.testing.assert_close(y, (w * a).sum(-1))
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (y, (w * a).sum(-1))))
    check_spatial_pool(DistancePool(2))


def test_second_derivatives() -> None:
    x = maps()[:1, :1, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(SoftPool2d(3, 1), x)


def test_many_models_at_once() -> None:
    x = maps().unsqueeze(0).repeat(4, 1, 1, 1, 1) * torch.arange(1.0, 5).view(4, 1, 1, 1, 1)
    x.requires_grad_()
    pool = SoftPool2d(3, 2)
    one_by_one = torch.stack([pool(part) for part in x])
    together = torch.func.vmap(pool)(x)
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (together, one_by_one)))


def test_training_keeps_a_few_numbers_per_window_not_per_cell() -> None:
    x = torch.randn(1, 4, 64, 64, requires_grad=True)
    for pool in (SoftPool2d(2), SoftPool2d(5, 2), SoftPool2d(8)):
        y = pool(x)
        assert kept_for_backward(pool, x) <= 4 * y.numel()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weights": "all"}, "weights"),
        ({"grad": "none"}, "grad"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        SoftPool2d(2, **options)


def test_the_form_of_the_map_is_named() -> None:
    with pytest.raises(InputError, match=r"x: expected a tensor \[batch, channels, length\] or \[channels, length\]"):
        SoftPool1d(2)(torch.ones(4))
    with pytest.raises(InputError, match=r"\[channels, depth, height, width\], got shape \(2, 2\)"):
        SoftPool3d(2)(torch.ones(2, 2))
    with pytest.raises(InputError, match="got list"):
        SoftPool2d(2)([1.0])
