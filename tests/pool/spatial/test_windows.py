"""Windows stand where torch's own pooling puts them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cenote import InputError
from cenote.pool.spatial.windows import Windows

GRID = [
    (size, k, s, p, c)
    for size, k, s, p, c in itertools.product(range(1, 9), (1, 2, 3, 5), (1, 2, 3, 4), (0, 1, 2), (False, True))
    if 2 * p <= k and size + 2 * p >= k
]


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_size_is_that_of_torch(ceil_mode: bool) -> None:
    for size, k, s, p, c in GRID:
        if c == ceil_mode:
            expected = F.max_pool1d(torch.zeros(1, 1, size), k, s, p, ceil_mode=c).shape[2:]
            assert Windows.of(1, k, s, p, c).output_size((size,)) == tuple(expected), (size, k, s, p, c)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("k", "s", "p", "ceil_mode"), [(2, 2, 0, False), (3, 2, 1, True), (2, 3, 0, False), (3, 1, 0, False)]
)
def test_views_and_inside_give_the_mean_and_maximum_of_torch(
    dims: int, k: int, s: int, p: int, ceil_mode: bool
) -> None:
    windows = Windows.of(dims, k, s, p, ceil_mode)
    x = torch.randn(2, 3, *(7, 6, 5)[:dims], dtype=torch.float64)
    views = torch.stack(windows.views(x))
    inside = windows.inside(x.shape[2:], x.device)
    there = torch.stack(inside) if inside else torch.ones(k**dims, *views.shape[3:], dtype=torch.bool)
    there = there.flatten(0, 0).unsqueeze(1).unsqueeze(1)
    torch.testing.assert_close(views.sum(0) / there.sum(0), windows.mean(x))
    torch.testing.assert_close(views.masked_fill(~there, float("-inf")).amax(0), windows.max(x))
    assert (views[~there.expand_as(views)] == 0).all()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("k", "s", "p", "ceil_mode"), [(2, 2, 0, False), (3, 2, 1, True), (2, 3, 0, False)])
def test_spread_is_the_transpose_of_views(dims: int, k: int, s: int, p: int, ceil_mode: bool) -> None:
    windows = Windows.of(dims, k, s, p, ceil_mode)
    x = torch.randn(2, 3, *(7, 6, 5)[:dims], dtype=torch.float64, requires_grad=True)
    views = windows.views(x)
    g = [torch.randn_like(v) for v in views]
    (expected,) = torch.autograd.grad(views, x, g)
    torch.testing.assert_close(windows.spread(g, x.shape[2:]), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("owners", ["layer", "channels", "regions", "both"])
def test_filters_read_their_own_windows(dims: int, owners: str) -> None:
    windows = Windows.of(dims, 3, 2, 1, True)
    x = torch.randn(2, 3, *(7, 6, 5)[:dims], dtype=torch.float64)
    out = windows.output_size(x.shape[2:])
    channels = 3 if owners in ("channels", "both") else 1
    places = out if owners in ("regions", "both") else (1,) * dims
    filters = torch.randn(4, channels, *places, *windows.kernel, dtype=torch.float64)
    cells = torch.stack(windows.views(x), -1)
    expected = (cells.unsqueeze(0) * filters.flatten(-dims).unsqueeze(1)).sum(-1)
    torch.testing.assert_close(torch.stack(windows.filtered(x, filters)), expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": (2, 2, 2)}, "kernel_size"),
        ({"kernel_size": 2, "stride": 0}, "stride"),
        ({"kernel_size": 2, "stride": 1.5}, "stride"),
        ({"kernel_size": 3, "padding": 2}, "padding"),
        ({"kernel_size": 3, "padding": -1}, "padding"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        Windows.of(2, **arguments)


def test_a_map_smaller_than_a_window_is_named() -> None:
    with pytest.raises(InputError, match=r"^x: a map of size \(2, 5\) is smaller than one window \(3, 3\)"):
        Windows.of(2, 3).output_size((2, 5))
