import pytest
import torch
from tests.pools import by_rules, features, shaken
from torch import Tensor

from cenote.core import Bags, InputError, PaddedTokens
from cenote.pool import AttentiveStatisticsPool, StatisticsPool
from cenote.testing import check_pool


def written_out(pool: AttentiveStatisticsPool, x: Tensor) -> Tensor:
    """The paper's form: every token concatenated with the statistics of its set, raw moments, one channel at a time."""
    batch, tokens, dim = x.shape
    rows, weight = x, pool.token.weight
    if pool.context is not None:
        mean, std = x.mean(1, keepdim=True), (x.var(1, correction=0, keepdim=True) + 1e-8).sqrt()
        rows = torch.cat([x, mean.expand_as(x), std.expand_as(x)], -1)
        weight = torch.cat([weight, pool.context.weight], 1)
    hidden = pool.activation(rows @ weight.T + pool.token.bias)
    if pool.norm is not None:
        hidden = torch.nn.functional.batch_norm(
            hidden.flatten(0, 1), pool.norm.running_mean, pool.norm.running_var, pool.norm.weight, pool.norm.bias
        ).unflatten(0, (batch, tokens))
    weights = pool.score(hidden).softmax(1).unflatten(-1, (pool.queries, pool.heads))
    weights = weights.repeat_interleave(dim // pool.heads, -1)
    mean = (weights * x.unsqueeze(2)).sum(1)
    square = (weights * x.square().unsqueeze(2)).sum(1)
    std = (square - mean.square()).clamp(min=pool.eps).sqrt()
    return torch.cat([mean.flatten(1), std.flatten(1)], 1)


VARIANTS = [
    {},
    {"context": False},
    {"heads": 1, "context": False},
    {"heads": 4, "queries": 3},
    {"heads": 1, "queries": 2},
    {"hidden": 8, "activation": "relu", "batch_norm": True},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_equals_the_concatenated_form(settings: dict) -> None:
    pool, x = shaken(AttentiveStatisticsPool(16, **settings)), features(3)
    torch.testing.assert_close(pool(x), written_out(pool, x), atol=1e-9, rtol=1e-9)


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [VARIANTS[3], VARIANTS[4], VARIANTS[5]])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(AttentiveStatisticsPool(16, **settings), leave_out=left_out)


def test_equal_scores_give_mean_and_population_deviation() -> None:
    pool, x = shaken(AttentiveStatisticsPool(16)), features()
    with torch.no_grad():
        pool.score.weight.zero_()
    torch.testing.assert_close(pool(x), StatisticsPool(16, eps=0.0)(x))


def test_the_context_of_one_set_does_not_reach_another() -> None:
    pool, x = shaken(AttentiveStatisticsPool(16)), features(3)
    bags = Bags.from_list([x[0], x[1, :4], x[2, :1]])
    torch.testing.assert_close(pool(bags)[1:2], pool(x[1:2, :4]))
    torch.testing.assert_close(pool(bags)[2:], pool(x[2:, :1]))


def test_without_context_other_tokens_do_not_move_a_score() -> None:
    x = features()
    y = x.clone()
    y[:, 1:] *= 2
    for context in (True, False):
        pool = shaken(AttentiveStatisticsPool(16, context=context))
        a, b = (pool.scores(pool_tokens)[:, 0] for pool_tokens in (PaddedTokens(x), PaddedTokens(y)))
        assert torch.equal(a, b) is not context


def test_a_large_offset_does_not_cancel_the_deviation() -> None:
    pool = AttentiveStatisticsPool(4, heads=1, context=False)
    with torch.no_grad():
        pool.score.weight.zero_()
    x = torch.randn(1, 500, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(x + 4096)[:, 4:], pool(x)[:, 4:], atol=1e-3, rtol=1e-3)


def test_number_of_parameters_is_that_of_the_concatenated_form() -> None:
    for dim, hidden in ((16, 8), (24, 128)):
        count = sum(p.numel() for p in AttentiveStatisticsPool(dim, hidden).parameters())
        assert count == 3 * dim * hidden + hidden + hidden * dim + dim


def test_dropout_drops_whole_weights_and_only_while_training() -> None:
    torch.manual_seed(0)
    pool, x = AttentiveStatisticsPool(16, dropout=0.5).double(), features()
    weights = pool.attend(x).weights
    assert (weights == 0).double().mean() == pytest.approx(0.5, abs=0.15)
    kept = pool.eval().attend(x).weights
    torch.testing.assert_close(weights[weights > 0], 2 * kept[weights > 0])
    # the paper's formula of dropped weights, where they do not sum to one
    pool.train()
    torch.manual_seed(1)
    output, dropped = pool.attend(x)
    mean = (dropped.transpose(1, 2) * x).sum(1)
    torch.testing.assert_close(output[:, :16], mean)


def test_batch_norm_does_not_count_padding() -> None:
    torch.manual_seed(0)
    x, mask = features(), torch.arange(9).expand(2, 9) < 6
    pools = [AttentiveStatisticsPool(16, 8, batch_norm=True).double() for _ in range(2)]
    pools[1].load_state_dict(pools[0].state_dict())
    torch.testing.assert_close(pools[0](x, mask), pools[1](x[:, :6]))
    torch.testing.assert_close(pools[0].norm.running_var, pools[1].norm.running_var)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"heads": 3}, "heads"), ({"queries": 0}, "queries"), ({"activation": "gelu"}, "activation"), ({"eps": 0}, "eps")],
)
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        AttentiveStatisticsPool(16, **settings)
