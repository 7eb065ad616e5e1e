from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.maps import assert_same_gradient_both_ways, cells, kept_for_backward, maps
from torch import Tensor

from cenote import InputError
from cenote.pool import (
    AdaPool1d,
    AdaPool2d,
    AdaPool3d,
    AdaUnpool1d,
    AdaUnpool2d,
    AdaUnpool3d,
    EDSCWPool1d,
    EDSCWPool2d,
    EDSCWPool3d,
    IDWPool2d,
    SoftPool2d,
    WeightedWindowPool,
    WindowPool,
)
from cenote.pool.spatial.unit import in_unit_interval, unit_parameter


def weighted(score: Tensor, a: Tensor) -> Tensor:
    e = score.exp()
    return (e * a).sum(-1) / e.sum(-1)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2), (3, 1), (2, 3)])
def test_edscw_is_its_formula(dims: int, k: int, s: int) -> None:
    a = cells(maps(dims), k, s)
    m = a.mean(-1, keepdim=True)
    pool = {1: EDSCWPool1d, 2: EDSCWPool2d, 3: EDSCWPool3d}[dims](k, s)
    torch.testing.assert_close(pool(maps(dims)), weighted(2 * (a * m).abs() / (a**2 + m**2), a))


@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2)])
def test_vector_similarity_is_between_channels(k: int, s: int) -> None:
    a = cells(maps(), k, s)
    m = a.mean(-1, keepdim=True)
    dsc = 2 * (a * m).abs().sum(1, keepdim=True) / (a**2 + m**2).sum(1, keepdim=True)
    torch.testing.assert_close(EDSCWPool2d(k, s, similarity="vector")(maps()), weighted(dsc, a))


def test_idw_is_its_formula() -> None:
    a = cells(maps(), 3, 2)
    w = 1 / (a - a.mean(-1, keepdim=True)).abs()
    torch.testing.assert_close(IDWPool2d(3, 2)(maps()), (w * a).sum(-1) / w.sum(-1))


def test_padding_is_left_out() -> None:
    x = maps()
    corner = x[..., :2, :2]
    for cls in (EDSCWPool2d, IDWPool2d, SoftPool2d):
        torch.testing.assert_close(cls(3, 2, 1)(x)[..., :1, :1], cls(2)(corner))


def test_weights_of_edscw_differ_by_at_most_e() -> None:
    weights = EDSCWPool2d(3, 2).attend(5 * maps()).weights
    assert weights is not None
    flat = weights.flatten(-2)
    assert float((flat.amax(-1) / flat.amin(-1)).max()) <= math.e + 1e-9


def test_edscw_follows_scale_but_not_shift_and_em_the_reverse() -> None:
    x = maps()
    edscw, em = EDSCWPool2d(2), SoftPool2d(2)
    for c in (3.0, -2.0, 1e-20, 1e20):
        torch.testing.assert_close(edscw(c * x) / c, edscw(x))
    assert not torch.allclose(em(3 * x) / 3, em(x), atol=1e-2)
    torch.testing.assert_close(em(x + 3), em(x) + 3)
    assert not torch.allclose(edscw(x + 3), edscw(x) + 3, atol=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("options", [{}, {"similarity": "vector"}])
def test_no_square_over_or_underflows(scale: float, options: dict[str, Any]) -> None:
    x = maps().float()
    y, g = with_gradient(EDSCWPool2d(3, 2, **options), x)
    y_scaled, g_scaled = with_gradient(EDSCWPool2d(3, 2, **options), scale * x)
    torch.testing.assert_close(y_scaled / scale, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g_scaled, g, rtol=1e-3, atol=1e-4)


def with_gradient(pool: WindowPool, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = pool(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("pool", [EDSCWPool2d(2), EDSCWPool2d(2, similarity="vector"), IDWPool2d(2), AdaPool2d(2)])
@pytest.mark.parametrize("constant", [0.0, 5.0, -3.0, 1e-30])
def test_a_constant_window_gives_its_constant(pool: WindowPool, constant: float) -> None:
    y, g = with_gradient(pool, torch.full((1, 2, 4, 4), constant))
    torch.testing.assert_close(y, torch.full_like(y, constant))
    assert g.isfinite().all()


def test_a_zero_in_a_window_of_mean_zero_counts_fully() -> None:
    y, g = with_gradient(EDSCWPool2d((1, 3)), torch.tensor([[[[-2.0, 0.0, 2.0]]]]))
    assert y.item() == 0
    assert g.isfinite().all()
    weights = EDSCWPool2d((1, 3)).attend(torch.tensor([[[[-2.0, 0.0, 2.0]]]])).weights
    assert weights is not None
    torch.testing.assert_close(weights.flatten(), torch.tensor([1.0, math.e, 1.0]) / (2 + math.e))


@pytest.mark.parametrize("pool", [EDSCWPool2d(2), IDWPool2d(2), SoftPool2d(2), AdaPool2d(2)])
def test_activations_of_200_are_finite(pool: WindowPool) -> None:
    x = torch.tensor([[[[200.0, -200.0], [199.0, 0.0]]]])
    y, g = with_gradient(pool, x)
    assert y.isfinite().all()
    assert g.isfinite().all()
    assert -200 <= y.item() <= 200


def test_opposite_signs_count_as_alike() -> None:
    # 3 and -3 are as similar to the mean of 1 as each other
    weights = EDSCWPool2d((1, 3)).attend(torch.tensor([[[[3.0, -3.0, 3.0]]]])).weights
    assert weights is not None
    torch.testing.assert_close(weights.flatten(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("cls", [EDSCWPool2d, IDWPool2d, SoftPool2d, AdaPool2d])
def test_windows_of_one_cell_change_nothing(cls: type[WindowPool]) -> None:
    torch.testing.assert_close(cls(1)(maps()), maps())


@pytest.mark.parametrize(
    "pool",
    [
        EDSCWPool2d(3, 2, 1, ceil_mode=True),
        EDSCWPool2d(2),
        EDSCWPool2d(3, 2, similarity="vector"),
        IDWPool2d(3, 2, 1),
        EDSCWPool2d(2, grad="weights"),
        IDWPool2d(2, eps=0.5),
    ],
)
def test_made_again_gradients_are_those_of_autograd(pool: WeightedWindowPool) -> None:
    assert_same_gradient_both_ways(pool, maps())


@pytest.mark.parametrize("pool", [EDSCWPool2d(2), EDSCWPool2d(2, similarity="vector"), IDWPool2d(2)])
def test_second_derivatives(pool: WindowPool) -> None:
    x = maps()[:1, :2, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(pool, x)


def test_training_keeps_a_few_numbers_per_window_not_per_cell() -> None:
    x = torch.randn(1, 4, 64, 64, requires_grad=True)
    for pool in (EDSCWPool2d(5, 2), EDSCWPool2d(8), IDWPool2d(8)):
        assert kept_for_backward(pool, x) <= 4 * pool(x).numel()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_adapool_mixes_its_two_parts(dims: int) -> None:
    x = maps(dims)
    cls = {1: AdaPool1d, 2: AdaPool2d, 3: AdaPool3d}[dims]
    pool = cls(2, beta=1.0)
    torch.testing.assert_close(pool(x), pool.edscw(x))
    pool = cls(2, beta=0.0)
    torch.testing.assert_close(pool(x), pool.em(x))
    out = pool(x).shape[2:]
    beta = torch.rand(out, dtype=torch.float64)
    torch.testing.assert_close(cls(2, beta=beta)(x), beta * pool.edscw(x) + (1 - beta) * pool.em(x))


def test_gradient_of_beta_is_the_formula() -> None:
    x, beta = maps(), torch.rand(4, 3, dtype=torch.float64)
    for grad in ("full", "weights"):
        pool = AdaPool2d(2, beta=beta, grad=grad)
        y = pool(x)
        g = torch.randn_like(y)
        expected = (g * (pool.edscw(x) - pool.em(x))).sum((0, 1))
        torch.testing.assert_close(torch.autograd.grad(y, pool.beta, g)[0], expected)


def test_beta_is_drawn_as_the_authors_draw_it() -> None:
    torch.manual_seed(0)
    beta = AdaPool2d(2, beta=(100, 100)).beta
    assert abs(float((beta == 0).double().mean()) - 0.5) < 0.03
    assert abs(float((beta == 1).double().mean()) - 0.1587) < 0.03
    assert not AdaPool2d(2, learnable=False).beta.requires_grad


@pytest.mark.parametrize("constraint", ["clamp", "sigmoid"])
def test_beta_stays_in_the_unit_interval(constraint: Any) -> None:
    x = maps()
    pool = AdaPool2d(2, beta=torch.tensor([[-3.0]]), constraint=constraint).double()
    torch.testing.assert_close(pool(x), pool.em(x), atol=1e-3, rtol=0)
    for expected in (0.9, 0.1):
        target = AdaPool2d(2, beta=expected)(x).detach()
        optimiser = torch.optim.Adam(pool.parameters(), lr=0.1)
        for _ in range(500):
            loss = (pool(x) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert 0 <= float(in_unit_interval(pool.beta, constraint).detach()) <= 1
        assert abs(float(in_unit_interval(pool.beta, constraint).detach()) - expected) < 0.01


def test_a_clamped_number_is_not_stuck_beyond_its_bounds() -> None:
    p = unit_parameter(torch.tensor([0.0, 1.0, 0.5]), "clamp")
    with torch.no_grad():
        p.copy_(torch.tensor([-1.0, 2.0, 0.5]))
    y = in_unit_interval(p, "clamp")
    assert y.tolist() == [0.0, 1.0, 0.5]
    inwards, outwards = (torch.tensor(g) for g in ([-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]))
    assert torch.autograd.grad(y, p, inwards, retain_graph=True)[0].tolist() == [-1.0, 1.0, 1.0]
    assert torch.autograd.grad(y, p, outwards)[0].tolist() == [0.0, 0.0, -1.0]


def test_weights_of_the_mixture() -> None:
    x, beta = maps(), torch.rand(4, 3, dtype=torch.float64)
    pool = AdaPool2d(2, beta=beta)
    output, weights = pool.attend(x)
    assert weights is not None
    torch.testing.assert_close(output, pool(x))
    torch.testing.assert_close((weights.flatten(-2) * cells(x, 2, 2)).sum(-1), output)
    alone = pool.attend(x[0])
    torch.testing.assert_close(alone.output, output[0])
    torch.testing.assert_close(alone.weights, weights[0])


def test_unpooling_is_the_authors_formula_per_channel() -> None:
    """Where windows do not overlap: the enlarged value times each mask, mixed by beta."""
    x, beta = maps()[..., :8, :6], torch.rand(4, 3, dtype=torch.float64)
    pool = AdaPool2d(2, beta=beta)
    y, weights = pool.attend(x)

    def mask(part: WeightedWindowPool) -> Tensor:
        w = part.attend(x).weights
        assert w is not None
        return w.movedim((4, 5), (3, 5)).reshape(x.shape)

    def enlarge(values: Tensor) -> Tensor:
        return F.interpolate(values, scale_factor=2, mode="area")

    expected = enlarge(y * beta) * mask(pool.edscw) + enlarge(y * (1 - beta)) * mask(pool.em)
    torch.testing.assert_close(AdaUnpool2d(2)(y, weights), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("k", "s", "p", "ceil_mode"), [(2, 2, 0, False), (3, 2, 1, False), (3, 2, 0, True)])
def test_unpooling_is_the_transpose_of_pooling_with_held_weights(
    dims: int, k: int, s: int, p: int, ceil_mode: bool
) -> None:
    x = maps(dims).requires_grad_()
    pool = {1: AdaPool1d, 2: AdaPool2d, 3: AdaPool3d}[dims](k, s, p, ceil_mode, grad="weights")
    unpool = {1: AdaUnpool1d, 2: AdaUnpool2d, 3: AdaUnpool3d}[dims](k, s, p, ceil_mode)
    y, weights = pool.attend(x)
    expected = torch.autograd.grad(pool(x), x, y)[0]
    torch.testing.assert_close(unpool(y, weights, x.shape[2:]), expected)
    torch.testing.assert_close(unpool(y[0], weights[0], x.shape), expected[0])


def test_what_unpooling_preserves() -> None:
    x = maps()[..., :8, :6]
    y, weights = SoftPool2d(2).attend(x)
    torch.testing.assert_close(F.avg_pool2d(AdaUnpool2d(2)(y, weights), 2) * 4, y)
    torch.testing.assert_close(F.avg_pool2d(AdaUnpool2d(2, preserve="mean")(y, weights), 2), y)
    constant = torch.full((1, 1, 5, 5), 3.0)
    y, weights = AdaPool2d(2, ceil_mode=True).attend(constant)
    back = AdaUnpool2d(2, ceil_mode=True, preserve="mean")(y, weights, (5, 5))
    torch.testing.assert_close(back, constant)


def test_one_weight_map_serves_all_channels() -> None:
    x = maps()[..., :8, :6]
    y, weights = SoftPool2d(2).attend(x)
    assert weights is not None
    mean = weights.mean(1, keepdim=True)
    torch.testing.assert_close(AdaUnpool2d(2)(y, mean), AdaUnpool2d(2)(y, mean.expand_as(weights)))


def test_unpooled_average_is_nearest_neighbour() -> None:
    y = maps()
    weights = torch.full((*y.shape, 2, 2), 0.25, dtype=torch.float64)
    torch.testing.assert_close(AdaUnpool2d(2, preserve="mean")(y, weights), F.interpolate(y, scale_factor=2))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: AdaPool2d(2, beta=1.5), "beta"),
        (lambda: AdaPool2d(2, beta=(3,)), "beta"),
        (lambda: AdaPool2d(2, beta=torch.ones(3)), "beta"),
        (lambda: AdaPool2d(2, constraint="tanh"), "constraint"),
        (lambda: AdaPool2d(2, beta=(3, 3))(torch.ones(1, 1, 8, 8)), "x"),
        (lambda: EDSCWPool2d(2, similarity="cosine"), "similarity"),
        (lambda: IDWPool2d(2, eps=0.0), "eps"),
        (lambda: AdaUnpool2d(2, preserve="all"), "preserve"),
        (lambda: AdaUnpool2d(2)(torch.ones(2, 2), torch.ones(2, 2, 2, 2)), "y"),
        (lambda: AdaUnpool2d(2)(torch.ones(1, 2, 2), torch.ones(1, 2, 2, 3, 3)), "weights"),
        (lambda: AdaUnpool2d(2)(torch.ones(1, 2, 2), torch.ones(1, 2, 2, 2, 2), (9, 9)), "output_size"),
    ],
)
def test_wrong_arguments_are_named(call: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        call()
