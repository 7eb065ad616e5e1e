from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import AttentionClassifier, BiLSTM, ClassifierAttention, InputGradients, Occlusion
from cenote.explain.attention_classifiers import attention_classifier
from cenote.explain.fitting import fit
from cenote.explain.input_gradients import input_gradients
from cenote.testing import check_explainer
from tests.explain.texts import PADDED

KINDS = [
    {"scorer": "linear"},
    {"scorer": "additive", "hidden": 3},
    {"scorer": "dot", "hidden": 3},
    {"pooling": "uniform"},
    {"pooling": "ends", "hidden": 3},
]


def model(**settings) -> AttentionClassifier:  # type: ignore[no-untyped-def]
    return attention_classifier(20, 2, dim=6, random_state=0, **settings).eval()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_padding_on_either_side_and_batch_mates_change_nothing(settings: dict[str, object]) -> None:
    net = model(**settings)
    whole = net(**PADDED)
    for item, real in enumerate(PADDED["attention_mask"].bool()):
        ids = PADDED["input_ids"][item : item + 1, real]
        alone = net(ids)
        left = nn.functional.pad(ids, (3, 0), value=7)
        moved = net(left, nn.functional.pad(torch.ones_like(ids), (3, 0)))
        for other in (whole.logits[item : item + 1], moved.logits):
            assert torch.allclose(alone.logits, other, atol=1e-6)
        assert torch.allclose(alone.weights, whole.weights[item : item + 1, real], atol=1e-6)
    assert not whole.weights[~PADDED["attention_mask"].bool()].any()


def test_a_bilstm_reads_holes_as_if_nothing_stood_there() -> None:
    torch.manual_seed(0)
    lstm, x = BiLSTM(4, 3), torch.randn(1, 5, 4)
    mask = torch.tensor([[True, False, True, True, False]])
    assert torch.allclose(lstm(x, mask)[mask], lstm(x[mask][None])[0], atol=1e-6)
    assert torch.equal(lstm(x, mask)[~mask], torch.zeros(2, 6))
    h, (last, _) = lstm.lstm(x)
    assert torch.allclose(lstm.ends(h, torch.ones(1, 5, dtype=torch.bool))[0], last.flatten())


def test_what_stands_in_padding_reaches_nothing() -> None:
    net = model(hidden=3)
    x = net.embedding(PADDED["input_ids"]).detach()
    torn = torch.where(PADDED["attention_mask"].bool()[..., None], x, torch.nan)
    found = net(inputs_embeds=torn, attention_mask=PADDED["attention_mask"])
    assert torch.allclose(found.logits, net(**PADDED).logits, atol=1e-6)


def test_blocked_attention_sums_to_what_is_left() -> None:
    net = model()
    blocked = PADDED["input_ids"] % 3 == 0
    whole, found = net(**PADDED), net(**PADDED, blocked=blocked)
    assert torch.equal(found.weights, whole.weights.masked_fill(blocked, 0.0))
    ends = model(pooling="ends", hidden=3)
    assert not torch.equal(ends(**PADDED).logits, ends(**PADDED, blocked=blocked).logits)


def test_attention_may_depend_on_a_second_text() -> None:
    other = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    for scorer in ("additive", "dot"):
        net = model(scorer=scorer, hidden=3, conditioned=True)
        one, two = net(**PADDED, condition_ids=other), net(**PADDED, condition_ids=other.flip(0))
        assert not torch.allclose(one.weights, two.weights)
        padded = nn.functional.pad(other, (0, 2), value=3)
        mask = nn.functional.pad(torch.ones_like(other), (0, 2))
        again = net(**PADDED, condition_ids=padded, condition_mask=mask)
        assert torch.allclose(one.logits, again.logits, atol=1e-6)
        with pytest.raises(InputError, match="condition_ids: expected the second text"):
            net(**PADDED)


def test_pretrained_vectors_are_loaded_and_trained() -> None:
    vectors = torch.randn(20, 6)
    net = model(vectors=vectors)
    assert torch.equal(net.embedding.weight, vectors)
    assert net.embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model(scorer="none"), "scorer: expected 'linear', 'additive' or 'dot'"),
        (lambda: model(pooling="ends"), "encoder: expected one with ends"),
        (lambda: model(conditioned=True), "scorer: expected 'additive' or 'dot'"),
        (lambda: model(vectors=torch.zeros(3, 6)), r"vectors: expected \[20, 6\]"),
        (lambda: AttentionClassifier(nn.Embedding(3, 2), nn.Linear(2, 2)), "scorer: expected one"),
        (lambda: model()(), "input_ids: expected either these or inputs_embeds"),
        (lambda: model()(torch.ones(1, 2).long(), torch.zeros(1, 2)), "attention_mask: an item has no token"),
        (lambda: model()(torch.ones(1, 2).long(), torch.ones(1, 3)), r"attention_mask: expected \[1, 2\]"),
        (lambda: input_gradients(nn.Linear(1, 1), PADDED), "model: Linear has no get_input_embeddings"),
        (lambda: InputGradients().explain(model(), PADDED, torch.tensor([0, 1, 2])), "target: expected 3 classes"),
        (lambda: InputGradients().explain(model(), {}), "inputs: expected input_ids"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()


EXPLAINERS = [
    ClassifierAttention(),
    ClassifierAttention("norms"),
    InputGradients(),
    InputGradients("norm"),
    InputGradients("integrated", steps=8),
    InputGradients("integrated", steps=8, baseline=0),
    Occlusion(),
]


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: f"{type(e).__name__} {getattr(e, 'form', '')}")
@pytest.mark.parametrize("hidden", [None, 8])
def test_explainers_keep_the_contract(explainer, hidden: int | None) -> None:  # type: ignore[no-untyped-def]
    net = attention_classifier(40, 3, dim=8, hidden=hidden, random_state=1).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    check_explainer(explainer, net, PADDED)


def test_gradients_of_a_mean_of_embeddings_are_known() -> None:
    net = model(pooling="uniform")
    w = net.output.weight.detach()
    x = net.embedding(PADDED["input_ids"]).detach()
    real = PADDED["attention_mask"].bool()
    count = real.sum(1)[:, None]
    target = torch.tensor([0, 1, 0])
    expected = (x * w[target][:, None]).sum(-1).masked_fill(~real, 0.0) / count
    for form in ("times input", "integrated"):
        found = InputGradients(form).explain(net, PADDED, target)  # type: ignore[arg-type]
        assert torch.allclose(found.scores, expected, atol=1e-6)
    assert torch.allclose(found.completeness_error, torch.zeros(3), atol=1e-5)
    norm = InputGradients("norm").explain(net, PADDED, target).scores
    assert torch.allclose(norm, (w[target].abs().sum(1)[:, None] / count * real), atol=1e-6)


def test_one_logit_speaks_for_the_second_class() -> None:
    torch.manual_seed(0)
    net = attention_classifier(20, 1, dim=6, random_state=0).eval()
    ones = InputGradients().explain(net, PADDED, torch.ones(3, dtype=torch.long)).scores
    assert torch.equal(InputGradients().explain(net, PADDED, torch.zeros(3, dtype=torch.long)).scores, -ones)


def test_the_best_epoch_is_kept_and_the_global_generator_is_left() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    net = nn.Linear(1, 1)
    torch.set_rng_state(before)
    seen: list[Tensor] = []
    scores = iter([0.1, 0.9, 0.9])

    def score() -> float:
        seen.append(copy.deepcopy(net.weight.detach()))
        return next(scores)

    found = fit(net, 4, lambda n: net(n[:, None].float()).square().mean(), epochs=3, batch=3, lr=0.1, score=score)
    assert found.best == 1
    assert found.scores == (0.1, 0.9, 0.9)
    assert len(found.losses) == 6
    assert torch.equal(net.weight, seen[1])
    assert not net.training
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="loss: is nan at step 0"):
        fit(net, 4, lambda n: net.weight.sum() * torch.nan, epochs=1, batch=4)
