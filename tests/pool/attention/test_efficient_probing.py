import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import EfficientProbing
from cenote.testing import check_pool


def test_is_multi_head_attention_without_its_redundant_maps() -> None:
    """MHA whose key maps carry the queries: head j asks `q_j` and maps keys by `W_j` with `q_j^T W_j = query_j`."""
    dim, queries = 16, 4
    width = dim // queries
    pool, x = shaken(EfficientProbing(dim, queries=queries)), features(dim=dim)
    mha = nn.MultiheadAttention(dim, queries, bias=False, batch_first=True).double()
    asked = torch.randn(dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    by_head = asked.unflatten(0, (queries, width))
    # rank one per head: W_j = q_j query_j^T / |q_j|^2; theirs divides by sqrt(width), ours by sqrt(dim)
    keys = torch.einsum("jw,jd->jwd", by_head / by_head.square().sum(1, keepdim=True), pool.cls_token[0])
    keys = keys.flatten(0, 1) * (width / dim) ** 0.5
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([torch.eye(dim), keys, pool.v.weight]))
        mha.out_proj.weight.copy_(torch.eye(dim))
    expected, weights = mha(asked.expand(2, 1, dim), x, x, average_attn_weights=False)
    output, got = pool.attend(x)
    torch.testing.assert_close(output, expected.squeeze(1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got, weights.squeeze(2), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("d_out", [1, 2])
def test_values_projected_late_or_early(d_out: int) -> None:
    x = features(tokens=17, dim=32)
    late, early = (
        shaken(EfficientProbing(32, queries=8, d_out=d_out, plan=plan)) for plan in ("absorbed", "projected")
    )
    torch.testing.assert_close(late(x), early(x), atol=1e-12, rtol=1e-12)


def test_queries_of_zero_give_the_projected_mean() -> None:
    pool, x = shaken(EfficientProbing(16, queries=4, d_out=2)), features()
    with torch.no_grad():
        pool.cls_token.zero_()
    torch.testing.assert_close(pool(x), pool.v(x.mean(1)))


def test_one_query_is_scaled_dot_product_attention() -> None:
    pool, x = shaken(EfficientProbing(16, queries=1)), features()
    expected = F.scaled_dot_product_attention(pool.cls_token.expand(2, 1, 16), x, pool.v(x))
    torch.testing.assert_close(pool(x), expected.squeeze(1), atol=1e-12, rtol=1e-12)


def test_order_of_tokens_does_not_matter() -> None:
    pool, x = shaken(EfficientProbing(16, queries=4)), features()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(x[:, order]), pool(x))


def test_one_token_is_projected() -> None:
    pool, x = shaken(EfficientProbing(16, queries=4)), features(tokens=1)
    torch.testing.assert_close(pool(x), pool.v(x[:, 0]))


def test_each_query_fills_its_own_slice() -> None:
    pool, x = shaken(EfficientProbing(16, queries=4)), features()
    before = pool(x)
    with torch.no_grad():
        pool.cls_token[:, 2] += 1
    changed = (pool(x) != before).any(0).unflatten(0, (4, 4)).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_number_of_parameters() -> None:
    for dim, queries, d_out in ((16, 4, 1), (32, 8, 2), (768, 32, 1)):
        pool = EfficientProbing(dim, queries=queries, d_out=d_out)
        assert sum(p.numel() for p in pool.parameters()) == queries * dim + dim**2 // d_out


def test_default_queries_are_the_papers_or_the_largest_divisor_below() -> None:
    assert [EfficientProbing(d).queries for d in (768, 50, 13)] == [32, 25, 13]


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"queries": 1}, {"queries": 4, "d_out": 2}, {"plan": "projected"}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(EfficientProbing(16, **settings), leave_out=left_out)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"queries": 3}, "queries"), ({"d_out": 5}, "d_out"), ({"d_out": 4, "queries": 8}, "queries")],
)
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        EfficientProbing(16, **settings)
