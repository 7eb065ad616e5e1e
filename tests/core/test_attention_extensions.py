"""QK-norm, projections given as tensors, and vectors beside the tokens, each against attention written out in full."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cenote.core import Bags, InputError, PaddedTokens, Projection, cross_attention
from tests.pools import dense_attention, features, shaken

PLANS = ("auto", "absorbed", "projected")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shared", [True, False])
def test_beside_is_concatenation(plan: str, shared: bool) -> None:
    x, beside = features(3, 9, 12), features(3, 2, 12, seed=2)
    norm, k, v = (shaken(m, i) for i, m in enumerate((nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(12, 20))))
    query = features(3, 3, 8, seed=3)
    query = query[:1].expand(3, -1, -1) if shared else query
    output, weights = cross_attention(
        PaddedTokens(x),
        query[0] if shared else query,
        key=k,
        value=v,
        heads=4,
        key_norm=norm,
        value_norm=norm,
        beside=beside,
        plan=plan,
    )
    z = norm(torch.cat([beside, x], 1))
    expected, dense = dense_attention(query, k(z), v(z), 4)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weights.transpose(1, 2), dense.flatten(1, 2)[..., 2:], atol=1e-12, rtol=1e-12)


def test_beside_holds_for_bags_masks_and_sets_without_tokens() -> None:
    x, beside = features(3, 5, 8), features(3, 1, 8, seed=2)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    v = shaken(nn.Linear(8, 8))
    query = features(1, 1, 16, seed=3)[0]
    padded, _ = cross_attention(PaddedTokens(x, mask), query, value=v, heads=2, beside=beside)
    ragged, _ = cross_attention(Bags.from_padded(x, mask), query, value=v, heads=2, beside=beside)
    torch.testing.assert_close(padded, ragged)
    alone, _ = cross_attention(PaddedTokens(x[1:2, [0, 2]]), query, value=v, heads=2, beside=beside[1:2])
    torch.testing.assert_close(padded[1:2], alone)
    torch.testing.assert_close(padded[2], v(beside[2]))


def test_map_weights_applies_to_what_stands_beside_too() -> None:
    x, beside = features(2, 5, 8), features(2, 1, 8, seed=2)
    query = features(1, 1, 8, seed=3)[0]
    plain, _ = cross_attention(PaddedTokens(x), query, beside=beside)
    halved, _ = cross_attention(PaddedTokens(x), query, beside=beside, map_weights=lambda w: w / 2)
    torch.testing.assert_close(halved, plain / 2)


@pytest.mark.parametrize("plan", PLANS)
def test_head_norm_normalises_the_key_of_each_head(plan: str) -> None:
    x, query = features(2, 9, 12), features(2, 3, 8, seed=3)
    k, v, norm = (shaken(m, i) for i, m in enumerate((nn.Linear(12, 8), nn.Linear(12, 20), nn.LayerNorm(4))))
    output, _ = cross_attention(PaddedTokens(x), query, key=k, value=v, heads=2, head_norm=norm, plan=plan)
    expected, _ = dense_attention(query, norm(k(x).unflatten(-1, (2, 4))).flatten(-2), v(x), 2)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


def test_head_norm_needs_a_key() -> None:
    with pytest.raises(InputError, match="head_norm"):
        cross_attention(PaddedTokens(features()), features()[0, :1], head_norm=nn.LayerNorm(16).double())


@pytest.mark.parametrize("plan", PLANS)
def test_projections_are_linear_maps_by_their_tensors(plan: str) -> None:
    x, query = features(2, 9, 12), features(2, 1, 8, seed=3)
    fused = shaken(nn.Linear(12, 16))
    kw, vw = fused.weight.chunk(2)
    kb, vb = fused.bias.chunk(2)
    output, _ = cross_attention(
        PaddedTokens(x), query, key=Projection(kw, kb), value=Projection(vw, vb), heads=2, plan=plan
    )
    expected, _ = dense_attention(query, F.linear(x, kw, kb), F.linear(x, vw, vb), 2)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
