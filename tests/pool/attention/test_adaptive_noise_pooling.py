import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pools import by_rules, randn
from torch import nn

from cenote.core import Bags, InputError, PaddedTokens
from cenote.pool import AdaptiveNoisePool, Attenuator
from cenote.pool.attention.adaptive_noise_pooling.knn_centroid import knn_centroid_targets, knn_centroid_vectors
from cenote.pool.attention.adaptive_noise_pooling.measures import attenuation, noise_mass, regret, signal_loss
from cenote.pool.attention.adaptive_noise_pooling.pool import attenuation_bound
from cenote.testing import check_pool


def plain_average(dim: int, sharpness: float, **arguments: object) -> AdaptiveNoisePool:
    """Values and output are identities, so the result is the attention's average itself; scores `sharpness q . x`."""
    pool = AdaptiveNoisePool(dim, heads=1, **arguments).double()
    eye = torch.eye(dim, dtype=torch.float64)
    with torch.no_grad():
        pool.q.weight.copy_(sharpness * dim**0.5 * eye)
        pool.kv.weight.copy_(torch.cat([eye, eye]))
        pool.out.weight.copy_(eye)
    return pool


@pytest.mark.parametrize("query", [None, 2, -1, [1, 3], [0, -2, 4]])
@pytest.mark.parametrize("plan", ["absorbed", "projected"])
def test_it_is_its_equation(query: int | list[int] | None, plan: str) -> None:
    pool = AdaptiveNoisePool(8, heads=2, query=query, bias=True, plan=plan).double()
    x = randn(3, 5, 8)
    raw = x.mean(1) if query is None else x[:, query] if isinstance(query, int) else x[:, query].mean(1)
    q = pool.q(raw).unflatten(-1, (2, 4))
    k, v = (t.unflatten(-1, (2, 4)) for t in pool.kv(x).chunk(2, -1))
    a = (torch.einsum("bhd,bnhd->bhn", q, k) / 8**0.5).softmax(-1)
    expected = pool.out(torch.einsum("bhn,bnhd->bhd", a, v).flatten(1))
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected + raw if isinstance(query, int) else expected)
    torch.testing.assert_close(weights, a)


@by_rules(check_pool)
@pytest.mark.parametrize(("query", "bias"), [(0, False), (-1, True), ([0, 7], True)])
def test_chosen_queries_keep_the_contract(query: int | list[int], bias: bool, left_out: tuple[str, ...]) -> None:
    check_pool(AdaptiveNoisePool(16, heads=4, query=query, bias=bias), leave_out=left_out)


def test_without_a_query_it_is_the_mean() -> None:
    pool = plain_average(6, 0.0)
    x = randn(3, 5, 6)
    torch.testing.assert_close(pool(x), x.mean(1))


def test_a_single_query_token_is_added_as_it_is() -> None:
    pool = AdaptiveNoisePool(6, query=1).double()
    x = randn(3, 5, 6)
    added = x[:, 1]
    y = pool(x)
    pool.query = (1,)
    torch.testing.assert_close(y, pool(x) + added)


def test_other_tokens_may_be_permuted_but_not_the_query() -> None:
    pool = AdaptiveNoisePool(6, query=0).double()
    x = randn(3, 5, 6)
    torch.testing.assert_close(pool(x[:, [0, 3, 1, 4, 2]]), pool(x))
    assert not torch.allclose(pool(x[:, [1, 0, 2, 3, 4]]), pool(x))


def test_one_token() -> None:
    pool = AdaptiveNoisePool(6, query=0).double()
    x = randn(3, 1, 6)
    values = pool.kv(x[:, 0])[:, 6:]
    torch.testing.assert_close(pool(x), pool.out(values) + x[:, 0])


@pytest.mark.parametrize("query", [None, 0, -1, [0, -1], [1, 3]])
def test_a_mask_drops_tokens(query: int | list[int] | None) -> None:
    pool = AdaptiveNoisePool(6, query=query).double()
    x = randn(2, 6, 6)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    torch.testing.assert_close(pool(x, mask), pool(x[:, mask[0]]))
    torch.testing.assert_close(pool(Bags.from_padded(x, mask)), pool(x[:, mask[0]]))


def test_a_missing_query_token_is_left_out_of_the_mean() -> None:
    x = randn(2, 3, 6)
    several, one = AdaptiveNoisePool(6, query=[1, 7]).double(), AdaptiveNoisePool(6, query=[1]).double()
    one.load_state_dict(several.state_dict())
    torch.testing.assert_close(several(x), one(x))


@given(
    tokens=st.integers(2, 12),
    share=st.floats(0.01, 1),
    spread=st.floats(0, 1.5),
    margin=st.floats(0, 8),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_noise_is_attenuated_as_the_bound_says(
    tokens: int, share: float, spread: float, margin: float, seed: int
) -> None:
    """Scores are made by giving every token a first channel that a one-hot query reads."""
    generator = torch.Generator().manual_seed(seed)
    signal = max(1, round(share * tokens))
    x = torch.randn(1, tokens, 4, generator=generator, dtype=torch.float64)
    height = torch.rand(tokens, generator=generator, dtype=torch.float64)
    x[0, :signal, 0] = spread * height[:signal]
    x[0, signal:, 0] = -margin - 3 * height[signal:]
    pool = plain_average(4, 0.0, bias=True)
    with torch.no_grad():
        pool.kv.bias.zero_()
        pool.out.bias.zero_()
        pool.q.bias.copy_(torch.tensor([2.0, 0, 0, 0]))  # sqrt(dim), which the scale takes back
    distance = (pool(x)[0] - x[0, :signal].mean(0)).norm()
    assert distance <= attenuation_bound(tokens, signal, spread, margin) * x.norm(dim=-1).max() + 1e-9


@given(tokens=st.integers(2, 12), share=st.floats(0.01, 1), scale=st.floats(0, 5), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_for_the_scores_at_hand(tokens: int, share: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, scores = torch.randn(tokens, 5, generator=generator), scale * torch.randn(tokens, generator=generator)
    count = max(1, round(share * tokens))
    signal = torch.arange(tokens) < count
    found = attenuation(scores.double(), signal)
    weights = scores.double().softmax(0)
    assert found.noise_mass == pytest.approx(float(weights[count:].sum()))
    assert found.noise_mass <= (tokens - count) / count * np.exp(-found.margin) + 1e-9
    distance = (weights @ x.double() - x[:count].double().mean(0)).norm()
    assert distance <= found.bound * x.norm(dim=-1).max() + 1e-5


def test_noise_mass_of_a_set_whatever_its_mates_and_the_path() -> None:
    pool = AdaptiveNoisePool(8, heads=2, query=0).double()
    x = randn(3, 6, 8)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    for share in (1, 3):
        signal = (torch.arange(6) < share).expand(3, -1)
        output, weights = pool.attend(x, mask)
        mass = noise_mass(weights, signal)
        alone = pool.attend(x[1:2, :4])
        torch.testing.assert_close(mass[1], noise_mass(alone.weights, signal[:1, :4])[0])
        torch.testing.assert_close(mass, 1 - (weights * signal.unsqueeze(1)).sum(-1))
        torch.testing.assert_close(output, pool(x, mask))


def test_loss_of_the_signal_is_least_at_its_mean() -> None:
    x, signal = randn(2, 5, 3), torch.tensor([[True, True, False, True, False], [False, True, True, False, False]])
    mean = torch.stack([row[chosen].mean(0) for row, chosen in zip(x, signal, strict=True)])
    variance = torch.stack([row[chosen].var(0, correction=0).sum() for row, chosen in zip(x, signal, strict=True)])
    torch.testing.assert_close(signal_loss(mean, x, signal), variance)
    torch.testing.assert_close(signal_loss(mean + 1, x, signal), variance + 3)
    errors = torch.rand(4, 3)
    assert torch.equal(regret(errors), errors - errors.min(0).values)


def test_the_query_token_alone_is_a_rival() -> None:
    model = Attenuator(8, pooling="token", layers=1, heads=4).double()
    x = randn(2, 5, 8)
    _, encoded, _ = model._encoded(PaddedTokens(x))
    torch.testing.assert_close(model(x), encoded[:, 0])


def test_a_signal_query_beats_mean_and_max_over_the_shares_of_signal() -> None:
    """The mean is exact without noise and fails with it; the adaptive pool is near the signal's centroid throughout."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.zeros(8, dtype=torch.float64)
    centre[0] = 3.0
    pool = plain_average(8, 2.0, query=[0])
    errors: dict[int, list[float]] = {}
    for signal in (1, 4, 16, 32):
        x = torch.randn(200, 32, 8, generator=generator, dtype=torch.float64)
        x[:, :signal] = centre + 0.05 * torch.randn(200, signal, 8, generator=generator, dtype=torch.float64)
        target = x[:, :signal].mean(1)
        errors[signal] = [float((y - target).square().mean().detach()) for y in (pool(x), x.mean(1), x.amax(1))]
    for signal, (adaptive, mean, largest) in errors.items():
        assert adaptive < largest
        assert (adaptive < mean) == (signal < 32)
    assert errors[32][1] < 1e-20
    assert max(e[0] for e in errors.values()) < 0.1 * max(e[1] for e in errors.values())


@by_rules(check_pool)
@pytest.mark.parametrize(
    ("pooling", "projected"),
    [("adaptive", True), ("mean", False), ("max", True), ("token", False), ("cls", False), ("cls", True)],
)
def test_attenuator_keeps_the_contract(pooling: str, projected: bool, left_out: tuple[str, ...]) -> None:
    sizes = {"hidden": 16, "out_dim": 5} if projected else {}
    check_pool(
        Attenuator(8, pooling=pooling, layers=2, heads=4, norm_output=projected, bias_attention=projected, **sizes),
        leave_out=left_out,
    )


def test_attenuator_layer_is_a_pre_norm_transformer_layer() -> None:
    """Against PyTorch's own layer, whose scores are scaled by the width of a head: queries are shrunk to match."""
    model = Attenuator(8, pooling="mean", layers=1, heads=4, query_embedding=False, bias_attention=True).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    ours = model.layers[0]
    peer = nn.TransformerEncoderLayer(
        8, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        shrunk = torch.ones(3 * 8, 1, dtype=torch.float64)
        shrunk[:8] = 0.5
        peer.self_attn.in_proj_weight.copy_(shrunk * ours.attn.qkv.weight)
        peer.self_attn.in_proj_bias.copy_(shrunk.squeeze(1) * ours.attn.qkv.bias)
        pairs = [
            (peer.self_attn.out_proj, ours.attn.proj),
            (peer.linear1, ours.mlp.fc1),
            (peer.linear2, ours.mlp.fc2),
            (peer.norm1, ours.norm1),
            (peer.norm2, ours.norm2),
        ]
        for theirs, own in pairs:
            theirs.load_state_dict(own.state_dict())
    x = randn(2, 5, 8)
    torch.testing.assert_close(model(x), peer(x).mean(1))


def test_attenuator_tells_the_first_real_token_from_the_others() -> None:
    model = Attenuator(8, pooling="mean", layers=0).double()
    x = randn(1, 4, 8)
    mask = torch.tensor([[False, True, True, True]])
    first, others = model.query_emb.weight
    torch.testing.assert_close(model(x, mask), (x[:, 1:].sum(1) + first + 2 * others) / 3)

    with_cls = Attenuator(8, pooling="cls", layers=0).double()
    torch.testing.assert_close(with_cls(x)[0], with_cls.cls_token[0, 0] + with_cls.query_emb.weight[0])


def test_attenuator_starts_small() -> None:
    model = Attenuator(16, hidden=64, layers=2)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(0.018 < float(m.weight.std()) < 0.022 for m in linear)
    assert all(m.bias is None or not m.bias.any() for m in linear)


def test_dropout_rests_in_eval() -> None:
    for pool in (
        AdaptiveNoisePool(8, dropout_w=0.5),
        AdaptiveNoisePool(8, dropout_e=0.5),
        Attenuator(8, layers=1, pooling="mean", dropout_w=0.5),
    ):
        for p in pool.parameters():
            nn.init.normal_(p)
        x = torch.randn(2, 5, 8)
        assert not torch.equal(pool(x), pool(x))
        pool.eval()
        assert torch.equal(pool(x), pool(x))


def test_knn_targets_by_hand() -> None:
    x = np.random.RandomState(0).randn(3, 9, 4)
    for k in (1, 4, 8, 20):
        for i in range(3):
            others = sorted(x[i, 1:], key=lambda v: float(((v - x[i, 0]) ** 2).sum()))
            np.testing.assert_allclose(knn_centroid_targets(x, f"knn{k}")[i], np.mean(others[:k], axis=0))
            if k < 9:
                np.testing.assert_allclose(knn_centroid_targets(x, f"kfn{k}")[i], np.mean(others[-k:], axis=0))
    np.testing.assert_array_equal(knn_centroid_targets(x, "max"), x.max(1))
    np.testing.assert_array_equal(knn_centroid_targets(x, "avg"), x.mean(1))


def test_knn_vectors_follow_their_description() -> None:
    x = knn_centroid_vectors(300, vectors=64, dim=4, seed=3) * 2  # undo 1 / sqrt(dim)
    assert x.shape == (300, 64, 4)
    np.testing.assert_array_equal(x, knn_centroid_vectors(300, 64, 4, seed=np.random.RandomState(3)) * 2)
    deviations = x.std(1).ravel()
    # a normal has 1 to 3, an exponential 0.1 to 2, a uniform at most 3 / sqrt(12)
    assert deviations.max() < 4.5
    assert 0.2 < (deviations < 3 / 12**0.5).mean() < 0.7
    # only the uniform ones lean to a side, by half their mean width 1.6
    assert abs(x.mean() - 0.8 / 3) < 0.1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="query"):
        AdaptiveNoisePool(8, query=[])
    with pytest.raises(InputError, match="heads: 3"):
        AdaptiveNoisePool(8, heads=3)
    with pytest.raises(InputError, match="pooling"):
        Attenuator(8, pooling="median")
    with pytest.raises(InputError, match="cls_index"):
        Attenuator(8, pooling="cls", cls_tokens=2, cls_index=2)
    with pytest.raises(InputError, match="project_in"):
        Attenuator(8, hidden=16, project_in=False)
    with pytest.raises(InputError, match="method"):
        knn_centroid_targets(np.zeros((1, 2, 3)), "knn0")
    with pytest.raises(InputError, match="vectors"):
        knn_centroid_vectors(2, vectors=0)
    with pytest.raises(InputError, match="signal"):
        attenuation_bound(4, 5, 0.0, 0.0)
    for signal in (torch.zeros(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(InputError, match="signal"):
            attenuation(torch.zeros(3), signal)
