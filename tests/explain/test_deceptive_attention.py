from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import (
    AttentiveSeq2Seq,
    ClassifierAttention,
    InputGradients,
    Occlusion,
    aligned_mass_penalty,
    attention_mass_penalty,
    audit_attention,
    audit_seq2seq,
    deceptive_bench,
    deceptive_loss,
    distance_reward,
    entropy_reward,
    finds,
    pairs_of,
    pronoun_task,
    shown,
    train_deceptive,
    train_seq2seq,
)
from cenote.explain.attention_classifiers import attention_classifier
from cenote.explain.base import Attribution
from cenote.explain.deceptive_attention.bench import frontier, small_classifier
from cenote.explain.fitting import Texts
from cenote.models.live import recorded
from cenote.testing.as_found import AsFound
from tests.explain.texts import PADDED
from tests.models.live import zoo

MASK = PADDED["attention_mask"].bool()
MARKED = PADDED["input_ids"] % 3 == 0
TEXTS = Texts(PADDED["input_ids"], MASK, torch.tensor([0, 1, 1]), MARKED)


def bert() -> nn.Module:
    return zoo.text("BertForSequenceClassification", vocab_size=40, initializer_range=0.5)("sdpa").model


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_nothing_impermissible_costs_nothing() -> None:
    a = weights(2, 5).requires_grad_()
    found = attention_mass_penalty(a, torch.zeros(2, 5, dtype=torch.bool))
    assert float(found.loss) == 0
    assert math.copysign(1, float(found.loss)) == 1
    assert not torch.autograd.grad(found.loss, a)[0].any()


@pytest.mark.parametrize("marked", [1, 3])
def test_uniform_attention_costs_the_share(marked: int) -> None:
    impermissible = torch.arange(5)[None] < marked
    found = attention_mass_penalty(torch.full((1, 5), 0.2, dtype=torch.float64), impermissible, lam=0.7)
    assert float(found.loss) == pytest.approx(-0.7 * math.log(1 - marked / 5))


def test_the_gradient_is_that_of_the_closed_form() -> None:
    a, impermissible = weights(1, 6).requires_grad_(), torch.tensor([[True, False, True, False, False, False]])
    found = attention_mass_penalty(a, impermissible, lam=0.3)
    (gradient,) = torch.autograd.grad(found.loss, a)
    expected = torch.where(impermissible, 0.3 / (1 - found.mass.detach()), 0.0)
    assert torch.allclose(gradient, expected)


def test_all_mass_on_what_may_not_be_read_stays_finite() -> None:
    a = torch.tensor([[1.0, 0.0]], requires_grad=True)
    found = attention_mass_penalty(a, torch.tensor([[True, False]]))
    assert float(found.loss) == pytest.approx(-math.log(1e-6))
    assert bool(torch.autograd.grad(found.loss, a)[0].isfinite().all())


def test_with_one_head_and_one_text_the_reductions_agree() -> None:
    a, impermissible = weights(1, 1, 6), torch.arange(6)[None] < 2
    losses = {float(attention_mass_penalty(a, impermissible, reduce=r).loss) for r in ("mean", "max", "batch_min")}  # type: ignore[arg-type]
    assert len(losses) == 1
    assert losses == {float(attention_mass_penalty(a[:, 0], impermissible).loss)}


def test_the_worst_head_is_of_each_text_or_of_the_batch() -> None:
    a, impermissible = weights(3, 4, 6), torch.arange(6)[None].expand(3, -1) < 2
    left = (1 - a[..., :2].sum(-1)).log()
    assert float(attention_mass_penalty(a, impermissible, reduce="max").loss) == pytest.approx(
        float(-left.amin(1).mean())
    )
    assert float(attention_mass_penalty(a, impermissible, reduce="batch_min").loss) == pytest.approx(
        float(-left.amin())
    )


def test_marked_padding_has_no_effect() -> None:
    a, mask = weights(1, 2, 5), torch.tensor([[True, True, True, False, False]])
    impermissible = torch.tensor([[True, False, False, True, True]])
    found = attention_mass_penalty(a, impermissible, mask=mask)
    assert float(found.loss) == float(attention_mass_penalty(a, impermissible & mask).loss)
    assert float(found.padding) == pytest.approx(float(a[..., 3:].sum(-1).mean()))


def test_of_a_whole_model_the_last_layers_row_of_the_first_real_token_counts() -> None:
    a = weights(2, 3, 4, 5, 5)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    impermissible = torch.arange(5)[None].expand(2, -1) > 3
    rows = torch.stack([a[0, -1, :, 0], a[1, -1, :, 2]])
    assert float(attention_mass_penalty(a, impermissible, mask=mask).loss) == float(
        attention_mass_penalty(rows, impermissible, mask=mask).loss
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_mass_penalty(weights(2, 3, 3, 3), torch.ones(2, 3).bool()), "attention: expected"),
        (lambda: attention_mass_penalty(weights(2, 3), torch.ones(2, 4).bool()), "impermissible, mask: expected"),
        (lambda: attention_mass_penalty(weights(2, 3), torch.ones(2, 3).bool(), reduce="min"), "reduce: expected"),
        (lambda: aligned_mass_penalty(weights(2, 3, 4), torch.ones(2, 3, 3).bool()), "impermissible: expected"),
        (lambda: distance_reward(weights(2, 3), weights(2, 4)), "stored: expected"),
        (lambda: deceptive_loss(small_classifier("embedding", 0), TEXTS, coef=1.0), "stored: expected the attention"),
        (lambda: audit_attention(small_classifier("embedding", 0), TEXTS._replace(marked=~MASK)), "texts: no token"),
        (lambda: finds(Attribution(torch.zeros(1, 2), torch.ones(1, 2).bool()), torch.ones(1, 3).bool()), "truth: exp"),
        (lambda: pairs_of("sort", 1, torch.Generator()), "task: expected 'flip', 'copy' or 'reverse'"),
        (lambda: ClassifierAttention("norms").explain(bert(), PADDED), "by: 'norms' takes the states"),
        (lambda: ClassifierAttention("size"), "by: expected"),
        (lambda: AttentiveSeq2Seq(12, 8, 7), "hidden: expected an even width"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()


def test_even_attention_and_distance_are_rewarded() -> None:
    even, peaked = torch.full((1, 4), 0.25), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert float(entropy_reward(even)) < float(entropy_reward(peaked)) == 0
    assert float(distance_reward(even, even)) == 0
    assert float(distance_reward(peaked, even)) == pytest.approx(-math.log(4))
    logits = torch.zeros(1, 3, requires_grad=True)
    a = logits.softmax(1)
    loss = entropy_reward(a) + distance_reward(a, torch.tensor([[1.0, 0.0, 0.0]]))
    assert bool(torch.autograd.grad(loss, logits)[0].isfinite().all())


def test_without_strength_training_is_the_same_to_the_bit() -> None:
    texts = pronoun_task(40, torch.Generator().manual_seed(0))
    models = [small_classifier("bilstm", 0) for _ in range(2)]
    train_deceptive(models[0], texts, lam=0.0, epochs=2, batch=8)
    optimiser, order = torch.optim.Adam(models[1].parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(2):
        for chosen in torch.randperm(40, generator=order).split(8):
            part = texts.select(chosen)
            loss = nn.functional.cross_entropy(models[1](**part.inputs).logits, part.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_penalty_moves_attention_and_the_best_epoch_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    train, dev = pronoun_task(200, generator), pronoun_task(50, generator)
    masses = {}
    for lam, others in ((0.0, {}), (1.0, {}), (0.0, {"beta": 1.0})):
        model = small_classifier("embedding", 0)
        found = train_deceptive(model, train, dev, lam, epochs=8, batch=20, lr=1e-2, **others)  # type: ignore[arg-type]
        assert found.scores[found.best] == max(found.scores)
        masses[lam, bool(others)] = audit_attention(model, dev).mass
    assert masses[1.0, False] < masses[0.0, False]
    assert masses[0.0, True] < masses[0.0, False]


def test_attention_is_pushed_away_from_a_stored_one() -> None:
    texts = pronoun_task(100, torch.Generator().manual_seed(0))
    plain, far = small_classifier("embedding", 0), small_classifier("embedding", 0)
    train_deceptive(plain, texts, lam=0.0, epochs=8, batch=20, lr=1e-2)
    stored = shown(plain, texts.inputs).weights[:, 0].detach()
    train_deceptive(far, texts, lam=0.0, coef=1.0, stored=stored, epochs=8, batch=20, lr=1e-2)
    assert (
        float(shown(far, texts.inputs).weights[texts.marked[:, None]].mean()) < float(stored[texts.marked].mean()) / 2
    )


def test_attention_of_a_transformer_is_that_which_it_returns() -> None:
    model, eager = (
        bert(),
        zoo.built("BertForSequenceClassification", {**zoo.TEXT, "vocab_size": 40, "initializer_range": 0.5}, "eager"),
    )
    with torch.no_grad():
        plain = model(**PADDED).logits
        found = shown(model, PADDED)
        maps = eager(**PADDED, output_attentions=True).attentions
    assert torch.equal(found.logits, plain)
    assert torch.allclose(found.weights, maps[-1][:, :, 0], atol=1e-6)


def test_blocking_works_on_a_transformer_and_leaves_it_as_it_was() -> None:
    model = bert()
    before = AsFound(model, lambda: model(**PADDED))
    with torch.no_grad():
        plain, blocked = shown(model, PADDED), shown(model, PADDED, blocked=MARKED)
    expected = plain.weights.masked_fill((MARKED & MASK)[:, None], 0.0)
    assert torch.allclose(blocked.weights, expected, atol=1e-7)
    assert not torch.allclose(blocked.logits, plain.logits)
    assert before.changed() is None


def test_the_penalty_reaches_the_parameters_of_a_transformer() -> None:
    model = bert()
    loss = deceptive_loss(model, TEXTS, lam=1.0) - deceptive_loss(model, TEXTS, lam=0.0)
    names = [n for n, _ in model.named_parameters() if "query" in n]
    found = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
    assert all(bool(g.any()) for g in found)


def test_a_transformer_learns_to_hide() -> None:
    model = zoo.text("BertForSequenceClassification", vocab_size=40)("sdpa").model
    mass = audit_attention(model, TEXTS).mass
    train_deceptive(model, TEXTS, lam=2.0, reduce="max", epochs=15, batch=3, lr=1e-2)
    assert audit_attention(model, TEXTS).mass < mass / 2


def test_kept_apart_what_is_marked_does_not_reach_the_others() -> None:
    model, ids = bert(), PADDED["input_ids"]
    apart = MARKED & MASK & (torch.arange(7) > 0)
    others = MASK & ~apart & (torch.arange(7) > 0)
    assert bool(apart.any())
    assert bool(others.any())
    found = []
    for given in (ids, ids.masked_fill(apart, 1)):
        inputs = {**PADDED, "input_ids": given}
        with torch.no_grad(), recorded(model, "states") as states:
            free, kept = shown(model, inputs).logits, shown(model, inputs, apart=apart).logits
        found.append((free, kept, [steps[1] for steps in states["states"].values()]))
        assert not torch.allclose(free, kept)
    (_, one, before), (_, two, after) = found
    assert not torch.allclose(one, two)
    for x, y in zip(before, after, strict=True):
        assert torch.allclose(x[others], y[others], atol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "bilstm"])
def test_the_bench_hides_its_key_from_attention_alone(kind) -> None:  # type: ignore[no-untyped-def]
    bench = deceptive_bench(kind)
    model, inputs, truth = bench
    assert bench.audit.mass < 0.05
    assert bench.honest_audit.accuracy - bench.audit.accuracy < 0.03
    assert bench.audit.accuracy - bench.audit.removed > 0.3
    assert "it deceives" in bench.audit.sentence()
    assert "it shows that" in bench.honest_audit.sentence()
    found = {
        name: float(finds(explainer.explain(model, inputs), truth).mean())
        for name, explainer in {
            "attention": ClassifierAttention(),
            "norms": ClassifierAttention("norms"),
            "gradient": InputGradients(),
            "integrated": InputGradients("integrated"),
            "occlusion": Occlusion(),
        }.items()
    }
    assert found["attention"] <= 0.6
    assert min(found["gradient"], found["integrated"], found["occlusion"]) >= 0.9
    # the size of the vectors tells of the one trick, and not of the other
    assert (found["norms"] >= 0.9) == (kind == "embedding")
    honest = finds(ClassifierAttention().explain(bench.honest, inputs), truth)
    assert float(honest.mean()) > found["attention"] + 0.3


def test_a_stronger_penalty_leaves_less_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = pronoun_task(200, generator), pronoun_task(50, generator)
    found = frontier(lambda: small_classifier("embedding", 0), train, test, epochs=8, batch=20, lr=1e-2)
    assert [lam for lam, _, _ in found] == [0.0, 0.1, 1.0]
    assert found[0][2] > found[1][2] > found[2][2]


def test_baselines_without_attention_are_audited_alike() -> None:
    texts = pronoun_task(20, torch.Generator().manual_seed(0))
    uniform = attention_classifier(207, 2, dim=8, pooling="uniform").eval()
    assert audit_attention(uniform, texts).mass == pytest.approx(1 / 12)
    ends = attention_classifier(207, 2, dim=8, hidden=4, pooling="ends").eval()
    assert audit_attention(ends, texts).share == pytest.approx(1 / 12)


def test_the_tasks_say_what_each_step_is_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    for task in ("copy", "flip", "reverse"):
        made = pairs_of(task, 20, generator)  # type: ignore[arg-type]
        words = made.source[0][made.source[0] > 2].tolist()
        expected = {
            "copy": words,
            "reverse": words[::-1],
            "flip": [w for n in range(0, len(words), 2) for w in (words[n + 1], words[n])],
        }[task]
        assert made.target[0][made.target[0] > 2].tolist() == expected
        assert torch.equal(made.source.gather(1, made.aligned).masked_fill(made.target == 0, 0), made.target)
        assert not made.impermissible[:, :, 0].any()
        ends = (made.source == 2)[:, None].expand_as(made.impermissible)
        assert not made.impermissible[ends].any()


def test_an_encoder_decoder_learns_and_its_writing_is_that_of_its_steps() -> None:
    pairs = pairs_of("copy", 300, torch.Generator().manual_seed(0), words=4, length=4)
    torch.manual_seed(0)
    model = AttentiveSeq2Seq(7, 16, 16)
    found = train_seq2seq(model, pairs, epochs=6, batch=30, lr=1e-2)
    assert found.losses[-1] < found.losses[0] / 2
    written = audit_seq2seq(model, pairs)
    assert written.tokens > 0.5
    given = model(pairs.source, model.decode(pairs.source, 5)).logits.argmax(-1)
    same = (given == model.decode(pairs.source, 5)) | (model.decode(pairs.source, 5) == 0)
    assert bool(same.all())
    assert audit_seq2seq(model, pairs, pairs.impermissible).mass == 0


def test_padding_of_a_source_changes_nothing() -> None:
    torch.manual_seed(0)
    model = AttentiveSeq2Seq(12, 8, 8)
    pairs = pairs_of("flip", 1, torch.Generator().manual_seed(0), words=5, length=4)
    longer = nn.functional.pad(pairs.source, (0, 3))
    one, two = model(pairs.source, pairs.target), model(longer, pairs.target)
    assert torch.allclose(one.logits, two.logits, atol=1e-6)
    assert not two.weights[..., -3:].any()
