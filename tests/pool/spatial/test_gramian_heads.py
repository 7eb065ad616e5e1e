from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, dense_attention, features, shaken
from torch import Tensor

from cenote import InputError
from cenote.core import Bags, PaddedTokens
from cenote.pool import DecorrelationLoss, GramianHeads, GramianPool, divergence_from_mean
from cenote.pool.spatial.gramian_heads.model import gramian
from cenote.pool.spatial.gramian_heads.strength import strength_and_correlation
from cenote.testing import check_pool

DIM = 16


def pool_of(**options: Any) -> GramianPool:
    return GramianPool(DIM, **{"branches": 3, "gram_dim": 6, "dim_embed": 8, "heads": 4, **options})


def heads_of(**options: Any) -> GramianHeads:
    return GramianHeads(DIM, 5, **{"branches": 3, "gram_dim": 6, "dim_embed": 8, "heads": 4, **options})


def triangle(f: Tensor) -> Tensor:
    """Row by row, `j >= i`."""
    r = f.shape[-1]
    g = f.transpose(1, 2) @ f
    t = torch.stack([g[:, i, j] for i in range(r) for j in range(i, r)], -1)
    return t / t.norm(dim=-1, keepdim=True)


def batch_norm(norm: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def by_definition(pool: GramianPool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Branch by branch as published: the class token and all tokens are concatenated and projected."""
    m, r = pool.vectors, pool.gram_dim
    reduced = batch_norm(pool.contraction_norm, pool.contraction(x).flatten(0, 1)).view(*x.shape[:2], m * r)
    t = torch.cat([triangle(f) for f in reduced.chunk(m, -1)], -1)
    embedded = batch_norm(pool.embedding_norm, pool.embedding(t.unsqueeze(-1)).squeeze(-1))
    outputs, shares = [], []
    for block, z in zip(pool.blocks, embedded.chunk(m, -1), strict=True):
        u = block.norm1(torch.cat([z.unsqueeze(1), x], 1))
        y, weights = dense_attention(block.q(u[:, :1]), block.k(u), block.v(u), block.heads)
        z = z + block.gamma1 * block.proj(y.squeeze(1))
        hidden = F.gelu(block.fc1(block.norm2(z).unsqueeze(-1)))
        batch, channels, g = *hidden.shape[:2], block.groups
        shuffled = hidden.reshape(batch, channels // g, g, 1).permute(0, 2, 1, 3).reshape(batch, channels, 1)
        outputs.append(z + block.gamma2 * block.fc2(shuffled).squeeze(-1))
        shares.append(weights[:, :, 0])
    return torch.stack(outputs, 1), torch.cat(shares, 1)


@pytest.mark.parametrize("options", [{}, {"branches": 2, "gram_dim": 3, "groups": 2}, {"heads": 2}])
def test_pool_is_its_definition(options: dict[str, Any]) -> None:
    pool, x = shaken(pool_of(**options)), features(dim=DIM)
    expected, weights = by_definition(pool, x)
    got = pool.attend(x)
    torch.testing.assert_close(got.output, expected)
    torch.testing.assert_close(got.weights, weights[..., 1:])
    torch.testing.assert_close(1 - got.weights.sum(-1), weights[..., 0])


def test_a_map_is_its_positions_row_by_row() -> None:
    pool, x = shaken(pool_of()), features(tokens=12, dim=DIM)
    torch.testing.assert_close(pool(x.transpose(1, 2).unflatten(2, (3, 4))), pool(x))


@by_rules(check_pool)
@pytest.mark.parametrize("branches", [1, 2])
def test_contract(branches: int, left_out: tuple[str, ...]) -> None:
    check_pool(pool_of(branches=branches), leave_out=left_out)


def test_the_triangle_holds_the_gramian() -> None:
    f = features(dim=4)
    t = gramian(PaddedTokens(f), f)
    i, j = torch.triu_indices(4, 4)
    g = f.new_zeros(2, 4, 4)
    g[:, i, j] = t
    g[:, j, i] = t
    whole = f.transpose(1, 2) @ f
    torch.testing.assert_close(g / g[:, :1, :1], whole / whole[:, :1, :1])
    torch.testing.assert_close(t, triangle(f))


def test_what_leaves_the_gramian() -> None:
    f = features(dim=4)
    t = gramian(PaddedTokens(f), f)
    order = torch.randperm(9)
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    for other in (f[:, order], 3 * f, 1e-3 * f, rotation @ f):
        torch.testing.assert_close(gramian(PaddedTokens(other), other), t)


def test_gramian_of_one_position_has_rank_one_and_of_zeros_is_zero() -> None:
    f = features(tokens=1, dim=4)
    i, j = torch.triu_indices(4, 4)
    g = f.new_zeros(2, 4, 4)
    g[:, i, j] = g[:, j, i] = gramian(PaddedTokens(f), f)
    assert torch.linalg.matrix_rank(g).tolist() == [1, 1]
    zeros = torch.zeros(2, 5, 4, requires_grad=True)
    t = gramian(PaddedTokens(zeros), zeros)
    assert (t == 0).all()
    assert torch.autograd.grad(t.sum(), zeros)[0].isfinite().all()


def test_gramian_of_half_precision_neither_overflows_nor_loses_its_length() -> None:
    f = (3e4 * features(dim=4).clamp(-1, 1)).half()
    t = gramian(PaddedTokens(f), f)
    torch.testing.assert_close(t, triangle(f.float()))


def test_closed_attention_leaves_the_first_class_token() -> None:
    pool, x = shaken(pool_of()), features(dim=DIM)
    with torch.no_grad():
        for block in pool.blocks:
            block.gamma1.zero_()
            block.gamma2.zero_()
    tokens = PaddedTokens(x)
    t = torch.cat([gramian(tokens, f) for f in pool.reduced(tokens).chunk(3, -1)], -1)
    z0 = batch_norm(pool.embedding_norm, pool.embedding(t.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(pool(x).flatten(1), z0)
    # as at the beginning of training, nearly so
    fresh = pool_of().double().eval()
    t = torch.cat([gramian(tokens, f) for f in fresh.reduced(tokens).chunk(3, -1)], -1)
    z0 = batch_norm(fresh.embedding_norm, fresh.embedding(t.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(fresh(x).flatten(1), z0, atol=1e-3, rtol=0)


def test_heads_classify_each_class_token_and_answer_with_the_mean() -> None:
    model, x = shaken(heads_of()), features(dim=DIM)
    z, logits = model.pool(x), model.logits(x)
    torch.testing.assert_close(logits, torch.stack([model.classifiers[m](z[:, m]) for m in range(3)], 1))
    torch.testing.assert_close(model(x), logits.mean(1))
    single = shaken(heads_of(branches=1))
    assert single.logits(x).shape == (2, 1, 5)
    torch.testing.assert_close(single(x), single.logits(x)[:, 0])


def test_any_subset_of_the_heads_answers_and_shows_where_it_looked() -> None:
    model, x = shaken(heads_of()), features(tokens=12, dim=DIM)
    logits = model.logits(x)
    torch.testing.assert_close(model(x, branches=[2]), logits[:, 2])
    torch.testing.assert_close(model(x, branches=(0, 2)), (logits[:, 0] + logits[:, 2]) / 2)
    weights = model.pool.attend(x).weights
    looks = model.looks(x)
    torch.testing.assert_close(looks[:, 1], weights[:, 4:8].mean(1))
    on_map = model.looks(x.transpose(1, 2).unflatten(2, (3, 4)))
    torch.testing.assert_close(on_map, looks.unflatten(2, (3, 4)))
    for wrong in ([], [3], [-1]):
        with pytest.raises(InputError, match="branches: expected numbers from 0 to 2"):
            model(x, branches=wrong)


def votes(*heads: list[int]) -> Tensor:
    return F.one_hot(torch.tensor(heads), 3).double().transpose(0, 1)


def test_strength_and_correlation_by_hand() -> None:
    y = torch.tensor([0, 0, 1, 2])
    found = strength_and_correlation(votes([0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 2, 2]), y)
    # the wrong class of most votes: none but 1 for the first two items, 2 for the third, 0 for the last
    raw = torch.tensor([[1.0, 1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]])
    margin = raw.mean(0)
    s, r = float(margin.mean()), float(margin.var(correction=0) / raw.std(1, correction=0).mean() ** 2)
    assert found.strength == pytest.approx(s)
    assert found.correlation == pytest.approx(r)
    assert found.bound == pytest.approx(r * (1 - s**2) / s**2)


def test_equal_heads_correlate_fully_and_gain_nothing() -> None:
    logits = torch.randn(50, 1, 4, dtype=torch.float64)
    y = torch.randint(4, (50,))
    same = strength_and_correlation(logits.expand(-1, 3, -1), y)
    assert same.correlation == pytest.approx(1)
    assert same.residual_correlation == pytest.approx(1)
    assert same.gain == 0
    alone = strength_and_correlation(logits, y)
    assert alone.correlation != alone.correlation
    assert alone.residual_correlation != alone.residual_correlation
    assert alone.strength == pytest.approx(same.strength)


def test_heads_that_err_apart_gain_together_within_the_bound() -> None:
    torch.manual_seed(0)
    y = torch.randint(4, (400,))
    logits = 2 * F.one_hot(y, 4).double().unsqueeze(1) + torch.randn(400, 5, 4, dtype=torch.float64)
    found = strength_and_correlation(logits, y)
    assert found.gain > 0.05
    assert found.correlation < 0.5
    vote = F.one_hot(logits.argmax(-1), 4).double().mean(1)
    error = float((vote.argmax(-1) != y).double().mean())
    assert error <= found.bound
    residual = (logits.softmax(-1) - F.one_hot(y, 4).unsqueeze(1)).transpose(0, 1).flatten(1)
    c = torch.corrcoef(residual)
    assert found.residual_correlation == pytest.approx(float((c.sum() - 5) / 20))
    with pytest.raises(InputError, match="logits"):
        strength_and_correlation(logits[..., :1], y)


@pytest.mark.parametrize("gram_layer", [False, True])
def test_what_a_mask_hides_is_not_seen(gram_layer: bool) -> None:
    model = shaken(heads_of(gram_layer=gram_layer))
    x = features(tokens=20, dim=DIM).transpose(1, 2).unflatten(2, (4, 5))
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    expected = model(x.masked_fill(~mask.unsqueeze(1), 0), mask)
    torch.testing.assert_close(model(x.masked_fill(~mask.unsqueeze(1), float("nan")), mask), expected)
    if not gram_layer:
        inside = [x[b][:, mask[b]].T for b in range(2)]
        torch.testing.assert_close(model(Bags.from_list(inside)), expected)


def test_training_statistics_are_those_of_real_tokens() -> None:
    x = features(batch=4, dim=DIM)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, 5:] = mask[2, 1:] = False
    padded, ragged = shaken(pool_of()).train(), shaken(pool_of()).train()
    torch.testing.assert_close(padded(x.masked_fill(~mask.unsqueeze(-1), 1e3), mask), ragged(Bags.from_padded(x, mask)))
    torch.testing.assert_close(padded.contraction_norm.running_var, ragged.contraction_norm.running_var)
    reference = torch.nn.BatchNorm1d(18).double().train()
    reference.load_state_dict(shaken(pool_of()).contraction_norm.state_dict())
    reference(shaken(pool_of()).contraction(x[mask]))
    torch.testing.assert_close(padded.contraction_norm.running_mean, reference.running_mean)
    torch.testing.assert_close(padded.contraction_norm.running_var, reference.running_var)


def test_gram_layer_is_a_convnext_block() -> None:
    model = shaken(pool_of(gram_layer=True))
    x = features(tokens=20, dim=DIM).transpose(1, 2).unflatten(2, (4, 5))
    block, f = model.gram_layers[1], features(tokens=20, dim=6, seed=3)
    on_map = f.transpose(1, 2).unflatten(2, (4, 5))
    y = F.conv2d(on_map, block.conv.weight, block.conv.bias, padding=3, groups=6).movedim(1, -1)
    y = F.layer_norm(y, (6,), block.norm.weight, block.norm.bias, 1e-6)
    y = on_map.movedim(1, -1) + block.gamma * block.fc2(F.gelu(block.fc1(y)))
    torch.testing.assert_close(block(f, (4, 5)), y.flatten(1, 2))
    plain = shaken(pool_of())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("gram_layers")})
    assert not torch.allclose(model(x), plain(x))
    with torch.no_grad():
        for layer in model.gram_layers:
            layer.gamma.zero_()
    torch.testing.assert_close(model(x), plain(x))


def test_heads_with_gram_layer_differentiate_compile_export_and_run_in_half_precision() -> None:
    model = shaken(heads_of(gram_layer=True, branches=2))
    x = features(batch=3, tokens=12, dim=DIM).transpose(1, 2).unflatten(2, (3, 4))
    assert torch.autograd.gradcheck(model, x.clone().requires_grad_(), fast_mode=True)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.1 * float(expected.detach().abs().max()), rtol=0)
    model.train()
    DecorrelationLoss()(model.logits(x), torch.tensor([0, 1, 4])).backward()
    inert = ("contraction.bias", "embedding.bias")
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert (float(p.grad.abs().max()) > 1e-12) != name.endswith(inert), name


def test_divergence_and_loss_are_their_formulas() -> None:
    logits = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 6, 2])
    q = logits.mean(1).softmax(-1).detach()
    p = logits.softmax(-1)
    by_branch = torch.stack([(q * (q.log() - p[:, m].log())).sum(-1).mean() for m in range(3)])
    torch.testing.assert_close(divergence_from_mean(logits, "batchmean"), by_branch)
    torch.testing.assert_close(divergence_from_mean(logits), by_branch / 7)
    own = sum(F.cross_entropy(logits[:, m], y) for m in range(3))
    loss = DecorrelationLoss()(logits, y)
    torch.testing.assert_close(loss, own - 0.8 * by_branch.sum() / 7)
    wanted = torch.autograd.grad(own - 0.8 * by_branch.sum() / 7, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
    bce = DecorrelationLoss(criterion=F.binary_cross_entropy_with_logits, weight=0.0)
    targets = F.one_hot(y, 7).double()
    torch.testing.assert_close(
        bce(logits, targets), sum(F.binary_cross_entropy_with_logits(logits[:, m], targets) for m in range(3))
    )


def test_one_branch_has_no_divergence_and_no_weight_leaves_branches_alone() -> None:
    assert divergence_from_mean(10 * torch.randn(4, 1, 7)).tolist() == [0.0]
    logits = torch.randn(4, 3, 7, requires_grad=True)
    y = torch.tensor([0, 3, 6, 2])
    others = logits.detach().clone()
    others[:, 1:] = torch.randn(4, 2, 7)
    others.requires_grad_()

    def gradient_of_first(logits: Tensor, weight: float) -> Tensor:
        return torch.autograd.grad(DecorrelationLoss(weight)(logits, y), logits)[0][:, 0]

    torch.testing.assert_close(gradient_of_first(logits, 0.0), gradient_of_first(others, 0.0))
    assert not torch.allclose(gradient_of_first(logits, -0.8), gradient_of_first(others, -0.8), atol=1e-4)


def test_a_negative_weight_pushes_branches_apart() -> None:
    def divergence_after(weight: float) -> float:
        torch.manual_seed(0)
        logits = (0.1 * torch.randn(4, 3, 7)).requires_grad_()
        optimiser = torch.optim.SGD([logits], lr=0.5)
        for _ in range(20):
            optimiser.zero_grad()
            DecorrelationLoss(weight)(logits, torch.tensor([0, 3, 6, 2])).backward()
            optimiser.step()
        return float(divergence_from_mean(logits.detach(), "batchmean").sum())

    assert divergence_after(-0.8) > divergence_after(0.0)


def test_covariance_alone_is_enough() -> None:
    """Two classes with equal means, told apart only by which channels vary together."""
    torch.manual_seed(0)
    mixes = torch.stack(
        [torch.linalg.qr(torch.randn(8, 8)).Q @ torch.diag(torch.linspace(0.2, 2, 8)) for _ in range(2)]
    )

    def sample(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (count,))
        x = torch.randn(count, 16, 8) @ mixes[y].transpose(1, 2)
        return x - x.mean(1, keepdim=True), y

    x, y = sample(256)
    model = GramianHeads(8, 2, branches=2, gram_dim=8, dim_embed=8, heads=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        DecorrelationLoss(-0.8 * 2 / 1000)(model.logits(x), y).backward()
        optimiser.step()
    x, y = sample(500)
    assert (x.mean(1).abs() < 1e-5).all()
    assert float((model.eval()(x).argmax(-1) == y).double().mean()) > 0.9


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pool_of(branches=0), "branches"),
        (lambda: pool_of(gram_dim=0), "gram_dim"),
        (lambda: pool_of(groups=5), "groups"),
        (lambda: pool_of(groups=3), "groups"),
        (lambda: pool_of(heads=3), "heads"),
        (lambda: pool_of(gram_layer=True)(torch.ones(2, 9, DIM)), "x"),
        (lambda: pool_of().train()(torch.ones(1, 9, DIM)), "x"),
        (lambda: divergence_from_mean(torch.ones(2, 3)), "logits"),
        (lambda: divergence_from_mean(torch.ones(2, 3, 4), "sum"), "reduction"),
    ],
)
def test_wrong_arguments_are_named(call: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: "):
        call()
