from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import (
    CachedScorer,
    alignment_loss,
    class_aware_prior,
    hybrid_prior,
    prior_loss,
    pronoun_task,
    self_attribution,
    train_with_priors,
)
from cenote.explain.attention_classifiers import attention_classifier
from cenote.explain.attribution_priors.priors import (
    as_prior,
    contrast,
    keep_masks,
    mask_weights,
    priors_of_scores,
    random_prior,
    ridge,
)
from cenote.explain.attribution_priors.training import (
    attribution_mass,
    encode_words,
    prior_of_tokens,
    prior_overlap,
)
from cenote.explain.input_gradients import InputGradients
from tests.explain.texts import PADDED
from tests.models.live import zoo

MASK = PADDED["attention_mask"].bool()
LABELS = torch.tensor([0, 1, 1])


def masks(n: int = 6, count: int = 40, seed: int = 0) -> Tensor:
    return keep_masks(n, count, torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [None, 0.25, 1.0])
def test_the_solution_is_that_of_solve_and_of_scikit_learn(width: float | None) -> None:
    z, y = masks(), numbers(40)
    w = mask_weights(z, width)
    found = ridge(z, y, w, mu=0.3)
    fitted = Ridge(alpha=0.3).fit(z.double().numpy(), y.numpy(), sample_weight=w.numpy())
    assert torch.allclose(found, torch.tensor(fitted.coef_), atol=1e-9)
    centred = z.double() - (w[:, None] * z).sum(0) / w.sum()
    a = centred.mT @ (w[:, None] * centred) + 0.3 * torch.eye(6)
    c = centred.mT @ (w * (y - (w * y).sum() / w.sum()))
    assert torch.allclose(found, torch.linalg.solve(a, c), atol=1e-9)


def test_batches_are_solved_as_single_texts_are() -> None:
    z, y = torch.stack([masks(), masks(seed=1)]), numbers(2, 40)
    together = ridge(z, y)
    assert torch.allclose(together, torch.stack([ridge(a, b) for a, b in zip(z, y, strict=True)]))


def test_an_additive_teacher_is_found_again() -> None:
    s = numbers(6)
    for count in (7, 30):
        z = masks(count=count)
        assert torch.allclose(ridge(z, 2.0 + z.double() @ s, mask_weights(z), mu=1e-10), s, atol=1e-6)


def test_a_large_mu_leaves_nothing() -> None:
    assert float(ridge(masks(), numbers(40), mu=1e12).abs().max()) < 1e-9


def test_masks_hold_the_whole_and_each_word_left_out() -> None:
    z = masks(4, 9)
    assert torch.equal(z[:5].sum(1), torch.tensor([4, 3, 3, 3, 3]))
    assert z.shape == (9, 4)
    assert torch.allclose(mask_weights(z, 1.0)[0], torch.ones((), dtype=torch.float64))


WEIGHTS = {"refund": (2.0, 0.0, 0.0), "order": (1.0, 1.0, 0.0), "track": (0.0, 2.0, 0.0), "hello": (0.0, 0.0, 0.0)}


def scorer(texts, instruction="", labels=("a", "b", "c")) -> Tensor:  # type: ignore[no-untyped-def]
    rows = [[sum(WEIGHTS[w][c] for w in text.split()) for c in range(3)] for text in texts]
    return torch.tensor(rows, dtype=torch.float64)


def test_a_word_that_two_classes_share_counts_for_one_alone_and_not_for_the_other() -> None:
    words = ["hello", "refund", "order"]
    aware = class_aware_prior(scorer, words, 0, against="nearest", mu=1e-6)
    blind = class_aware_prior(scorer, words, 0, against="none", mu=1e-6)
    assert torch.allclose(aware, torch.tensor([0.0, 1.0, 0.0]), atol=1e-4)
    assert torch.allclose(blind, torch.tensor([0.0, 2 / 3, 1 / 3]), atol=1e-4)


def test_a_constant_on_all_log_odds_changes_nothing() -> None:
    words = ["hello", "refund", "order", "track"]
    for against in ("all", "nearest"):
        one = class_aware_prior(scorer, words, 0, against=against)  # type: ignore[arg-type]
        two = class_aware_prior(lambda t: scorer(t) + 5.0, words, 0, against=against)  # type: ignore[arg-type]
        assert torch.allclose(one, two, atol=1e-6)


def test_one_word_has_all_and_the_same_word_counts_by_its_place() -> None:
    assert class_aware_prior(scorer, ["refund"], 0).tolist() == [1.0]
    twice = class_aware_prior(scorer, ["refund", "hello", "refund"], 0, mu=1e-6)
    assert torch.allclose(twice, torch.tensor([0.5, 0.0, 0.5]), atol=1e-4)
    one = torch.ones(1, 1)
    assert float(alignment_loss(one, one)) == 0


def test_without_evidence_words_of_content_share_alike() -> None:
    found = class_aware_prior(scorer, ["hello", "hello", "hello"], 0, content=[False, True, True])
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 0.5]))
    assert torch.allclose(as_prior(torch.tensor([-1.0, -2.0])), torch.tensor([0.5, 0.5]))


def test_long_texts_are_looked_at_in_pieces() -> None:
    asked: list[str] = []

    def counting(texts) -> Tensor:  # type: ignore[no-untyped-def]
        asked.extend(texts)
        return scorer(texts)

    words = ["hello"] * 70
    words[3] = words[66] = "refund"
    found = class_aware_prior(counting, words, 0, masks=150, mu=1e-4)
    assert found.topk(2).indices.sort().values.tolist() == [3, 66]
    assert float(found[[3, 66]].sum()) > 0.9
    assert min(len(t.split()) for t in asked[:150]) >= 6


def test_a_hybrid_of_one_is_itself_and_all_sum_to_one() -> None:
    p, q = random_prior(5, 0), random_prior(5, 1)
    for by in ("mean", "max", "product"):
        assert torch.allclose(hybrid_prior([p], by), p)  # type: ignore[arg-type]
        assert float(hybrid_prior([p, q], by).sum()) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert torch.allclose(hybrid_prior([p, q], "weighted", [1.0, 0.0]), p)
    assert torch.allclose(hybrid_prior([p, 3 * q]), (p + q) / 2)
    apart = hybrid_prior([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], "product")
    assert torch.allclose(apart, torch.tensor([0.5, 0.5]))


def test_integrated_gradients_are_those_of_captum() -> None:
    captum = pytest.importorskip("captum.attr")
    model = attention_classifier(20, 2, dim=6, hidden=3, random_state=0).eval()
    x = model.embedding(PADDED["input_ids"]).detach()
    real = PADDED["attention_mask"]
    method = captum.IntegratedGradients(lambda e, m: model(inputs_embeds=e, attention_mask=m).logits)
    expected = method.attribute(
        x, target=LABELS, additional_forward_args=(real,), n_steps=16, method="riemann_middle"
    ).sum(-1)
    found = InputGradients("integrated", steps=16).explain(model, PADDED, LABELS).scores
    assert torch.allclose(found, expected.float() * real, atol=1e-5)


def test_a_scorer_is_asked_once_for_each_text_and_remembers_on_disk(tmp_path: Path) -> None:
    first = CachedScorer(scorer, ["a", "b", "c"], "sort it", tmp_path)
    one = first(["refund order", "hello", "hello"])
    assert first.calls == 2
    again = CachedScorer(scorer, ["a", "b", "c"], "sort it", tmp_path)
    assert torch.equal(again(["hello", "refund order"]), one[[1, 0]])
    assert again.calls == 0
    other = CachedScorer(scorer, ["a", "b", "d"], "sort it", tmp_path)
    other(["hello"])
    assert other.calls == 1


def net() -> nn.Module:
    return attention_classifier(20, 2, dim=6, random_state=0).double()


@pytest.mark.parametrize("form", ["gradient", "attention", "integrated"])
def test_attributions_are_shares_and_special_tokens_are_out(form) -> None:  # type: ignore[no-untyped-def]
    content = MASK & (torch.arange(7) > 0)
    for model in (net(), zoo.text("BertForSequenceClassification")("sdpa").model):
        found = self_attribution(model, PADDED, LABELS, form, content)
        assert torch.allclose(found.sum(1), torch.ones(3).to(found))
        assert not found[~content].any()
        assert bool((found >= 0).all())


def test_the_gradient_of_an_attribution_is_right() -> None:
    model = net()
    x = model.embedding(PADDED["input_ids"][:1]).detach()
    prior = torch.full((1, 7), 1 / 7, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        given = {"embedding.weight": weight}
        return torch.func.functional_call(_Alignment(model, prior), {f"model.{k}": v for k, v in given.items()}, ())

    weight = model.embedding.weight.detach().clone().requires_grad_()
    assert x.shape == (1, 7, 6)
    assert torch.autograd.gradcheck(loss, (weight,))


class _Alignment(nn.Module):
    def __init__(self, model: nn.Module, prior: Tensor) -> None:
        super().__init__()
        self.model, self.prior = model, prior

    def forward(self) -> Tensor:
        one = {"input_ids": PADDED["input_ids"][:1]}
        return alignment_loss(self.prior, self_attribution(self.model, one, LABELS[:1]), "mse")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("distance", ["kl", "mse", "cosine"])
def test_second_order_gradients_of_a_transformer_are_finite(distance, attention: str) -> None:  # type: ignore[no-untyped-def]
    model = zoo.text("BertForSequenceClassification")(attention).model
    prior = prior_of_tokens([random_prior(7, n) for n in range(3)], torch.arange(7).where(MASK, -1))
    loss = prior_loss(model, PADDED, LABELS, prior, distance=distance) - prior_loss(model, PADDED, LABELS, None)
    names = [n for n, p in model.named_parameters() if "query.weight" in n]
    found = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in found)


def test_without_lambda_training_is_the_same_to_the_bit() -> None:
    texts = pronoun_task(24, torch.Generator().manual_seed(0))
    models = [attention_classifier(207, 2, dim=8, random_state=0) for _ in range(2)]
    prior = torch.full(texts.mask.shape, 1 / 12)
    train_with_priors(models[0], texts, prior, lam=0.0, epochs=2)
    train_with_priors(models[1], texts, None, epochs=2)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_attribution_that_is_the_prior_costs_nothing() -> None:
    model = net()
    found = self_attribution(model, PADDED, LABELS).detach()
    for distance in ("kl", "mse", "cosine"):
        assert float(alignment_loss(found, found, distance)) == pytest.approx(0.0, abs=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["gradient", "attention"])
def test_training_moves_the_attribution_to_the_prior(form) -> None:  # type: ignore[no-untyped-def]
    texts = pronoun_task(60, torch.Generator().manual_seed(0))
    others = texts._replace(marked=torch.arange(12).expand(60, 12) == 0)
    mass = {}
    for name, prior in (("prior", others.marked.float()), ("none", None)):
        model = attention_classifier(207, 2, dim=8, hidden=4, random_state=0)
        train_with_priors(model, texts, prior, lam=1.0, form=form, epochs=8, lr=1e-2)
        mass[name] = float(attribution_mass(model, others, form).mean())
    assert mass["prior"] > mass["none"] + 0.1


def test_classic_priors_are_of_words() -> None:
    model = attention_classifier(20, 2, dim=6, random_state=0).eval()
    word = torch.arange(7).expand(3, -1).div(2, rounding_mode="floor").where(MASK, -1)
    scores = InputGradients("integrated").explain(model, PADDED, LABELS).scores
    for absolute in (False, True):
        found = priors_of_scores(scores, word, absolute)
        assert [len(p) for p in found] == [4, 2, 3]
        assert all(float(p.sum()) == pytest.approx(1.0) for p in found)
    two = class_aware_prior(lambda t: scorer(t).log_softmax(1), ["hello", "refund"], 0, against="probability", mu=1e-6)
    assert torch.allclose(two, torch.tensor([0.0, 1.0]), atol=1e-4)


def test_a_words_prior_is_spread_over_its_tokens() -> None:
    tokens = {"so": [5], "thin": [6, 7]}
    encoded = encode_words([["so", "thin"], ["thin"]], tokens.__getitem__, first=[1], last=[2])
    assert encoded.input_ids.tolist() == [[1, 5, 6, 7, 2], [1, 6, 7, 2, 0]]
    assert encoded.mask.sum(1).tolist() == [5, 4]
    found = prior_of_tokens([torch.tensor([0.2, 0.8]), torch.tensor([1.0])], encoded.word)
    assert torch.allclose(found, torch.tensor([[0.0, 0.2, 0.4, 0.4, 0.0], [0.0, 0.5, 0.5, 0.0, 0.0]]))
    assert prior_overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CachedScorer(scorer, ["a"]), "labels: expected the names of at least two classes"),
        (lambda: CachedScorer(scorer, ["a", ""]), "labels: expected the names of at least two classes"),
        (lambda: class_aware_prior(scorer, [], 0), "words: expected at least one"),
        (lambda: contrast(torch.zeros(1, 2), 2), "label: expected one of at least two listed classes, got 2 of 2"),
        (lambda: contrast(torch.zeros(1, 2), 0, "some"), "against: expected"),
        (lambda: keep_masks(3, 3, torch.Generator()), "count: expected at least 4, got 3"),
        (lambda: ridge(masks(), numbers(3)), "targets, weights: expected one for each of the masks"),
        (lambda: ridge(masks(), numbers(40), mu=0.0), "mu: expected a positive number"),
        (lambda: hybrid_prior([]), "priors, weights: expected"),
        (lambda: alignment_loss(torch.ones(1, 2), torch.ones(1, 3)), r"attribution: expected \[1, 2\]"),
        (lambda: prior_of_tokens([torch.ones(1)], torch.tensor([[0, 1]])), "priors: expected 2 words at least, got 1"),
        (lambda: prior_of_tokens([], torch.tensor([[0, 1]])), "priors: expected one for each of 1 texts"),
        (lambda: encode_words([[]], lambda w: []), "texts: expected at least one token"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
