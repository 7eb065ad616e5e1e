"""The power mean against its definition and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from cenote.core import Bags, PaddedTokens, Tokens, power_mean
from cenote.core import powermean as module
from tests.core.batches import make_batch

LENGTHS = [3, 0, 1, 5]
EXPONENTS = [-40.0, -2.0, -1.0, -1e-3, -1e-7, 0.0, 1e-7, 1e-3, 0.5, 1.0, 3.0, 40.0]


def both_forms(dtype: torch.dtype = torch.float64) -> list[tuple[Tokens, Tensor]]:
    """The same sets padded (NaN in padded slots) and ragged, with positive values of their tokens."""
    batch = make_batch(LENGTHS, 3, 0, 6)
    padded, bags = PaddedTokens(batch.x.to(dtype), batch.mask), batch.bags().to(dtype)
    return [(padded, padded.values.exp()), (bags, bags.values.exp())]


def some_weights(tokens: Tokens) -> Tensor:
    return tokens.softmax(tokens.values.square())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", EXPONENTS)
def test_definition(p: float, weighted: bool) -> None:
    for tokens, v in both_forms():
        weights = some_weights(tokens) if weighted else None
        y = power_mean(tokens, v, torch.tensor([p], dtype=torch.float64), weights)
        w = tokens.uniform() if weights is None else weights
        expected = tokens.sum(w * v.log()).exp() if p == 0 else tokens.sum(w * v**p) ** (1 / p)
        expected = expected.masked_fill((tokens.lengths() == 0).unsqueeze(1), 0)
        # the definition itself loses digits near p = 0
        tolerance = 1e-12 if p == 0 or abs(p) > 1e-2 else 1e-8
        torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)


def test_one_exponent_per_channel() -> None:
    p = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64)
    for tokens, v in both_forms():
        y = power_mean(tokens, v, p)
        for c in range(3):
            alone = power_mean(tokens, v[..., c : c + 1], p[c : c + 1])
            torch.testing.assert_close(y[:, c : c + 1], alone)


def test_limits() -> None:
    for tokens, v in both_forms():
        one = torch.tensor([1.0], dtype=torch.float64)
        torch.testing.assert_close(power_mean(tokens, v, one), tokens.mean(v))
        # the mean of N values lies within a factor N^(1/p) of the largest
        torch.testing.assert_close(power_mean(tokens, v, 1e6 * one), tokens.max(v), rtol=1e-5, atol=0)
        torch.testing.assert_close(power_mean(tokens, v, -1e6 * one), tokens.min(v), rtol=1e-5, atol=0)


@given(low=st.floats(-50, 50), step=st.floats(1e-3, 50), seed=st.integers(0, 2**16))
def test_grows_with_the_exponent(low: float, step: float, seed: int) -> None:
    v = torch.randn(1, 6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).exp()
    tokens = PaddedTokens(v)
    lower, upper = (power_mean(tokens, v, torch.tensor([p], dtype=torch.float64)) for p in (low, low + step))
    assert (lower <= upper * (1 + 1e-9)).all()
    assert (v.amin(1) <= lower * (1 + 1e-9)).all()
    assert (upper <= v.amax(1) * (1 + 1e-9)).all()


def test_large_powers_do_not_overflow() -> None:
    # 10^40 is above the largest float32, 10^60 above every float16
    v = torch.tensor([[[10.0], [10.0], [1.0]]])
    for dtype, p in ((torch.float32, 40.0), (torch.float16, 60.0), (torch.bfloat16, 60.0), (torch.float32, -60.0)):
        y = power_mean(PaddedTokens(v.to(dtype)), v.to(dtype), torch.tensor([p], dtype=dtype))
        expected = ((v.double() ** p).mean(1) ** (1 / p)).item()
        assert y.dtype == dtype
        assert y.item() == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [-3.0, -1.0, 0.0, 1e-7, 1e-3, 1.0, 3.0, 30.0])
def test_gradients(p: float, weighted: bool) -> None:
    exponents = torch.tensor([p, 2.0, p], dtype=torch.float64, requires_grad=True)
    for tokens, v in both_forms():
        v = v.detach().requires_grad_()
        weights = some_weights(tokens).detach().requires_grad_() if weighted else None
        inputs = (v, exponents) if weights is None else (v, exponents, weights)

        def run(v: Tensor, p: Tensor, *w: Tensor, tokens: Tokens = tokens) -> Tensor:
            return power_mean(tokens, v, p, *w)

        if isinstance(tokens, PaddedTokens) and weights is not None:
            # a padded slot has no weight, and a weight of zero no derivative in the log domain
            mask = tokens.mask.unsqueeze(-1)
            inputs = (v, exponents, torch.where(mask, weights, 0.5).detach().requires_grad_())
        assert gradcheck(run, inputs)


def test_padded_and_ragged_gradients_agree() -> None:
    found = []
    for tokens, v in both_forms():
        v, p = v.detach().requires_grad_(), torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
        g, g_p = torch.autograd.grad(power_mean(tokens, v, p).sin().sum(), (v, p))
        found.append((g[tokens.mask] if isinstance(tokens, PaddedTokens) else g, g_p))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_an_exponent_at_zero_can_leave_it() -> None:
    v = torch.tensor([[[1.0], [4.0]]])
    p = torch.zeros(1, requires_grad=True)
    (g,) = torch.autograd.grad(power_mean(PaddedTokens(v), v, p), p)
    # y = 2, and log v has the variance (log 2)^2
    assert g.item() == pytest.approx(2 * torch.tensor(2.0).log().item() ** 2 / 2, rel=1e-5)


def test_a_weight_of_zero_takes_nothing() -> None:
    # with log(smallest normal number) for log(0), 10^40 would outweigh it
    v = torch.tensor([[[10.0], [1.0]]], requires_grad=True)
    weights = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
    y = power_mean(PaddedTokens(v), v, torch.tensor([40.0]), weights)
    assert y.item() == pytest.approx(1.0)
    g_v, g_w = torch.autograd.grad(y, (v, weights))
    assert g_v.flatten().tolist() == pytest.approx([0.0, 1.0])
    assert g_w.isfinite().all()


def test_half_precision_keeps_logarithms_in_float32() -> None:
    torch.manual_seed(0)
    v = torch.rand(2, 500, 4) + 0.1
    exact = power_mean(PaddedTokens(v.double()), v.double(), torch.tensor([3.0], dtype=torch.float64))
    for dtype in (torch.float16, torch.bfloat16):
        y = power_mean(PaddedTokens(v.to(dtype)), v.to(dtype), torch.tensor([3.0], dtype=dtype))
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_empty_sets_have_finite_gradients() -> None:
    for tokens, v in both_forms():
        v, p = v.detach().requires_grad_(), torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
        weights = some_weights(tokens).detach().requires_grad_()
        for w in (None, weights):
            y = power_mean(tokens, v, p, w)
            assert not y[1].any()
            grads = torch.autograd.grad(y.sum(), (v, p) if w is None else (v, p, w))
            assert all(g.isfinite().all() for g in grads)
    no_slots = PaddedTokens(torch.zeros(2, 0, 3))
    assert not power_mean(no_slots, no_slots.values, torch.ones(1)).any()
    no_tokens = Bags(torch.zeros(0, 3), torch.tensor([0, 0]))
    assert not power_mean(no_tokens, no_tokens.values, torch.ones(1)).any()


def test_values_made_piece_by_piece_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 30, 3, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64, requires_grad=True)
    shapes = []

    def positive(x: Tensor) -> Tensor:
        shapes.append(x.shape[1])
        return x.exp()

    found = []
    for at_once in (2**20, 24):
        monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
        shapes.clear()
        y = power_mean(PaddedTokens(x), positive, p)
        found.append((y, *torch.autograd.grad(y.sin().sum(), (x, p))))
    assert set(shapes) == {4, 2}  # 30 tokens, four at a time
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
