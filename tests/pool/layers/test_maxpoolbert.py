import pytest
import torch
import torch.nn.functional as F
from tests.pool.layers.test_weighted_sum import stack
from tests.pools import by_rules, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import CLSAttention, MaxCLS, MaxPoolBERT
from cenote.testing import check_layer_pool

MASK = torch.arange(6).expand(2, 6) < torch.tensor([[6], [4]])


def torch_attention(pool: CLSAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(pool.dim, pool.heads, batch_first=True).double().eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.to_q.weight, pool.to_k.weight, pool.to_v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([pool.to_q.bias, pool.to_k.bias, pool.to_v.bias]))
        theirs.out_proj.load_state_dict(pool.to_out.state_dict())
    return theirs


@pytest.mark.parametrize("last", [1, 2, 4])
def test_max_seq_equals_torch_attention_over_the_maximum(last: int) -> None:
    pool, x = shaken(MaxPoolBERT(8, last=last)), stack()
    m = torch.stack(list(x.unbind(1))[-last:]).max(0).values
    expected, weights = torch_attention(pool)(m[:, :1], m, m, key_padding_mask=~MASK, average_attn_weights=False)
    output, got = pool.attend(x, MASK)
    torch.testing.assert_close(output, expected.squeeze(1))
    torch.testing.assert_close(got.sum(2), weights.squeeze(2))


def test_mean_seq_is_the_same_attention_over_the_mean() -> None:
    pool, x = shaken(MaxPoolBERT(8, last=2, over="mean")), stack()
    alone = shaken(CLSAttention(8))
    alone.load_state_dict(pool.state_dict())
    mean = x[:, -2:].mean(1, keepdim=True)
    output, weights = pool.attend(x, MASK)
    torch.testing.assert_close(output, alone(mean, MASK))
    torch.testing.assert_close(weights[:, :, -2:], alone.attend(mean, MASK).weights.expand(-1, -1, 2, -1) / 2)
    assert weights[:, :, :-2].eq(0).all()


def test_the_maximum_of_noise_lies_above_it() -> None:
    """Without any signal: the expected maximum of two normals is 0.564, of three 0.846 deviations."""
    noise = torch.randn(20_000, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for last, shift in ((1, 0.0), (2, torch.pi**-0.5), (3, 1.5 * torch.pi**-0.5)):
        assert float(MaxCLS(1, last=last)(noise).mean()) == pytest.approx(shift, abs=0.02)
    assert (round(torch.pi**-0.5, 2), round(1.5 * torch.pi**-0.5, 2)) == (0.56, 0.85)


def test_mha_equals_torch_attention_over_the_last_layer() -> None:
    pool, x = shaken(CLSAttention(8)), stack()
    last = x[:, -1]
    expected, weights = torch_attention(pool)(
        last[:, :1], last, last, key_padding_mask=~MASK, average_attn_weights=False
    )
    output, got = pool.attend(x, MASK)
    torch.testing.assert_close(output, expected.squeeze(1))
    torch.testing.assert_close(got[:, :, -1], weights.squeeze(2))
    assert got[:, :, :-1].eq(0).all()


def test_max_cls_of_one_layer_is_the_baseline() -> None:
    x = stack()
    torch.testing.assert_close(MaxCLS(8, last=1)(x), x[:, -1, 0])
    torch.testing.assert_close(MaxCLS(8, last=3)(x), x[:, 1:, 0].amax(1))


def test_equal_layers_are_their_maximum() -> None:
    x = stack()[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(MaxCLS(8)(x), x[:, 0, 0])
    attention, both = shaken(CLSAttention(8)), shaken(MaxPoolBERT(8))
    torch.testing.assert_close(both(x), attention(x))
    _, weights = MaxCLS(8).attend(x)
    torch.testing.assert_close(weights[:, 0, 1:, 0], torch.full((2, 3), 1 / 3, dtype=torch.float64))


def test_uniform_attention_with_identity_maps_is_the_mean_of_real_tokens() -> None:
    pool, x = MaxPoolBERT(8).double(), stack()
    with torch.no_grad():
        for p in (*pool.to_q.parameters(), *pool.to_k.parameters(), pool.to_v.bias, pool.to_out.bias):
            p.zero_()
        for map_ in (pool.to_v, pool.to_out):
            map_.weight.copy_(torch.eye(8))
    m = x[:, -3:].amax(1)
    torch.testing.assert_close(pool(x, MASK), torch.stack([m[0].mean(0), m[1, :4].mean(0)]))


def test_one_token_is_mapped_twice() -> None:
    pool, x = shaken(MaxPoolBERT(8)), stack(tokens=1)
    torch.testing.assert_close(pool(x), pool.to_out(pool.to_v(x[:, -3:, 0].amax(1))))


def test_padded_tokens_do_nothing_even_where_they_are_largest() -> None:
    x = stack()
    for content in (1e6, float("nan")):
        loud = x.masked_fill(~MASK[:, None, :, None], content)
        for pool in (MaxCLS(8), shaken(CLSAttention(8)), shaken(MaxPoolBERT(8))):
            torch.testing.assert_close(pool.double()(loud, MASK)[1], pool(x[1:, :, :4])[0])


def test_layers_that_take_no_part_do_nothing() -> None:
    x = stack()
    other = x.clone()
    other[:, :2] = 77.0
    for pool in (MaxCLS(8, last=2), shaken(CLSAttention(8)), shaken(MaxPoolBERT(8, last=2))):
        torch.testing.assert_close(pool(other), pool(x))


def test_residual_and_norm() -> None:
    x = stack()
    plain, added, normed = shaken(MaxPoolBERT(8)), shaken(MaxPoolBERT(8, residual=True)), MaxPoolBERT(8, norm=True)
    torch.testing.assert_close(added(x), plain(x) + x[:, -3:, 0].amax(1))
    normed.double().eval().load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(normed(x), F.layer_norm(plain(x), (8,)))


def test_dropout_works_in_training_only() -> None:
    pool, x = shaken(MaxPoolBERT(8, dropout=0.5)), stack()
    assert torch.equal(pool(x), pool(x))
    pool.train()
    assert not torch.equal(pool(x), pool(x))


@pytest.mark.parametrize("dim", [48, 768])
def test_number_of_parameters(dim: int) -> None:
    assert sum(p.numel() for p in MaxPoolBERT(dim).parameters()) == 4 * dim**2 + 4 * dim
    assert not list(MaxCLS(dim).parameters())


def test_more_layers_than_there_are_is_named() -> None:
    for pool in (MaxCLS(8, last=5), MaxPoolBERT(8, last=5).double()):
        with pytest.raises(InputError, match="at least 5 layers, got 4"):
            pool(stack())


@pytest.mark.parametrize("wrong", [{"last": 0}, {"heads": 3}, {"dropout": 1.0}, {"over": "sum"}])
def test_wrong_arguments_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        MaxPoolBERT(8, **wrong)


@by_rules(check_layer_pool)
def test_contract_of_variants(left_out: tuple[str, ...]) -> None:
    check_layer_pool(MaxPoolBERT(8, last=2, residual=True, norm=True), leave_out=left_out)
    check_layer_pool(MaxPoolBERT(8, last=2, over="mean"), leave_out=left_out)
    check_layer_pool(MaxCLS(8, last=1), leave_out=left_out)
