import pytest
import torch
import torch.nn.functional as F
from tests.pool.layers.test_weighted_sum import stack
from tests.pools import by_rules, dense_attention, features, shaken

import cenote
from cenote.core import InputError
from cenote.pool import LastLayerTrainable, MultiLayerTrainable
from cenote.testing import check_layer_pool, check_pool

SMALL = {"latents": 5, "heads": 3, "head_dim": 4}


def written_out(m, h: torch.Tensor) -> torch.Tensor:
    z = m.latents.expand(len(h), -1, -1)
    k, v = (m.norm(h) @ m.to_kv.weight.T).chunk(2, -1)
    attended, _ = dense_attention(m.norm_latents(z) @ m.to_q.weight.T, k, v, m.heads)
    a = attended @ m.to_out.weight.T + z
    u, g = (m.ff_norm(a) @ m.ff_in.weight.T + m.ff_in.bias).chunk(2, -1)
    a = a + (u * F.gelu(g)) @ m.ff_out.weight.T + m.ff_out.bias
    y = a.mean(1)
    return y / y.norm(dim=-1, keepdim=True)


def test_equation_of_all_layers() -> None:
    x = stack()
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[6], [4]])
    last = shaken(MultiLayerTrainable(8, 4, **SMALL))
    expected = torch.stack([x[0, :, 5], x[1, :, 3]]) + last.layer_embedding
    torch.testing.assert_close(last(x, mask), written_out(last.look_up, expected))
    mean = shaken(MultiLayerTrainable(8, 4, tokens="mean", **SMALL))
    expected = torch.stack([x[0].mean(1), x[1, :, :4].mean(1)]) + mean.layer_embedding
    torch.testing.assert_close(mean(x, mask), written_out(mean.look_up, expected))


def test_equation_of_one_layer() -> None:
    pool, x = shaken(LastLayerTrainable(16, **SMALL)), features()
    torch.testing.assert_close(pool(x), written_out(pool.look_up, x))


def test_the_last_token_alone_is_one_key() -> None:
    pool, x = shaken(LastLayerTrainable(16, last_only=True, **SMALL)), features()
    mask = torch.arange(x.shape[1]).expand(len(x), -1) < torch.tensor([x.shape[1]] + [2] * (len(x) - 1)).unsqueeze(1)
    last = torch.stack([row[real][-1:] for row, real in zip(x, mask, strict=True)])
    before = pool(x, mask)
    torch.testing.assert_close(before, written_out(pool.look_up, last))
    with torch.no_grad():
        pool.look_up.to_q.weight.normal_()
    torch.testing.assert_close(pool(x, mask), before)


def test_unit_length() -> None:
    pool = shaken(MultiLayerTrainable(8, 4, **SMALL))
    torch.testing.assert_close(pool(100 * stack(5)).norm(dim=-1), torch.ones(5, dtype=torch.float64))


def test_with_one_layer_the_queries_do_not_matter() -> None:
    pool, x = shaken(MultiLayerTrainable(8, 1, **SMALL)), stack(layers=1)
    before, weights = pool.attend(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 1, dtype=torch.float64))
    with torch.no_grad():
        pool.look_up.to_q.weight.normal_()
    torch.testing.assert_close(pool(x), before)


def test_permuting_layers_with_their_embeddings_changes_nothing() -> None:
    pool, x = shaken(MultiLayerTrainable(8, 4, **SMALL)), stack()
    order = torch.tensor([3, 1, 0, 2])
    before = pool(x)
    assert not torch.allclose(pool(x[:, order]), before)
    with torch.no_grad():
        pool.layer_embedding.copy_(pool.layer_embedding[order].clone())
    torch.testing.assert_close(pool(x[:, order]), before)


def test_the_mean_of_the_latents_is_a_constant() -> None:
    """Without what is looked up, all inputs become the same vector."""
    pool = shaken(MultiLayerTrainable(8, 4, **SMALL))
    with torch.no_grad():
        for p in (pool.look_up.to_out.weight, *pool.look_up.ff_out.parameters()):
            p.zero_()
    constant = F.normalize(pool.look_up.latents.mean(0), dim=-1)
    torch.testing.assert_close(pool(stack(5)), constant.expand(5, -1))


def test_another_number_of_layers_is_refused_and_no_real_token_is_finite() -> None:
    for tokens in ("last", "mean"):
        pool, x = shaken(MultiLayerTrainable(8, 4, tokens=tokens, **SMALL)), stack()
        for layers in (3, 5):
            with pytest.raises(InputError, match=f"built for 4 layers, got {layers}"):
                pool(stack(layers=layers))
        mask = torch.tensor([[True] * 6, [False] * 6])
        y = pool(x.masked_fill(~mask[:, None, :, None], float("nan")), mask)
        assert bool(y.isfinite().all())
        torch.testing.assert_close(y[0], pool(x)[0])


def test_the_last_token_may_stand_left_or_right() -> None:
    pool, x = shaken(MultiLayerTrainable(8, 4, **SMALL)), stack(tokens=3)
    nothing = torch.zeros(2, 4, 2, 8, dtype=x.dtype)
    real = torch.tensor([True] * 3)
    pads = torch.tensor([False] * 2)
    left = pool(torch.cat([nothing, x], 2), torch.cat([pads, real]).expand(2, 5))
    right = pool(torch.cat([x, nothing], 2), torch.cat([real, pads]).expand(2, 5))
    torch.testing.assert_close(left, pool(x))
    torch.testing.assert_close(right, pool(x))


def test_weights_stand_on_the_last_token_or_on_all() -> None:
    x = stack()
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[6], [4]])
    for tokens in ("last", "mean"):
        _, weights = shaken(MultiLayerTrainable(8, 4, tokens=tokens, **SMALL)).attend(x, mask)
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
        assert int((weights[1, 0, 0] > 0).sum()) == (1 if tokens == "last" else 4)
        if tokens == "last":
            assert (weights[1, :, :, 3] > 0).all()


def test_the_gradient_reaches_middle_layers() -> None:
    pool, x = shaken(MultiLayerTrainable(8, 4, **SMALL)), stack().requires_grad_()
    pool(x)[:, 0].sum().backward()
    size = x.grad.abs().sum((0, 3))
    assert (size[:, -1] > 0).all()
    assert (size[:, :-1] == 0).all()


def test_number_of_parameters_at_the_size_of_the_paper() -> None:
    with torch.device("meta"):
        pool = MultiLayerTrainable(4096, 32)
    assert round(sum(p.numel() for p in pool.parameters()) / 1e9, 2) == 1.28


@by_rules(check_layer_pool)
@pytest.mark.parametrize(("layers", "tokens"), [(1, "last"), (3, "mean")])
def test_contract_of_all_layers(layers: int, tokens: str, left_out: tuple[str, ...]) -> None:
    check_layer_pool(MultiLayerTrainable(8, layers, tokens=tokens, **SMALL), leave_out=left_out)


@by_rules(check_pool)
@pytest.mark.parametrize("last_only", [False, True])
def test_contract_of_one_layer(last_only: bool, left_out: tuple[str, ...]) -> None:
    check_pool(LastLayerTrainable(8, last_only=last_only, **SMALL), leave_out=left_out)


def test_the_five_designs_have_names() -> None:
    x, stacked = torch.randn(2, 5, 8), torch.randn(2, 3, 5, 8)
    for name in ("last", "last-token-trainable-small", "last-layer-trainable-small"):
        assert cenote.create(name, dim=8)(x).shape == (2, 8)
    for name, tokens in (("multi-layer-last-token-small", "last"), ("multi-layer-trainable-small", "mean")):
        pool = cenote.create(name, dim=8, layers=3)
        assert pool.tokens == tokens
        assert pool(stacked).shape == (2, 8)


@pytest.mark.parametrize("wrong", [{"tokens": "first"}, {"latents": 0}, {"heads": 0}, {"head_dim": 0}])
def test_wrong_arguments_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        MultiLayerTrainable(8, 4, **wrong)
