import math
from itertools import pairwise

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tests.pools import by_rules, randn
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cenote.core import Bags, InputError
from cenote.pool import ISAB, MAB, PMA, SAB, DeepSet, GaussianMixtures, SetTransformer, sample_mixtures
from cenote.pool.attention.set_transformer.clustering import adjusted_rand_index, clustering_scores
from cenote.testing import check_pool


def spread_out(module: nn.Module) -> nn.Module:
    """Float64, with parameters that are nowhere zero."""
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("ln", [False, True])
def test_mab_is_its_equation(heads: int, ln: bool) -> None:
    mab = spread_out(MAB(6, 5, 8, heads, ln))
    x, y = randn(2, 3, 6), randn(2, 7, 5)
    q, k, v = mab.fc_q(x), mab.fc_k(y), mab.fc_v(y)
    h = torch.empty_like(q)
    for part in torch.arange(8).chunk(heads):
        scores = q[..., part] @ k[..., part].mT / math.sqrt(8)  # the full width, whatever the heads
        h[..., part] = q[..., part] + scores.softmax(-1) @ v[..., part]
    h = mab.ln0(h) if ln else h
    expected = h + torch.relu(mab.fc_o(h))
    expected = mab.ln1(expected) if ln else expected
    torch.testing.assert_close(mab(x, y), expected)


@pytest.mark.parametrize("ln", [False, True])
def test_paper_variant_agrees_with_torch_multihead_attention(ln: bool) -> None:
    mab = spread_out(MAB(8, 5, 8, 4, ln, variant="paper"))
    x, y = randn(2, 3, 8), randn(2, 7, 5)
    peer = nn.MultiheadAttention(8, 4, kdim=5, vdim=5, batch_first=True).double()
    with torch.no_grad():
        # torch scales by the width of a head, 2, and this method by the full width, 8
        peer.q_proj_weight.copy_(mab.fc_q.weight / 2)
        peer.k_proj_weight.copy_(mab.fc_k.weight)
        peer.v_proj_weight.copy_(mab.fc_v.weight)
        peer.in_proj_bias.copy_(torch.cat([mab.fc_q.bias / 2, mab.fc_k.bias, mab.fc_v.bias]))
        peer.out_proj.weight.copy_(mab.merge.weight)
        peer.out_proj.bias.copy_(mab.merge.bias)
    norm0, norm1 = (mab.ln0, mab.ln1) if ln else (nn.Identity(), nn.Identity())
    h = norm0(x + peer(x, y, y)[0])
    torch.testing.assert_close(mab(x, y), norm1(h + mab.fc_2(torch.relu(mab.fc_o(h)))))


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("plan", ["absorbed", "projected"])
def test_shared_queries_give_the_same_as_repeated_ones(variant: str, plan: str) -> None:
    mab = spread_out(MAB(8, 5, 8, 2, True, variant))
    seeds, y = randn(3, 8), randn(2, 7, 5)
    mask = torch.rand(2, 7) > 0.4
    output, weights = mab.from_shared(seeds, Bags.from_padded(y, mask), plan)
    torch.testing.assert_close(output, mab(seeds.expand(2, 3, 8), y, mask))
    assert weights.shape == (int(mask.sum()), 2 * 3)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("block", [lambda **k: SAB(8, 8, 2, **k), lambda **k: ISAB(8, 8, 2, inducing=3, **k)])
def test_blocks_are_equivariant_and_see_no_padding(block: type[nn.Module], variant: str) -> None:
    block = spread_out(block(ln=True, variant=variant))
    x = randn(2, 6, 8)
    order = torch.randperm(6)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])

    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    padded = block(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    torch.testing.assert_close(padded[:1, :4], block(x[:1, :4]))
    assert not padded[~mask].any()


def test_an_empty_set_leaves_the_residual_path() -> None:
    mab = spread_out(MAB(6, 5, 8, 2))
    x = randn(2, 3, 6)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    q = mab.fc_q(x)
    torch.testing.assert_close(mab(x, randn(2, 4, 5), mask), q + torch.relu(mab.fc_o(q)))


def test_pma_without_keys_weighs_all_tokens_alike() -> None:
    pool = spread_out(PMA(8, seeds=2, heads=4))
    nn.init.zeros_(pool.mab.fc_k.weight)
    x = randn(3, 5, 8)
    output, weights = pool.attend(x)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 5))
    h = pool.mab.fc_q(pool.S) + pool.mab.fc_v(x).mean(1, keepdim=True)
    torch.testing.assert_close(output, h + torch.relu(pool.mab.fc_o(h)))


@pytest.mark.parametrize("pool", [PMA(8, seeds=3), SetTransformer(8, hidden=16, inducing=4), DeepSet(8, hidden=16)])
def test_a_copy_of_every_token_changes_nothing(pool: nn.Module) -> None:
    pool = spread_out(pool)
    x = randn(2, 5, 8)
    torch.testing.assert_close(pool(torch.cat([x, x], 1)), pool(x))


@by_rules(check_pool)
@pytest.mark.parametrize(
    "pool",
    [
        PMA(16, seeds=3, ln=True, variant="paper", ff_before=True),
        SetTransformer(6, out_dim=5, seeds=3, hidden=8, inducing=4, ln=True),
        SetTransformer(6, hidden=8, inducing=4, decoder_blocks=1),
        SetTransformer(8, seeds=2, hidden=8, inducing=None, variant="paper", ln=True),
        DeepSet(6, out_dim=5, seeds=3, hidden=8, reduce="max"),
        DeepSet(6, hidden=8, reduce="sum"),
        DeepSet(6, hidden=8, reduce="attention"),
        DeepSet(6, out_dim=5, seeds=2, hidden=8, reduce="pma"),
        SetTransformer(6, out_dim=5, seeds=3, hidden=8, inducing=4, pooling="mean"),
    ],
    ids=[
        "pma",
        "full",
        "one output",
        "paper, SAB",
        "deep-sets max",
        "deep-sets sum",
        "deep-sets attention",
        "deep-sets pma",
        "ISAB, mean",
    ],
)
def test_further_settings_keep_the_contract(pool: nn.Module, left_out: tuple[str, ...]) -> None:
    check_pool(pool, leave_out=left_out)


def test_poolings_behind_and_before_other_parts() -> None:
    x = randn(2, 5, 8)
    deep = spread_out(DeepSet(8, hidden=16, reduce="attention"))
    f = deep.enc(x)
    a = (f @ deep.inside.cls_token[0, 0] / 4).softmax(1)
    torch.testing.assert_close(deep(x), deep.dec(deep.inside.v((a.unsqueeze(-1) * f).sum(1))))
    deep = spread_out(DeepSet(8, hidden=16, reduce="pma"))
    torch.testing.assert_close(deep(x), deep.dec(deep.inside(deep.enc(x))))
    for inducing in (None, 3):
        net = spread_out(SetTransformer(8, out_dim=3, seeds=2, hidden=16, inducing=inducing, pooling="mean"))
        encoded = net.enc[1](net.enc[0](x))
        torch.testing.assert_close(net(x), net.out(encoded.mean(1)).view(2, 2, 3))


def products(block: nn.Module, tokens: int) -> int:
    # the fused CPU kernel is invisible to the counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        block(torch.randn(1, tokens, 8, dtype=torch.float64))
    return counter.get_total_flops()


def test_isab_is_linear_and_sab_quadratic_in_the_tokens() -> None:
    isab, sab = ISAB(8, 8, inducing=4).double(), SAB(8, 8).double()
    isab_step = products(isab, 200) - products(isab, 100)
    assert isab_step > 0
    assert products(isab, 300) - products(isab, 200) == isab_step
    # second difference of a n^2 + b n + c: scores and weighted values take 2 n^2 dim multiply-adds, two operations each
    curvature = products(sab, 300) - 2 * products(sab, 200) + products(sab, 100)
    assert curvature == 2 * (2 * 2 * 8) * 100**2


def test_dropout_rests_in_eval() -> None:
    pool = SetTransformer(4, hidden=8, dropout=0.5)
    x = torch.randn(2, 5, 4)
    assert not torch.equal(pool(x), pool(x))
    pool.eval()
    assert torch.equal(pool(x), pool(x))


def test_mixture_likelihood_agrees_with_torch_distributions() -> None:
    mixtures = GaussianMixtures.from_raw(randn(3, 4, 5))
    x = randn(3, 20, 2)
    peer = MixtureSameFamily(
        Categorical(probs=mixtures.pi.unsqueeze(1)),
        Independent(Normal(mixtures.mu.unsqueeze(1), mixtures.sigma.unsqueeze(1)), 1),
    )
    torch.testing.assert_close(mixtures.log_likelihood(x), peer.log_prob(x).mean(), atol=1e-7, rtol=1e-7)


def test_mixture_likelihood_sees_no_padding() -> None:
    mixtures = GaussianMixtures.from_raw(randn(2, 3, 5))
    x = randn(2, 6, 2)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    real = torch.cat([mixtures.joint(x)[0], mixtures.joint(x)[1, :4]]).logsumexp(-1).mean()
    filled = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(mixtures.log_likelihood(filled, mask), real)
    torch.testing.assert_close(mixtures.em_step(filled, mask).mu[1], mixtures.em_step(x[:, :4]).mu[1])


def test_em_never_loses_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    x, _, truth = sample_mixtures(8, 200, generator=generator)
    x = x.double()
    mixtures = GaussianMixtures.from_raw(torch.randn(8, 4, 5, generator=generator).double())
    likelihoods = []
    for _ in range(30):
        likelihoods.append(float(mixtures.log_likelihood(x)))
        mixtures = mixtures.em_step(x)
    assert all(b > a - 1e-9 for a, b in pairwise(likelihoods))
    assert likelihoods[-1] > likelihoods[0] + 1
    assert float(truth.log_likelihood(x.float())) > likelihoods[0]


def test_em_keeps_a_component_that_takes_no_point() -> None:
    mixtures = GaussianMixtures(
        torch.tensor([[0.5, 0.5]]), torch.tensor([[[0.0, 0.0], [1e4, 1e4]]]), torch.ones(1, 2, 2)
    )
    after = mixtures.em_step(torch.randn(1, 50, 2))
    assert torch.equal(after.mu[0, 1], mixtures.mu[0, 1])
    assert all(bool(part.isfinite().all()) for part in after)
    assert float(after.pi[0, 1]) == 0


def test_scores_of_each_set() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels, truth = sample_mixtures(4, 60, components=3, generator=generator)
    mixtures = GaussianMixtures.from_raw(torch.randn(4, 3, 5, generator=generator))
    mask = torch.rand(4, 60, generator=generator) > 0.2
    scores = clustering_scores(mixtures, x.masked_fill(~mask.unsqueeze(-1), float("nan")), labels, truth, mask)
    for i in range(4):
        own, real = slice(i, i + 1), mask[i]
        points = x[own, real]
        alone = GaussianMixtures(*(part[own] for part in mixtures))
        after = alone.em_step(points)
        torch.testing.assert_close(scores.direct[i], alone.log_likelihood(points))
        torch.testing.assert_close(scores.after_em[i], after.log_likelihood(points))
        torch.testing.assert_close(
            scores.oracle[i], GaussianMixtures(*(part[own] for part in truth)).log_likelihood(points)
        )
        assert float(scores.rand[i]) == pytest.approx(
            adjusted_rand_score(labels[i, real].numpy(), after.labels(points)[0].numpy()), abs=1e-6
        )
    assert (scores.after_em > scores.direct).all()
    whole = clustering_scores(mixtures, x, labels, truth)
    torch.testing.assert_close(whole.direct.mean(), mixtures.log_likelihood(x))


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_adjusted_rand_index_is_scikit_learns(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    a, b = (torch.randint(groups, (50,), generator=generator) for _ in range(2))
    assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a.numpy(), b.numpy()))
    assert adjusted_rand_index(a, a + 3) == 1
    assert adjusted_rand_index(a[:0], b[:0]) == 1


def test_sampled_problems_follow_their_description() -> None:
    x, labels, truth = sample_mixtures(2000, 50, components=3, generator=torch.Generator().manual_seed(1))
    again, _, _ = sample_mixtures(2000, 50, components=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x, again)
    assert truth.mu.abs().max() <= 4
    assert abs(float(truth.mu.std()) - 8 / math.sqrt(12)) < 0.05
    # a Dirichlet(1) weight of 3 has variance 2 / (9 * 4)
    assert abs(float(truth.pi.var()) - 2 / 36) < 0.004
    offset = x - truth.mu.gather(1, labels.unsqueeze(-1).expand(-1, -1, 2))
    assert abs(float(offset.std()) - 0.3) < 0.005
    taken = nn.functional.one_hot(labels, 3).double().mean(1)
    assert float((taken - truth.pi).abs().mean()) < 0.06
    agreement = (truth.labels(x) == labels).float().mean()
    assert agreement > 0.9


def test_amortised_clustering_learns() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = SetTransformer(2, out_dim=5, seeds=2, hidden=16, inducing=4)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    likelihoods = []
    for _ in range(60):
        x, _, _ = sample_mixtures(16, 40, components=2, generator=generator)
        likelihood = GaussianMixtures.from_raw(net(x)).log_likelihood(x)
        optimizer.zero_grad()
        (-likelihood).backward()
        optimizer.step()
        likelihoods.append(float(likelihood))
    assert sum(likelihoods[-10:]) / 10 > sum(likelihoods[:3]) / 3 + 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="heads: 3"):
        MAB(8, 8, 8, heads=3)
    with pytest.raises(InputError, match="variant: 'paper' adds the raw queries"):
        SetTransformer(6, hidden=8, variant="paper")
    with pytest.raises(InputError, match="seeds"):
        PMA(8, seeds=0)
    with pytest.raises(InputError, match="inducing"):
        ISAB(8, 8, inducing=0)
    with pytest.raises(InputError, match="pooling"):
        SetTransformer(6, pooling="max")
    with pytest.raises(InputError, match="decoder_blocks"):
        SetTransformer(6, pooling="mean", decoder_blocks=2)
    with pytest.raises(InputError, match="reduce"):
        DeepSet(8, reduce="median")
    with pytest.raises(InputError, match="1 \\+ 2"):
        GaussianMixtures.from_raw(torch.randn(1, 2, 4))
