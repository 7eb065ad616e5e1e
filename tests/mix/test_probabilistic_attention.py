"""Attention as a mixture of Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cenote.core import InputError
from cenote.mix.probabilistic_attention.layer import ProbabilisticAttention

PLAIN = 0.5
"""1 / sqrt(width)."""


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 4, 6, dtype=torch.float64)
    return q, k, v


def told(v: Tensor, at: list[int]) -> Tensor:
    """Values of twos at these tokens, with their indicators."""
    known = torch.zeros_like(torch.cat([v, v[:, :, :1]], 2))
    known[..., at] = 2.0
    known[:, :, -1, at] = 1.0
    return known


def test_with_uniform_precisions_it_is_softmax_attention() -> None:
    q, k, v = inputs()
    expected = scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
    torch.testing.assert_close(ProbabilisticAttention()(q, k, v, PLAIN, 0.0), expected)


def test_responsibilities_are_those_of_a_gaussian_mixture() -> None:
    from sklearn.mixture import GaussianMixture

    q, k, v = (t[:1, :1] for t in inputs())
    mixture = GaussianMixture(6, covariance_type="spherical")
    alpha, priors = torch.linspace(0.5, 3.0, 6).double(), torch.full((6,), 1 / 6).double()
    # of equal volume: their code leaves the determinants out
    priors = priors * alpha**-2.0
    mixture.weights_, mixture.means_ = (priors / priors.sum()).numpy(), k[0, 0].T.numpy()
    mixture.covariances_, mixture.precisions_cholesky_ = (1 / alpha).numpy(), alpha.sqrt().numpy()
    found = ProbabilisticAttention(magnitude_priors=False).infer(q, k, v, alpha.view(1, 1, 6), 0.0)
    torch.testing.assert_close(found.weights[0, 0], torch.from_numpy(mixture.predict_proba(q[0, 0].T.numpy())))


def test_strong_priors_freeze_keys_and_values() -> None:
    q, k, v = inputs()
    attention = ProbabilisticAttention(key_steps=3, value_steps=3)
    frozen = attention(q, k, v, PLAIN, 1.0, v_fixed=told(v, [1]), key_precision=1e12, value_precision=1e12)
    torch.testing.assert_close(frozen, ProbabilisticAttention()(q, k, v, PLAIN, 1.0))


@pytest.mark.parametrize("precision", [None, 0.5])
def test_without_known_values_the_output_stays(precision: float | None) -> None:
    q, k, v = inputs()
    found = ProbabilisticAttention(value_steps=2)(q, k, v, PLAIN, 1.0, v_fixed=told(v, []), value_precision=precision)
    torch.testing.assert_close(found, ProbabilisticAttention()(q, k, v, PLAIN, 1.0))


def test_a_component_that_no_known_token_touches_keeps_its_prior() -> None:
    q, k, v = inputs()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[1, 4] = False
    found = ProbabilisticAttention(value_steps=2).infer(
        q, k, v, PLAIN, 1.0, v_fixed=told(v, [1]), value_precision=0.5, mask=mask
    )
    torch.testing.assert_close(found.values[..., 4], v[..., 4])
    assert not torch.isclose(found.values[..., 3], v[..., 3]).any()


def test_a_key_that_nobody_reads_is_finite_without_a_prior() -> None:
    q, k, v = inputs()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 2] = False
    found = ProbabilisticAttention(key_steps=2).infer(q, k, v, PLAIN, mask=mask)
    assert all(bool(t.isfinite().all()) for t in found)


def test_a_row_that_may_read_nothing_gives_zeros() -> None:
    q, k, v = inputs()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[3] = False
    found = ProbabilisticAttention().infer(q, k, v, PLAIN, mask=mask)
    assert not found.weights[:, :, 3].any()
    assert not found.output[..., 3].any()
    priors = torch.ones(2, 3, 6, 6, dtype=torch.float64)
    priors[:, :, 3] = 0
    assert not ProbabilisticAttention()(q, k, v, PLAIN, priors=priors)[..., 3].any()


@pytest.mark.parametrize("factor", [3.0, 100.0, 1e4, torch.nan])
def test_a_masked_component_decides_nothing(factor: float) -> None:
    q, k, v = (t.float().requires_grad_() for t in inputs())
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 2] = False
    mask[2] = False
    known = told(v, [0, 2])
    attention = ProbabilisticAttention(key_steps=2, value_steps=2)
    kept = [0, 1, 3, 4, 5]
    one_less = attention.infer(*(t[..., kept] for t in (q, k, v)), PLAIN, 1.0, v_fixed=known[..., kept])
    scale = torch.ones(6).index_fill(0, torch.tensor(2), factor)
    found = attention.infer(*(t * scale for t in (q, k, v)), PLAIN, 1.0, v_fixed=known * scale, mask=mask)
    torch.testing.assert_close(found.weights[..., kept, :].sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(found.output[..., kept], one_less.output)
    torch.testing.assert_close(found.keys[..., kept], one_less.keys)
    assert not found.output[..., 2].any()
    for grad in torch.autograd.grad(found.output.sum(), (q, k, v)):
        assert grad[..., kept].isfinite().all()


def test_half_precision_knows_rows_that_may_read_nothing() -> None:
    q, k, v = (t.half() for t in inputs())
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[3], mask[:, 1] = False, False
    known = told(v, [])
    for found in ProbabilisticAttention(key_steps=1, value_steps=1).infer(
        q, k, v, PLAIN, 0.5, v_fixed=known, mask=mask
    ):
        assert found.isfinite().all()
        assert found.dtype == torch.float16


def test_without_precision_it_is_the_mean() -> None:
    q, k, v = inputs()
    found = ProbabilisticAttention(magnitude_priors=False)(q, k, v, 0.0)
    torch.testing.assert_close(found, v.mean(-1, keepdim=True).expand_as(v))


def test_with_much_precision_a_query_at_a_key_gets_its_value() -> None:
    _, k, v = inputs()
    torch.testing.assert_close(ProbabilisticAttention(magnitude_priors=False)(k, k, v, 1e4), v)


def test_precisions_of_components_go_with_priors_of_keys() -> None:
    q, k, v = inputs()
    alpha = torch.rand(2, 3, 6, dtype=torch.float64) + 0.1
    found = ProbabilisticAttention(key_steps=1).infer(q, k, v, alpha, key_precision=0.7)
    w = ProbabilisticAttention().infer(q, k, v, alpha).weights
    for j in range(6):
        a = alpha[..., j, None]
        expected = (0.7 * k[..., j] + a * (q @ w[..., j, None])[..., 0]) / (0.7 + a * w[..., j].sum(-1, keepdim=True))
        torch.testing.assert_close(found.keys[..., j], expected)


def test_positions_are_a_loop_over_pairs() -> None:
    q, k, v = (t[:1, :1, :2, :3] for t in inputs())
    q_pos, k_pos, v_pos = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    found = ProbabilisticAttention().infer(q, k, v, 0.7, 0.3, q_pos=q_pos, key_pos=k_pos, v_pos=v_pos)
    log = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            a, b = q[0, 0, :, i], k[0, 0, :, j]
            log[i, j] = 0.7 * (a @ b + a @ q_pos[:, i, j] + b @ k_pos[:, j, i])
            log[i, j] += 0.15 * (v[0, 0, :, j] + v_pos[:, i, j]).square().sum()
    weights = log.softmax(-1)
    torch.testing.assert_close(found.weights[0, 0], weights)
    torch.testing.assert_close(found.output[0, 0, ::2], v[0, 0] @ weights.T)
    torch.testing.assert_close(found.output[0, 0, 1::2], torch.einsum("ij,cij->ci", weights, v_pos))


def test_adapted_keys_drift_unless_they_are_anchored() -> None:
    q, k, v = inputs()
    drifting, anchored = (
        ProbabilisticAttention(key_steps=40, anchored=a).infer(q, k, v, PLAIN, key_precision=5.0).keys
        for a in (False, True)
    )
    assert (drifting - k).norm() > 2 * (anchored - k).norm()


def test_known_values_may_be_kept() -> None:
    q, k, v = inputs()
    known = told(v, [1, 4])
    found = ProbabilisticAttention(value_steps=1, clamp_known=True)(q, k, v, PLAIN, 1.0, v_fixed=known)
    assert torch.equal(found[..., [1, 4]], torch.full_like(found[..., [1, 4]], 2.0))


def test_tokens_in_another_order_come_out_in_that_order_and_gradients_flow() -> None:
    q, k, v = inputs()
    order = torch.randperm(6)
    attention = ProbabilisticAttention(key_steps=2, value_steps=2)
    known = told(v, [1])
    settings = {"alpha": PLAIN, "beta": 1.0, "key_precision": 1.0, "value_precision": 1.0}
    straight = attention(q, k, v, v_fixed=known, **settings)
    turned = attention(q[..., order], k[..., order], v[..., order], v_fixed=known[..., order], **settings)
    torch.testing.assert_close(turned, straight[..., order])
    small = [t[:1, :1, :2, :3].clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *given: attention(*given, **settings), small)


def test_known_values_of_other_channels_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(InputError, match="v_fixed: expected 4 channels of values and one of indicators, got 4"):
        ProbabilisticAttention()(q, k, v, PLAIN, v_fixed=v)
    assert math.isclose(PLAIN, 4**-0.5)
