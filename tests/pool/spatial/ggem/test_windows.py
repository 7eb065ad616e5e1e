import pytest
import torch
import torch.nn.functional as F
from tests.maps import maps
from tests.pools import by_rules

from cenote.core import InputError
from cenote.pool import GGeM, GGeMPool1d, GGeMPool2d, GGeMPool3d
from cenote.testing import check_spatial_pool


def positive(dims: int = 2) -> torch.Tensor:
    return maps(dims).abs() + 0.01


def with_exponents(*p: float, **window) -> GGeMPool2d:
    pool = GGeMPool2d(groups=len(p), **window).double()
    with torch.no_grad():
        pool.p.copy_(torch.tensor(p))
    return pool


@pytest.mark.parametrize(
    "window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}]
)
def test_exponent_one_is_the_mean_and_a_large_one_tends_to_the_maximum(window: dict) -> None:
    x = positive()
    torch.testing.assert_close(
        GGeMPool2d(**window, p=1.0).double()(x), F.avg_pool2d(x, **window, count_include_pad=False)
    )
    high = GGeMPool2d(**window, p=3000.0).double()(x)
    torch.testing.assert_close(high, F.max_pool2d(x, **window), atol=0, rtol=1e-3)


def test_a_large_negative_exponent_tends_to_the_minimum() -> None:
    x = positive()
    low = GGeMPool2d(2, p=-4000.0).double()(x)
    torch.testing.assert_close(low, -F.max_pool2d(-x, 2), atol=0, rtol=1e-3)


def test_direct_form_group_by_group() -> None:
    x, p = positive(), torch.tensor([0.5, 3.0, -2.0], dtype=torch.float64).view(3, 1, 1)
    y = with_exponents(0.5, 3.0, -2.0, kernel_size=3, stride=2)(x)
    torch.testing.assert_close(y, F.avg_pool2d(x.pow(p), 3, 2).pow(1 / p))


def test_equals_lp_pooling_over_the_root_of_the_count() -> None:
    x = positive()
    torch.testing.assert_close(GGeMPool2d(2, p=3.0).double()(x), F.lp_pool2d(x, 3.0, 2) / 4 ** (1 / 3))


def test_a_window_as_large_as_the_map_is_ggem() -> None:
    x = positive()
    whole = with_exponents(0.5, 3.0, -1.0, kernel_size=tuple(x.shape[2:]))(x)
    pool = GGeM(3, groups=3).double()
    with torch.no_grad():
        pool.p.copy_(torch.tensor([0.5, 3.0, -1.0]))
    torch.testing.assert_close(whole.flatten(1), pool(x))


def test_ggem_pools_real_positions_of_a_map() -> None:
    x, pool = positive(), GGeM(3, groups=3).double()
    mask = torch.zeros(2, *x.shape[2:], dtype=torch.bool)
    mask[:, :4, :3] = True
    poisoned = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    torch.testing.assert_close(pool(poisoned, mask), pool(x[..., :4, :3]))


@pytest.mark.parametrize("p", [-2e-6, 0.0, 2e-6])
def test_near_zero_is_the_geometric_mean(p: float) -> None:
    x = positive()
    y = GGeMPool2d(2, p=p).double()(x)
    torch.testing.assert_close(y, F.avg_pool2d(x.log(), 2).exp(), atol=1e-4, rtol=1e-4)


def test_large_powers_do_not_overflow() -> None:
    x = torch.full((1, 2, 4, 4), 10.0)
    torch.testing.assert_close(GGeMPool2d(2, p=200.0)(x), x[..., ::2, ::2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.7, 4.0, -3.0])
def test_gradients_for_map_and_exponent(p: float) -> None:
    pool, x = GGeMPool2d(2, stride=1, p=p).double(), positive()[:1, :1, :3, :3].clone().requires_grad_()

    def run(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pool, {"p": p}, (x,))

    assert torch.autograd.gradcheck(run, (x, pool.p.detach().clone().requires_grad_()))


@by_rules(check_spatial_pool)
@pytest.mark.parametrize(
    "pool",
    [
        GGeMPool1d(2, learnable=False),
        GGeMPool3d(2),
        GGeMPool2d(3, 2, 1, groups=3, p=-1.5),
    ],
)
def test_contract_of_variants(pool: torch.nn.Module, left_out: tuple[str, ...]) -> None:
    check_spatial_pool(pool, leave_out=left_out)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="groups"):
        GGeMPool2d(groups=0)
    with pytest.raises(InputError, match="groups"):
        GGeMPool2d(groups=2)(torch.rand(1, 3, 4, 4))
