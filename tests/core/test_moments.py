"""Moments in pieces equal torch's, also far from zero, in half precision, of strided and of no tokens."""

import pytest
import torch

from cenote.core import moments
from cenote.core.moments import set_variance, token_moments


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(moments, "CACHED_BYTES", 2 * 7 * 6 * 8)


def torchs(x, dim):
    variance, mean = torch.var_mean(x.double(), dim, correction=0, keepdim=True)
    return mean, variance


@pytest.mark.parametrize("shift", [0.0, 1e6])
@pytest.mark.parametrize("strided", [False, True])
def test_values(shift, strided):
    x = torch.randn(5, 8, 6, dtype=torch.float64) + shift
    x = x[:, 1:] if strided else x[:, :7].clone()
    tolerance = {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(token_moments(x), torchs(x, -1), **tolerance)
    torch.testing.assert_close(set_variance(x), torchs(x, 1)[1].squeeze(1), **tolerance)
    torch.testing.assert_close(token_moments(x[0]), torchs(x[0], -1), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = (torch.randn(5, 7, 6) + 100).to(dtype)
    mean, variance = token_moments(x)
    assert mean.dtype == variance.dtype == set_variance(x).dtype == torch.float32
    torch.testing.assert_close((mean.double(), variance.double()), torchs(x, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(set_variance(x).double(), torchs(x, 1)[1].squeeze(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 7, 6), (5, 0, 6), (0, 6)])
def test_no_tokens(shape):
    mean, variance = token_moments(torch.zeros(shape))
    assert mean.shape == variance.shape == (*shape[:-1], 1)


def test_gradients_and_transforms_take_torchs_way():
    x = torch.randn(5, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: (*token_moments(t), set_variance(t)), x)
    stacked = torch.randn(3, 5, 7, 6, dtype=torch.float64)
    batched = torch.func.vmap(lambda t: (*token_moments(t), set_variance(t)))(stacked)
    one_by_one = zip(*((*token_moments(t), set_variance(t)) for t in stacked), strict=True)
    for found, wanted in zip(batched, one_by_one, strict=True):
        torch.testing.assert_close(found, torch.stack(wanted))
