from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError, PaddedTokens
from cenote.explain import (
    MovedTokens,
    Texts,
    adversarial_loss,
    adversarial_objective,
    at_perturbation,
    attacked_accuracy,
    attention_gradient_correlation,
    iat_code_perturbation,
    iat_perturbation,
    pronoun_task,
    random_perturbation,
    train_adversarial,
    word_iat_perturbation,
    word_perturbation,
)
from cenote.explain.attention_adversarial_training.objective import area_under_roc, balanced
from cenote.explain.attention_classifiers import AttentionClassifier, attention_classifier
from cenote.pool import ABMIL, PMA, AttSets, EfficientProbing, MeanPool, SimPool
from tests.explain.texts import PADDED

MASK = PADDED["attention_mask"].bool()
LABELS = torch.tensor([0, 1, 1])
KINDS = ["at", "iat", "iat per token", "random", "iat_code", "word at", "word iat"]


def net(classes: int = 1, **settings) -> AttentionClassifier:  # type: ignore[no-untyped-def]
    found = attention_classifier(20, classes, dim=8, scorer="additive", random_state=0, **settings).double()
    with torch.no_grad():
        for p in found.parameters():
            p.mul_(2.0)
    return found


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_norm_is_eps_over_the_real_tokens() -> None:
    g = numbers(3, 7)
    for r in (at_perturbation(g, 2.5, MASK), random_perturbation(g, 2.5, MASK), iat_code_perturbation(g, 2.5, MASK)):
        assert torch.allclose(r.norm(dim=1), torch.full((3,), 2.5).double(), atol=1e-6)
        assert not r[~MASK].any()
        assert not r.requires_grad
    words = word_perturbation(numbers(3, 7, 4), 2.5, MASK)
    assert torch.allclose(words.flatten(1).norm(dim=1), torch.full((3,), 2.5).double())
    assert not words[~MASK].any()


def test_iat_as_it_is_written_is_at() -> None:
    s, g = numbers(3, 7), numbers(3, 7, seed=1)
    assert torch.allclose(iat_perturbation(s, g, 2.0, MASK), at_perturbation(g, 2.0, MASK), atol=1e-6)


def test_iat_normalised_per_token_is_the_sign() -> None:
    s, g = numbers(3, 7), numbers(3, 7, seed=1)
    expected = (2.0 * g.sign()).masked_fill(~MASK, 0.0)
    assert torch.allclose(iat_perturbation(s, g, 2.0, MASK, "token"), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1), (2, 4)])
def test_one_token_or_equal_scores_are_not_moved(shape: tuple[int, int]) -> None:
    s = torch.ones(shape)
    for norm in ("matrix", "token"):
        r = iat_perturbation(s, torch.zeros(shape), 1.0, norm=norm)  # type: ignore[arg-type]
        assert torch.equal(r, torch.zeros(shape))
    assert torch.equal(at_perturbation(torch.zeros(shape)), torch.zeros(shape))


def test_of_one_token_the_gradient_is_zero() -> None:
    found = adversarial_loss(net(), {"input_ids": torch.tensor([[3]])}, torch.tensor([1]))
    assert not found.delta.any()
    assert float(found.perturbed) == float(found.clean)


@pytest.mark.parametrize("kind", KINDS)
def test_without_eps_the_adversarial_loss_is_the_clean_one(kind) -> None:  # type: ignore[no-untyped-def]
    found = adversarial_loss(net(), PADDED, LABELS, kind, eps=0.0)
    assert float(found.perturbed) == float(found.clean)
    assert float(found.total) == 2 * float(found.clean)


@pytest.mark.parametrize("kind", KINDS)
def test_without_lam_gradients_are_those_of_the_task(kind) -> None:  # type: ignore[no-untyped-def]
    plain, other = net(), net()
    nn.functional.binary_cross_entropy_with_logits(plain(**PADDED).logits[:, 0], LABELS.double()).backward()
    adversarial_loss(other, PADDED, LABELS, kind, lam=0.0).total.backward()
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_for_small_eps_the_loss_grows_by_the_norm_of_the_gradient() -> None:
    model = net()
    one = {"input_ids": PADDED["input_ids"][:1]}
    h, mask = model.states(**one)
    scores = model.scores(h)
    loss = nn.functional.binary_cross_entropy_with_logits(
        model.from_scores(h, scores, mask).logits[:, 0], LABELS[:1].double()
    )
    (g,) = torch.autograd.grad(loss, scores)
    assert float(g.sum().abs()) < 1e-12
    off = []
    for eps in (1e-2, 1e-3):
        found = adversarial_loss(model, one, LABELS[:1], eps=eps)
        assert float(found.delta.norm()) == pytest.approx(eps)
        off.append(abs(float(found.perturbed - found.clean) / (eps * float(g.norm())) - 1))
    assert off[1] < off[0] / 5


def test_padding_has_no_attention_and_what_is_added_to_it_does_not_matter() -> None:
    model = net()
    delta = numbers(3, 7)
    found = model(**PADDED, delta=delta)
    assert not found.weights[~MASK].any()
    assert torch.equal(found.logits, model(**PADDED, delta=delta.masked_fill(~MASK, 9.0)).logits)
    assert torch.allclose(found.logits, model(**PADDED, delta=delta + 3).logits)


def test_padded_scores_that_enter_the_softmax_as_zero_and_leave_it_are_the_same_attention() -> None:
    model = net()
    h, mask = model.states(**PADDED)
    s = model.scores(h)
    as_published = (s * mask).softmax(1) * mask
    as_published = as_published / (as_published.sum(1, keepdim=True) + 1e-13)
    assert torch.allclose(model.from_scores(h, s, mask).weights, as_published, atol=1e-9)


def test_no_gradient_flows_through_the_perturbation() -> None:
    model = net()
    found = adversarial_loss(model, PADDED, LABELS)
    h, mask = model.states(**PADDED)
    moved = model.from_scores(h, model.scores(h) + found.delta, mask)
    again = found.clean + nn.functional.binary_cross_entropy_with_logits(moved.logits[:, 0], LABELS.double())
    parameters = [p for p in model.parameters() if p is not model.embedding.weight]
    for p, q in zip(
        torch.autograd.grad(found.total, parameters, retain_graph=True),
        torch.autograd.grad(again, parameters),
        strict=True,
    ):
        assert torch.allclose(p, q)


def test_the_adversary_raises_the_loss_and_the_published_iat_lowers_it() -> None:
    losses = {k: adversarial_loss(net(), PADDED, LABELS, k, eps=0.5) for k in KINDS}  # type: ignore[arg-type]
    clean = float(losses["at"].clean)
    for kind in ("at", "iat", "iat per token", "word at", "word iat"):
        assert float(losses[kind].perturbed) > clean
    assert float(losses["iat_code"].perturbed) < clean


def test_words_are_moved_towards_other_words() -> None:
    x, g, words = numbers(1, 2, 3), numbers(1, 2, 3, seed=1), numbers(5, 3, seed=2)
    r = word_iat_perturbation(x, g, words, eps=2.0)
    alpha = torch.zeros(2, 5, dtype=torch.float64)
    units = torch.zeros(2, 5, 3, dtype=torch.float64)
    for t in range(2):
        for k in range(5):
            units[t, k] = (words[k] - x[0, t]) / (words[k] - x[0, t]).norm()
            alpha[t, k] = g[0, t] @ units[t, k]
    alpha = 2.0 * alpha / alpha.norm()
    assert torch.allclose(r[0], (alpha[..., None] * units).sum(1))


@pytest.mark.parametrize("build", [ABMIL, SimPool, PMA, EfficientProbing, AttSets])
def test_pools_of_this_library_take_a_delta_and_are_left_as_they_were(build) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    pool = build(8).eval()
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    before = pool(x, MASK)
    still = pool.pool(MovedTokens(x, MASK, torch.zeros(3, 7))).output
    assert torch.allclose(still, before, atol=1e-6)
    found = adversarial_objective(
        lambda d: pool.pool(MovedTokens(x, MASK, d)).output.square().flatten(1).sum(1).mean(), x[..., 0], mask=MASK
    )
    assert float(found.perturbed) > float(found.clean)
    assert not found.delta[~MASK].any()
    assert torch.equal(pool(x, MASK), before)


def test_a_pool_without_scores_is_named() -> None:
    x = torch.randn(3, 7, 8)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        adversarial_objective(lambda d: MeanPool(8).pool(PaddedTokens(x)).output.requires_grad_().sum(), x[..., 0])


@pytest.mark.parametrize("kind", ["vanilla", *KINDS])
def test_every_kind_trains_with_dot_and_conditioned_scorers(kind) -> None:  # type: ignore[no-untyped-def]
    other = {"condition_ids": PADDED["input_ids"].flip(1)}
    for scorer in ("dot", "additive"):
        model = attention_classifier(20, 3, dim=8, hidden=4, scorer=scorer, conditioned=True, random_state=0)  # type: ignore[arg-type]
        loss = adversarial_loss(model, {**PADDED, **other}, torch.tensor([0, 1, 2]), kind).total
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_training_keeps_the_best_epoch_and_spares_the_scorer_from_decay() -> None:
    generator = torch.Generator().manual_seed(0)
    train, dev = pronoun_task(60, generator, shortest=5), pronoun_task(30, generator, shortest=5)
    model = attention_classifier(207, 1, dim=8, scorer="additive", random_state=0)
    found = train_adversarial(model, train, dev, epochs=4, lr=2e-2)
    assert found.scores[found.best] == max(found.scores)
    assert found.scores[found.best] == pytest.approx(area_under_roc(model, dev))
    assert found.losses[-1] < found.losses[0]
    big, small = (
        attention_classifier(207, 1, dim=8, random_state=0),
        attention_classifier(207, 1, dim=8, random_state=0),
    )
    train_adversarial(big, train, kind="vanilla", epochs=1, batch=60, decay=1e6)
    train_adversarial(small, train, kind="vanilla", epochs=1, batch=60, decay=0.0)
    assert torch.equal(big.scorer.weight.weight, small.scorer.weight.weight)  # type: ignore[union-attr]
    assert not torch.equal(big.output.weight, small.output.weight)


def test_words_are_normalised_before_training_on_them() -> None:
    train = pronoun_task(8, torch.Generator().manual_seed(0))
    model = attention_classifier(207, 1, dim=8, random_state=0)
    train_adversarial(model, train, kind="word at", epochs=1, lr=1e-9)
    assert torch.allclose(model.embedding.weight.std(0), torch.ones(8), atol=1e-4)


class Tenfold(AttentionClassifier):
    """The same classifier, whose scores count in tenths."""

    def scores(self, *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def, override]
        return 10 * super().scores(*args, **kwargs)

    def from_scores(self, h, scores, mask, blocked=None):  # type: ignore[no-untyped-def, override]
        return super().from_scores(h, scores / 10, mask, blocked)


def test_larger_scores_look_robust_until_they_are_measured_in_their_own_deviation() -> None:
    texts = pronoun_task(300, torch.Generator().manual_seed(0), shortest=6)
    model = attention_classifier(207, 1, dim=8, scorer="dot", random_state=0)
    train_adversarial(model, texts, kind="vanilla", epochs=6, lr=2e-2)
    larger = Tenfold(model.embedding, model.output, model.scorer)
    eps = (0.0, 0.5, 1.0, 2.0)
    first, second = (attacked_accuracy(m, texts, eps) for m in (model, larger))
    assert first[0] == second[0]
    assert first[-1] < second[-1]
    own, again = (attacked_accuracy(m, texts, eps, in_deviations=True) for m in (model, larger))
    assert own[-1] < own[0]
    assert own == pytest.approx(again, abs=0.01)
    assert attacked_accuracy(model, texts, eps, steps=3)[-1] <= first[0]


def test_correlation_is_that_of_scipy_and_nothing_is_said_of_one_token() -> None:
    import scipy.stats

    model = net()
    texts = Texts(PADDED["input_ids"], MASK, LABELS, MASK)
    attention = model(**PADDED).weights.detach()
    from cenote.explain.input_gradients import input_gradients

    gradient = input_gradients(model, PADDED, LABELS, form="norm")
    for by, of in (("pearson", scipy.stats.pearsonr), ("kendall", scipy.stats.kendalltau)):
        found = attention_gradient_correlation(model, texts, by)  # type: ignore[arg-type]
        expected = [of(a[m].numpy(), g[m].numpy()).statistic for a, g, m in zip(attention, gradient, MASK, strict=True)]
        assert torch.allclose(found, torch.tensor(expected))
    one = Texts(torch.tensor([[3]]), torch.ones(1, 1).bool(), torch.tensor([1]), torch.ones(1, 1).bool())
    assert bool(attention_gradient_correlation(model, one).isnan().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: at_perturbation(torch.zeros(1, 2), -1.0), "eps: expected at least 0"),
        (lambda: iat_perturbation(torch.zeros(1, 2), torch.zeros(1, 3)), r"gradient: expected \[1, 2\]"),
        (lambda: iat_perturbation(torch.zeros(1, 2), torch.zeros(1, 2), norm="row"), "norm: expected"),
        (lambda: adversarial_loss(net(), PADDED, LABELS, "fgsm"), "kind: expected"),
        (lambda: balanced(torch.tensor([0, 2])), "labels: class 1 has no item"),
        (lambda: attention_gradient_correlation(net(), Texts(PADDED["input_ids"], MASK, LABELS, MASK), "r"), "by: exp"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
