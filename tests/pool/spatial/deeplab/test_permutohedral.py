import pytest
import torch

from cenote.core import InputError
from cenote.pool import PermutohedralLattice
from cenote.pool.spatial.deeplab.permutohedral import _simplices


def features(points: int, dims: int, reach: float = 4.0, seed: int = 0) -> torch.Tensor:
    return reach * torch.rand(points, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_points_lie_inside_of_their_simplex(dims: int) -> None:
    f = features(500, dims)
    near, rank, weights = _simplices(f)
    assert (near.sum(1) == 0).all()
    assert (near % (dims + 1) == 0).all()
    assert torch.equal(rank.sort(1).values, torch.arange(dims + 1).expand(500, -1))
    assert (weights >= -1e-12).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(500, dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_normalised_sums_are_close_to_the_exact_ones(dims: int) -> None:
    f = features(800, dims)
    values = torch.rand(800, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(f, f).square() / 2)
    exact = (kernel @ values) / kernel.sum(1, keepdim=True)
    lattice = PermutohedralLattice(f)
    got = lattice(values) / lattice(torch.ones_like(values))
    assert (got - exact).abs().mean() < 0.01
    assert (got - exact).abs().max() < 0.1
    together = torch.corrcoef(torch.stack([lattice(values)[:, 0], kernel @ values[:, 0]]))
    assert together[0, 1] > 0.98


def test_far_points_do_not_see_each_other() -> None:
    f = torch.tensor([[0.0, 0.0], [40.0, 40.0]])
    y = PermutohedralLattice(f)(torch.tensor([[1.0], [0.0]]))
    assert y[0] > 0.2
    assert y[1] == 0


def test_linear_in_the_values_with_the_right_gradient() -> None:
    lattice = PermutohedralLattice(features(12, 3))
    values = features(12, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lattice, (values,))
    torch.testing.assert_close(lattice(3 * values + 1), 3 * lattice(values) + lattice(torch.ones_like(values)))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3), torch.zeros(0, 2), torch.tensor([[torch.nan]]), torch.rand(8, 5) * 1e9]
)
def test_wrong_features_are_named(wrong: torch.Tensor) -> None:
    with pytest.raises(InputError, match="features"):
        PermutohedralLattice(wrong)
