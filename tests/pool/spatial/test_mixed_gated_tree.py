from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.maps import SIZES, cells, maps
from tests.pools import shaken
from torch import Tensor, nn

from cenote import InputError
from cenote.pool import (
    GatedPool1d,
    GatedPool2d,
    GatedPool3d,
    MixedPool1d,
    MixedPool2d,
    MixedPool3d,
    TreePool1d,
    TreePool2d,
    TreePool3d,
)

CLASSES: dict[int, tuple[Any, Any, Any]] = {
    1: (MixedPool1d, GatedPool1d, TreePool1d),
    2: (MixedPool2d, GatedPool2d, TreePool2d),
    3: (MixedPool3d, GatedPool3d, TreePool3d),
}


def parameters(pool: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Parameters with the kernel flattened, as wide as `[..., 1 (batch), channels, *windows, cells]`."""
    windows = pool.windows
    out, channels = windows.output_size(x.shape[2:]), x.shape[1]
    return {
        name: p.flatten(-windows.dims).expand(-1, channels, *out, -1).unsqueeze(1)
        for name, p in pool.named_parameters()
        if name != "a"
    }


def by_definition(pool: Any, x: Tensor) -> Tensor:
    """The formulas of the paper, window by window."""
    a = cells(x, pool.kernel_size[0], pool.stride[0])
    largest, mean = a.amax(-1), a.mean(-1)
    p = parameters(pool, x)
    if "gate" in p:
        g = torch.sigmoid((p["gate"][0] * a).sum(-1))
        return g * largest + (1 - g) * mean
    if "leaves" in p:
        leaves = (p["leaves"] * a).sum(-1)
        gates = torch.sigmoid((p["gates"] * a).sum(-1)) if "gates" in p else []

        def node(m: int) -> Tensor:
            """Nodes in heap order: the children of `m` are `2m + 1` and `2m + 2`."""
            if m >= len(gates):
                return leaves[m - len(gates)]
            return gates[m] * node(2 * m + 1) + (1 - gates[m]) * node(2 * m + 2)

        return node(0)
    share = torch.sigmoid(pool.a)
    return share * largest + (1 - share) * mean


def sharing(x: Tensor, k: int, s: int) -> dict[str, dict[str, Any]]:
    regions = tuple((n - k) // s + 1 for n in x.shape[2:])
    return {
        "layer": {},
        "channel": {"channels": x.shape[1]},
        "region": {"regions": regions},
        "region and channel": {"channels": x.shape[1], "regions": regions},
    }


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2)])
@pytest.mark.parametrize("shared", ["layer", "channel", "region", "region and channel"])
def test_all_pools_in_all_sharing_modes_are_their_formulas(dims: int, k: int, s: int, shared: str) -> None:
    x = maps(dims)
    options = sharing(x, k, s)[shared]
    mixed, gated, tree = CLASSES[dims]
    for pool in (
        mixed(k, s, **options),
        gated(k, s, **options),
        *(tree(k, s, levels=n, **options) for n in (1, 2, 3, 4)),
    ):
        pool = shaken(pool)
        torch.testing.assert_close(pool(x), by_definition(pool, x))
    regions = math.prod((n - k) // s + 1 for n in SIZES[:dims])
    sets = (3 if "channel" in shared else 1) * (regions if "region" in shared else 1)
    for cls, numbers in ((mixed, 1), (gated, k**dims), (tree, 3 * k**dims)):
        assert sum(p.numel() for p in cls(k, s, **options).parameters()) == sets * numbers


def test_one_set_for_a_whole_net_is_one_module() -> None:
    x = maps()
    pool = shaken(GatedPool2d(2))
    first, second = copy.deepcopy(pool), copy.deepcopy(pool)
    assert sum(p.numel() for p in nn.Sequential(pool, nn.Tanh(), pool).parameters()) == 4
    (shared,) = torch.autograd.grad(pool(pool(x).tanh()).sum(), pool.gate)
    apart = torch.autograd.grad(second(first(x).tanh()).sum(), [first.gate, second.gate])
    torch.testing.assert_close(shared, apart[0] + apart[1])


def test_mixed_between_its_ends() -> None:
    x = maps()
    largest, mean = F.max_pool2d(x, 3, 2), F.avg_pool2d(x, 3, 2)
    for constraint, tolerance in (("clamp", 1e-12), ("sigmoid", 1e-3)):
        for a, expected in ((1.0, largest), (0.0, mean), (0.25, 0.25 * largest + 0.75 * mean)):
            y = MixedPool2d(3, 2, a=a, constraint=constraint).double()(x)
            torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(MixedPool2d(3, 2).double()(x), (largest + mean) / 2)


def test_gated_without_opinion_is_half_and_half_and_with_a_strong_one_the_maximum() -> None:
    x = maps()
    pool = GatedPool2d(3, 2).double()
    with torch.no_grad():
        pool.gate.zero_()
    torch.testing.assert_close(pool(x), (F.max_pool2d(x, 3, 2) + F.avg_pool2d(x, 3, 2)) / 2)
    with torch.no_grad():
        pool.gate.fill_(1e6)
    positive = x.abs() + 0.1
    torch.testing.assert_close(pool(positive), F.max_pool2d(positive, 3, 2))
    torch.testing.assert_close(pool(-positive), F.avg_pool2d(-positive, 3, 2))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_tree_of_means_is_the_mean_and_of_equal_leaves_a_convolution(levels: int) -> None:
    x = maps()
    pool = shaken(TreePool2d(3, 2, levels=levels))
    with torch.no_grad():
        pool.leaves.fill_(1 / 9)
    torch.testing.assert_close(pool(x), F.avg_pool2d(x, 3, 2))
    v = torch.randn(3, 3, dtype=torch.float64)
    with torch.no_grad():
        pool.leaves.copy_(v.expand_as(pool.leaves))
    expected = F.conv2d(x.flatten(0, 1).unsqueeze(1), v[None, None], stride=2).view(2, 3, 4, 3)
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_windows_are_their_leaves_by_their_shares(levels: int) -> None:
    x = maps()
    pool = shaken(TreePool2d(3, 2, levels=levels))
    shares = pool.shares(x)
    leaves = (parameters(pool, x)["leaves"] * cells(x, 3, 2)).sum(-1)
    assert shares.shape == leaves.shape
    torch.testing.assert_close(shares.sum(0), torch.ones_like(leaves[0]))
    torch.testing.assert_close((shares * leaves).sum(0), pool(x))
    torch.testing.assert_close(pool.shares(x[0]), shares[:, 0])


def test_one_cell() -> None:
    x = maps()
    torch.testing.assert_close(shaken(MixedPool2d(1))(x), x)
    torch.testing.assert_close(shaken(GatedPool2d(1))(x), x)


def test_clipped_windows_leave_out_what_is_outside() -> None:
    """Ceil mode: the last window of 9 cells, 2 apart and 2 wide, holds one column."""
    x = maps()
    pool = shaken(GatedPool2d(2, ceil_mode=True))
    y = pool(x)
    last = x[..., 8:, :2]
    g = torch.sigmoid((pool.gate[0, 0, 0, 0, 0] * last[..., 0, :]).sum(-1))
    expected = g * last.amax((-1, -2)) + (1 - g) * last.mean((-1, -2))
    torch.testing.assert_close(y[..., 4, 0], expected)
    counted = shaken(MixedPool2d(2, padding=1, count_include_pad=True, constraint="clamp"))
    with torch.no_grad():
        counted.a.zero_()
    torch.testing.assert_close(counted(x), F.avg_pool2d(x, 2, padding=1))


def test_gradients_are_the_formulas_of_the_paper() -> None:
    x = maps()[..., :8, :6].clone().requires_grad_()
    a = cells(x, 2, 2)
    largest, mean = a.amax(-1), a.mean(-1)
    first = (a == largest.unsqueeze(-1)).double()
    delta = torch.randn_like(largest)
    d = delta.unsqueeze(-1)

    def to_map(per_cell: Tensor) -> Tensor:
        return per_cell.unflatten(-1, (2, 2)).movedim((4, 5), (3, 5)).reshape(x.shape)

    mixed = MixedPool2d(2, a=0.3, constraint="clamp").double()
    at_x, at_a = torch.autograd.grad(mixed(x), [x, mixed.a], delta)
    torch.testing.assert_close(at_a.sum(), (delta * (largest - mean)).sum())
    torch.testing.assert_close(
        at_x, to_map(d * (mixed.a.detach().squeeze() * first + (1 - mixed.a.detach().squeeze()) / 4))
    )

    gated = shaken(GatedPool2d(2))
    omega = gated.gate.detach().flatten()
    g = torch.sigmoid((omega * a).sum(-1)).unsqueeze(-1)
    slope = g * (1 - g) * (largest - mean).unsqueeze(-1)
    at_x, at_gate = torch.autograd.grad(gated(x), [x, gated.gate], delta)
    torch.testing.assert_close(at_gate.flatten(), (d * slope * a).flatten(0, 3).sum(0))
    torch.testing.assert_close(at_x, to_map(d * (slope * omega + g * first + (1 - g) / 4)))

    tree = shaken(TreePool2d(2))
    v1, v2 = tree.leaves.detach().flatten(1)
    omega = tree.gates.detach().flatten()
    s = torch.sigmoid((omega * a).sum(-1)).unsqueeze(-1)
    f1, f2 = (v1 * a).sum(-1, keepdim=True), (v2 * a).sum(-1, keepdim=True)
    at_leaves, at_gate = torch.autograd.grad(tree(x), [tree.leaves, tree.gates], delta)
    torch.testing.assert_close(at_leaves[0].flatten(), (d * s * a).flatten(0, 3).sum(0))
    torch.testing.assert_close(at_leaves[1].flatten(), (d * (1 - s) * a).flatten(0, 3).sum(0))
    torch.testing.assert_close(at_gate.flatten(), (d * s * (1 - s) * (f1 - f2) * a).flatten(0, 3).sum(0))


def test_of_equal_maxima_the_first_gets_the_gradient() -> None:
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    pool = MixedPool2d(2, a=1.0, constraint="clamp")
    assert torch.autograd.grad(pool(x).sum(), x)[0].flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


def test_where_filters_start() -> None:
    torch.manual_seed(0)
    tree = TreePool2d(3, levels=3, channels=200)
    assert abs(float(tree.leaves.detach().std()) - 0.1) < 0.01
    assert abs(float(tree.gates.detach().std()) - 0.1) < 0.01
    x = maps().float()
    near = TreePool2d(3, 2, leaves="mean")
    torch.testing.assert_close(near(x), F.avg_pool2d(x, 3, 2), atol=0.2, rtol=0)


def test_a_gate_learns_what_a_mixture_cannot() -> None:
    """Half of the windows want their maximum, half their mean, as the sign of left minus right column says.

    A gate must come out more than five times better than the best mixture there is.
    """
    torch.manual_seed(0)
    x = 2 * torch.randn(64, 1, 8, 8)
    largest, mean = F.max_pool2d(x, 2), F.avg_pool2d(x, 2)
    a = cells(x, 2, 2)
    wants_maximum = a[..., 0] + a[..., 2] > a[..., 1] + a[..., 3]
    target = torch.where(wants_maximum, largest, mean)
    gap = largest - mean
    best = (gap * (target - mean)).sum() / gap.square().sum()
    best_mixture = (mean + best * gap - target).square().mean()
    pool = GatedPool2d(2)
    optimiser = torch.optim.Adam(pool.parameters(), lr=0.1)
    for _ in range(300):
        loss = (pool(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < float(best_mixture) / 5


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: MixedPool2d(2, a=1.5), "a"),
        (lambda: MixedPool2d(2, constraint="none"), "constraint"),
        (lambda: MixedPool2d(2, channels=0), "channels"),
        (lambda: GatedPool2d(2, regions=(2, 2, 2)), "regions"),
        (lambda: TreePool2d(2, levels=0), "levels"),
        (lambda: TreePool2d(2, leaves="zeros"), "leaves"),
        (lambda: GatedPool2d(2, channels=3)(torch.ones(1, 2, 4, 4)), "x"),
        (lambda: GatedPool2d(2, regions=(2, 2))(torch.ones(1, 2, 8, 8)), "x"),
    ],
)
def test_wrong_arguments_are_named(call: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        call()
