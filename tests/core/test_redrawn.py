"""Other weights in the same model, and the correlation of ranks."""

from __future__ import annotations

import scipy.stats
import torch
from torch import nn

from cenote.core.redrawn import rank_correlation, redrawn


def test_matrices_are_drawn_anew_and_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30))
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, again, other = redrawn(model, 0), redrawn(model, 0), redrawn(model, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(first[0].bias, model[0].bias)
    torch.testing.assert_close(first[0].weight.std(), model[0].weight.std(), rtol=0.2, atol=0)


def test_the_correlation_is_spearman_s() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.randint(0, 6, (9,), generator=generator).float() for _ in range(2))
        expected = scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic
        assert abs(rank_correlation(a, b) - expected) < 1e-9
    assert rank_correlation(torch.ones(4), torch.arange(4.0)) == 0.0
