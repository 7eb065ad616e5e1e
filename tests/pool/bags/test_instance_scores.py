"""Whoever pools bags can ask which instances counted."""

import pytest
import torch
from tests.pools import shaken

import cenote
from cenote.core import Bags
from cenote.pool import DeepSet

# after its block every token has taken from every other
WITHOUT = {"dinovit"}
# learn something for each place of a fixed number of tokens, which bags have not
FIXED = {"abmilp-positions", "clip", "cbam"}
METHODS = [m.name for m in cenote.methods(room="pool", kind="sets") if m.name not in FIXED]


def bags() -> Bags:
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Bags(values, torch.tensor([0, 5, 12]))


@pytest.mark.parametrize("name", METHODS)
def test_every_pool_of_bags_scores_their_instances(name: str) -> None:
    pool = shaken(cenote.create(name, dim=8))
    if not pool.permutation_invariant:
        pytest.skip("reads the order of the tokens, which bags have not")
    weights = pool.attend(bags()).weights
    if name in WITHOUT:
        assert weights is None
        return
    assert weights is not None
    assert weights.shape[-1] == 12
    assert bool(weights.isfinite().all())
    assert bool((weights != 0).any())


@pytest.mark.parametrize(("reduce", "total"), [("mean", 1.0), ("max", 1.0), ("sum", 5.0)])
def test_deep_sets_show_the_weights_of_the_pooling_inside(reduce: str, total: float) -> None:
    pool = shaken(DeepSet(8, reduce=reduce))  # type: ignore[arg-type]
    output, weights = pool.attend(bags())
    torch.testing.assert_close(output, pool(bags()))
    assert weights is not None
    assert float(weights[0, :5].sum()) == pytest.approx(total)
    assert bool((weights >= 0).all())
