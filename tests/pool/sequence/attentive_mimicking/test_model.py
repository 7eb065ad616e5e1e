from __future__ import annotations

import pytest
import torch
from tests.pools import features, shaken
from torch import Tensor

from cenote.core import InputError
from cenote.pool import AgreementPool, AttentiveMimicking

N = 16


def made(**settings: object) -> AttentiveMimicking:
    return shaken(AttentiveMimicking(N, ngrams=30, **settings))  # type: ignore[arg-type]


def inputs(batch: int = 3, contexts: int = 4, words: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    ngrams = torch.randint(30, (batch, 6), generator=g)
    mask = torch.rand(batch, contexts, words, generator=g) > 0.3
    mask[:, 0, 0] = True
    x = torch.randn(batch, contexts, words, N, generator=g, dtype=torch.float64)
    return ngrams, x, torch.arange(6) < torch.tensor([[6], [4], [1]])[:batch], mask


def test_weights_are_the_sums_of_products() -> None:
    pool, x = shaken(AgreementPool(N, safe=False)), features()
    p = x @ pool.map.weight.T
    s = (p @ p.transpose(1, 2) / N**0.5).sum(-1)
    torch.testing.assert_close(pool.attend(x).weights[:, 0], s / s.sum(1, keepdim=True))


def test_one_context_gets_everything_and_equal_ones_the_same() -> None:
    pool, x = shaken(AgreementPool(N)), features()
    torch.testing.assert_close(pool(x[:, :1]), x[:, 0])
    same = x[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(pool.attend(same).weights, torch.full((x.shape[0], 1, 5), 0.2, dtype=x.dtype))


def test_scale_of_the_map_does_not_matter() -> None:
    pool, x = shaken(AgreementPool(N)), features()
    before = pool.attend(x).weights
    with torch.no_grad():
        pool.map.weight.mul_(7)
    torch.testing.assert_close(pool.attend(x).weights, before)


def test_safe_changes_nothing_where_tokens_agree() -> None:
    safe, x = shaken(AgreementPool(N)), features().abs()
    plain = AgreementPool(N, safe=False).double()
    plain.load_state_dict(safe.state_dict())
    torch.testing.assert_close(safe(x), plain(x), atol=1e-7, rtol=1e-7)


def test_tokens_that_cancel() -> None:
    """Theirs explodes or gives nothing; ours stays bounded and sums to 1."""
    pool = AgreementPool(2).double()
    torch.nn.init.eye_(pool.map.weight)
    x = torch.tensor([[[1.0, 0.0], [-1.0, 1e-6], [0.0, 1e-6]]], dtype=torch.float64)
    weights = pool.attend(x).weights
    assert weights.abs().max() < 10
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, dtype=torch.float64))
    torch.nn.init.zeros_(pool.map.weight)
    torch.testing.assert_close(pool(x), x.mean(1))
    parity = AgreementPool(2, safe=False).double()
    torch.nn.init.zeros_(parity.map.weight)
    assert parity(x).eq(0).all()


def test_equation_of_the_model() -> None:
    model = made()
    ngrams, x, ngram_mask, mask = inputs()
    got = model.attend(ngrams, x, ngram_mask, mask)
    for b in range(3):
        f = model.ngrams.weight[ngrams[b][ngram_mask[b]]].mean(0)
        real = [i for i in range(4) if mask[b, i].any()]
        c = torch.stack([x[b, i][mask[b, i]].mean(0) for i in real])
        v, a = model.agreement.attend(c.unsqueeze(0))
        gate = torch.sigmoid(model.gate(torch.cat([f, v[0]])))
        torch.testing.assert_close(got.embedding[b], gate * f + (1 - gate) * model.to_out(v[0]))
        torch.testing.assert_close(got.weights[b, real], a[0, 0])


def test_without_attention_long_contexts_weigh_more() -> None:
    model = made(combinator="context", attentive=False)
    ngrams, x, _, mask = inputs()
    v = torch.stack([x[b][mask[b]].mean(0) for b in range(3)])
    torch.testing.assert_close(model(ngrams, x, word_mask=mask), model.to_out(v))


def test_order_and_padding() -> None:
    model = made()
    ngrams, x, ngram_mask, mask = inputs()
    whole = model.attend(ngrams, x, ngram_mask, mask)
    order = torch.tensor([2, 0, 3, 1])
    mixed = model.attend(ngrams, x[:, order], ngram_mask, mask[:, order])
    torch.testing.assert_close(mixed.weights, whole.weights[:, order])
    torch.testing.assert_close(mixed.embedding, whole.embedding)
    wide = torch.full((3, 6, 7, N), torch.nan, dtype=torch.float64)
    wide[:, :4, :5] = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    wide_mask = torch.zeros(3, 6, 7, dtype=torch.bool)
    wide_mask[:, :4, :5] = mask
    more = torch.cat([ngrams.masked_fill(~ngram_mask, 10**6), torch.full((3, 2), -1)], 1)
    got = model(more, wide, torch.cat([ngram_mask, torch.zeros(3, 2, dtype=torch.bool)], 1), wide_mask)
    torch.testing.assert_close(got, whole.embedding)


def test_gate_at_its_ends() -> None:
    ngrams, x, ngram_mask, mask = inputs()
    model = made()
    for bias, part in ((1e4, "form"), (-1e4, "context")):
        with torch.no_grad():
            model.gate.bias.fill_(bias)
        got = model.attend(ngrams, x, ngram_mask, mask)
        torch.testing.assert_close(got.embedding, got.form if part == "form" else model.to_out(got.context))


def test_what_is_missing_takes_no_part() -> None:
    ngrams, x, ngram_mask, mask = inputs()
    none, no_ngrams = torch.zeros_like(mask), torch.zeros_like(ngram_mask)
    for combinator in ("gated", "single"):
        model = made(combinator=combinator)
        bare = model.attend(ngrams, x, ngram_mask, none)
        torch.testing.assert_close(bare.embedding, bare.form)
        bare = model.attend(ngrams, x, no_ngrams, mask)
        torch.testing.assert_close(bare.embedding, model.to_out(bare.context))
    assert made(combinator="context")(ngrams, x, ngram_mask, none).eq(0).all()
    assert made(combinator="form").attend(ngrams, x, ngram_mask, mask).weights is None


def test_every_parameter_learns_and_gradients_are_finite() -> None:
    for combinator in ("gated", "single", "form", "context"):
        model = made(combinator=combinator, distances=True)
        ngrams, x, ngram_mask, mask = inputs()
        mask[1] = False
        distances = torch.randint(-30, 30, mask.shape)
        model(ngrams, x, ngram_mask, mask, distances).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, (combinator, name)
            assert p.grad.isfinite().all(), (combinator, name)
            assert p.grad.abs().max() > 0, (combinator, name)


def test_distances() -> None:
    model = made(distances=True)
    ngrams, x, ngram_mask, mask = inputs()
    torch.nn.init.ones_(model.distances.weight)
    far = torch.full(mask.shape, -40)
    plain = model(ngrams, x, ngram_mask, mask)
    torch.testing.assert_close(model(ngrams, x, ngram_mask, mask, far), plain)
    with torch.no_grad():
        model.distances.weight[0] = 2.0
    torch.testing.assert_close(model(ngrams, x, ngram_mask, mask, far), model(ngrams, 2 * x, ngram_mask, mask))
    torch.testing.assert_close(model(ngrams, x, ngram_mask, mask, -far), plain)


def test_wrong_input_is_named() -> None:
    model = made()
    ngrams, x, ngram_mask, mask = inputs()
    with pytest.raises(InputError, match="ngrams"):
        model(ngrams.float(), x)
    with pytest.raises(InputError, match="words"):
        model(ngrams, x[..., :3])
    with pytest.raises(InputError, match="word_mask"):
        model(ngrams, x, word_mask=mask.long())
    with pytest.raises(InputError, match="ngram_mask"):
        model(ngrams, x, ngram_mask[:, :2])
    with pytest.raises(InputError, match="distances"):
        model(ngrams, x, distances=mask[:, :1].long())
    with pytest.raises(InputError, match="combinator"):
        AttentiveMimicking(8, 3, combinator="both")  # type: ignore[arg-type]
