"""Pooling frozen tokens block by block equals the plain way, in values, gradients and second gradients."""

import pytest
import torch
from torch import nn

from cenote.core import PaddedTokens, blocked, cross_attention

SETS, TOKENS, DIM, HEADS, QUERIES = 5, 64, 512, 2, 2
assert TOKENS * DIM >= blocked.LARGE_SET


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # two sets of float64 a block, and one in the last
    monkeypatch.setattr(blocked, "CACHED_BYTES", 2 * TOKENS * DIM * 8)


def case(per_set, masked, norms):
    torch.manual_seed(0)
    x = torch.randn(SETS, TOKENS, DIM, dtype=torch.float64)
    mask = torch.rand(SETS, TOKENS) > 0.3 if masked else None
    if mask is not None:
        mask[1] = False
    query = torch.randn(*([SETS] if per_set else []), QUERIES, 8, dtype=torch.float64, requires_grad=True)
    key, value = nn.Linear(DIM, 8, dtype=torch.float64), nn.Linear(DIM, 6, dtype=torch.float64)
    made = [nn.LayerNorm(DIM, dtype=torch.float64) for _ in range(2)] if norms else [None, None]
    for norm in made:
        if norm is not None:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return x, mask, query, {"key": key, "value": value, "key_norm": made[0], "value_norm": made[1], "heads": HEADS}


def run(x, mask, query, settings, blocks, monkeypatch, **more):
    with monkeypatch.context() as patched:
        if not blocks:
            patched.setattr(blocked, "takes", lambda tokens: False)
        return cross_attention(PaddedTokens(x, mask), query, plan="absorbed", **settings, **more)


@pytest.mark.parametrize("per_set", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_values_and_gradients(per_set, masked, norms, monkeypatch):
    x, mask, query, settings = case(per_set, masked, norms)
    assert blocked.takes(PaddedTokens(x, mask))
    learned = [query, *(p for m in settings.values() if isinstance(m, nn.Module) for p in m.parameters())]
    found, wanted = (run(x, mask, query, settings, blocks, monkeypatch) for blocks in (True, False))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    ups = [torch.randn_like(t) for t in wanted]
    grads = [
        torch.autograd.grad(tuple(latents), learned, ups, allow_unused=True, materialize_grads=True)
        for latents in (found, wanted)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("seen", ["output", "weights"])
def test_gradient_of_one_result_alone(seen, monkeypatch):
    x, mask, query, settings = case(False, True, True)
    grads = []
    for blocks in (True, False):
        result = getattr(run(x, mask, query, settings, blocks, monkeypatch), seen)
        grads.append(
            torch.autograd.grad((result * torch.linspace(0, 1, result.numel()).view_as(result)).sum(), query)[0]
        )
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_set", [False, True])
def test_second_gradients(per_set, monkeypatch):
    x, mask, query, settings = case(per_set, True, True)
    seconds = []
    for blocks in (True, False):
        output = run(x, mask, query, settings, blocks, monkeypatch).output
        (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), query)[0])
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_under_vmap(shared, monkeypatch):
    x, mask, query, settings = case(False, True, True)
    queries = torch.stack([query.detach(), 2 * query.detach(), -query.detach()]).requires_grad_()
    sets = x if shared else torch.stack([x, x.flip(1), x * 0.5])
    results = []
    for blocks in (True, False):
        latents = torch.func.vmap(
            lambda q, t, blocks=blocks: run(t, mask, q, settings, blocks, monkeypatch),
            in_dims=(0, None if shared else 0),
        )(queries, sets)
        grad = torch.autograd.grad(latents.output.square().sum(), queries)[0]
        results.append((latents.output, latents.weights, grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-9)


def test_strided_tokens_are_not_copied_first(monkeypatch):
    x, _, query, settings = case(False, False, False)
    longer = torch.cat([torch.randn(SETS, 1, DIM, dtype=torch.float64), x], 1)[:, 1:]
    grads = []
    for tokens in (longer, x):
        latents = run(tokens, None, query, settings, True, monkeypatch)
        grads.append(torch.autograd.grad(latents.output.square().sum(), query)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_tokens_that_learn_take_the_plain_way():
    x, _, query, settings = case(False, False, False)
    x.requires_grad_()
    assert not blocked.takes(PaddedTokens(x))
    cross_attention(PaddedTokens(x), query, **settings).output.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert blocked.takes(PaddedTokens(x))


@pytest.mark.parametrize("per_set", [False, True])
def test_without_gradients_vectors_are_mapped_piece_by_piece(per_set, monkeypatch):
    x, mask, query, settings = case(per_set, True, True)
    monkeypatch.setattr(blocked, "PIECE_BYTES", 2 * HEADS * QUERIES * DIM * 8)
    with torch.no_grad():
        assert len(blocked.pieces(PaddedTokens(x), HEADS * QUERIES)) == 3
        found, wanted = (run(x, mask, query, settings, blocks, monkeypatch) for blocks in (True, False))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.fixture
def flash_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        blocked, "FLASH", lambda *a, flash=blocked.FLASH, **k: calls.append(a[1].shape) or flash(*a, **k)
    )
    return calls


@pytest.mark.parametrize("per_set", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_flash_where_nobody_wants_weights(per_set, masked, parts, monkeypatch, flash_calls):
    x, mask, query, settings = case(per_set, masked, False)
    x = torch.cat([x, x.flip(-1)[:, :1]], 1)
    if mask is not None:
        mask = torch.cat([mask, mask[:, :1]], 1)
        # no token in the first of three parts, nor in what is left after them
        mask[2, :30] = mask[2, -1] = False
        mask[2, 30:40] = True
    monkeypatch.setattr(blocked, "LEAST_PART", TOKENS // parts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: SETS * parts)
    with torch.no_grad():
        found = run(x, mask, query, settings, True, monkeypatch, need_weights=False)
        wanted = run(x, mask, query, settings, False, monkeypatch)
    torch.testing.assert_close(found.output, wanted.output, rtol=1e-10, atol=1e-10)
    assert found.weights.shape[-1] == 0
    # 65 tokens are 3 parts of 21 and 2 tokens
    assert [tuple(shape[:3]) for shape in flash_calls] == (
        [(SETS, 1, TOKENS + 1)] if parts == 1 else [(SETS, 3, 21), (SETS, 1, 2)]
    )


def test_flash_is_left_where_weights_gradients_or_norms_need_more(monkeypatch, flash_calls):
    x, mask, query, settings = case(False, True, False)
    *_, with_norms = case(False, True, True)
    run(x, mask, query, settings, True, monkeypatch, need_weights=False).output.sum().backward()
    with torch.no_grad():
        run(x, mask, query, settings, True, monkeypatch)
        run(x, mask, query, with_norms, True, monkeypatch, need_weights=False)
        run(x.mT.contiguous().mT, None, query, settings, True, monkeypatch, need_weights=False)
    assert not flash_calls


def test_flash_is_left_for_many_queries_over_sets_that_fit_the_cache(monkeypatch, flash_calls):
    x, mask, query, settings = case(False, True, False)
    monkeypatch.setattr(blocked, "FLASH_QUERIES", HEADS * QUERIES - 1)
    with torch.no_grad():
        wanted = run(x, mask, query, settings, False, monkeypatch)
        found = run(x, mask, query, settings, True, monkeypatch, need_weights=False)
        assert not flash_calls
        monkeypatch.setattr(blocked, "CACHED_BYTES", x[0].numel() * x.element_size() - 1)
        too_large = run(x, mask, query, settings, True, monkeypatch, need_weights=False)
    assert flash_calls
    torch.testing.assert_close(found.output, wanted.output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(too_large.output, wanted.output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [True, False])
def test_flash_under_vmap(shared, monkeypatch, flash_calls):
    x, mask, query, settings = case(False, True, False)
    queries = torch.stack([query.detach(), 2 * query.detach(), -query.detach()])
    sets = x if shared else torch.stack([x, x.flip(1), x * 0.5])
    with torch.no_grad():
        found, wanted = (
            torch.func.vmap(
                lambda q, t, blocks=blocks: run(t, mask, q, settings, blocks, monkeypatch, need_weights=False).output,
                in_dims=(0, None if shared else 0),
            )(queries, sets)
            for blocks in (True, False)
        )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert len(flash_calls) == 1


def test_no_sets():
    _, _, query, settings = case(False, False, True)
    none = PaddedTokens(torch.zeros(0, TOKENS, DIM, dtype=torch.float64))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            latents = cross_attention(none, query, plan="absorbed", **settings)
        assert latents.output.shape == (0, QUERIES, 6)
        assert latents.weights.shape == (0, TOKENS, HEADS * QUERIES)
