from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.fitting import fit
from cenote.mix.mixture_of_attentive_experts.attention import MixtureAttention, drawn
from cenote.mix.mixture_of_attentive_experts.experts import ExpertGate, expert_heads, gate_input, head_factors
from cenote.mix.mixture_of_attentive_experts.live import LiveMixture
from cenote.mix.mixture_of_attentive_experts.measures import gates_of, specialisation, strongest, word_information
from cenote.mix.mixture_of_attentive_experts.model import MAEClassifier, MAETransformer
from cenote.mix.mixture_of_attentive_experts.training import (
    adapt_gates,
    gate_parameters,
    mix_all,
    mixtures,
    parameters_of,
    train_mixture,
)
from tests import tiny

DOUBLE = torch.float64


def layer(heads: int = 4, drop: int = 1, **settings: Any) -> MixtureAttention:
    torch.manual_seed(0)
    made = MixtureAttention(8, heads, drop=drop, hidden=6, **settings).double()
    nn.init.normal_(made.gate.output.weight)
    return made


def tokens() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 5, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


@pytest.mark.parametrize("drop", [1, 2])
def test_the_mixture_of_experts_is_a_factor_of_each_head(drop: int) -> None:
    made, (x, mask) = layer(drop=drop), tokens()
    heads = made.head_outputs(x, mask=mask)
    members = expert_heads(4, drop)
    assert len(members) == math.comb(4, drop)
    experts = [4 / (4 - drop) * heads[:, kept].sum(1) for kept in members]
    found, gates = made.attend(x, mask=mask)
    mixed = sum(g[:, None, None] * f for g, f in zip(gates.T, experts, strict=True))
    assert torch.allclose(found, mixed + made.output.bias)  # type: ignore[operator]
    for number, f in enumerate(experts):
        alone = made.attend(x, mask=mask, expert=torch.full((3,), number)).output
        assert torch.allclose(alone, f + made.output.bias)
    assert torch.allclose(head_factors(gates, members).sum(1), torch.full((3,), 4.0, dtype=DOUBLE))
    mean = torch.stack(experts).mean(0)
    assert torch.allclose(mean, heads.sum(1))


def test_even_gates_are_plain_attention_and_one_alone_is_attention_without_a_head() -> None:
    made, (x, mask) = layer(), tokens()
    plain = nn.MultiheadAttention(8, 4, batch_first=True).double()
    copied = MixtureAttention.of(plain)
    expected = plain(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
    for mixture in ("soft", "even"):
        assert float((copied.use(mixture).attend(x, mask=mask).output - expected)[mask].abs().max().detach()) < 1e-12  # type: ignore
    without = made.attend(x, mask=mask, expert=torch.tensor([3, 3, 3])).output
    heads = made.head_outputs(x, mask=mask)
    assert torch.allclose(without, 4 / 3 * (heads.sum(1) - heads[:, 0]) + made.output.bias)


def test_two_heads_have_experts_of_one() -> None:
    g = torch.tensor([[0.3, 0.7]])
    # the first expert is without the last head
    assert torch.allclose(head_factors(g, expert_heads(2)), 2 * (1 - g.flip(1)))
    with pytest.raises(InputError, match="drop: expected fewer than the 1 heads"):
        expert_heads(1)
    with pytest.raises(InputError, match="drop: expected fewer than the 4 heads"):
        MixtureAttention(8, 4, drop=4)


def test_hard_experts_compute_their_heads_alone() -> None:
    made, (x, mask) = layer(), tokens()
    gates = made.attend(x, mask=mask).gates
    hard = made.use("hard").attend(x, mask=mask).output
    assert torch.allclose(hard, made.attend(x, mask=mask, expert=gates.argmax(1)).output)
    with torch.no_grad():
        # a head that is not computed may hold anything
        dropped = int((~made.gate.members[3]).nonzero())
        made.query.weight.view(4, 2, 8)[dropped] = float("nan")
        made.output.weight.view(8, 4, 2)[:, dropped] = float("nan")
    assert made.attend(x, mask=mask, expert=torch.tensor([3, 3, 3])).output.isfinite().all()
    with pytest.raises(InputError, match="expert: expected 0 to 3, got 4"):
        made.attend(x, expert=torch.tensor([4, 0, 0]))
    with pytest.raises(InputError, match="expert: expected a number for each of 3 items"):
        made.attend(x, expert=torch.tensor([0]))


def test_a_causal_gate_knows_no_later_token() -> None:
    made, (x, _) = layer(causal=True), tokens()
    before = made.attend(x)
    changed = x.clone()
    changed[:, 3:] += 1.0
    for mixture in ("soft", "hard"):
        now = made.use(mixture).attend(changed)  # type: ignore[arg-type]
        assert torch.equal(now.gates[:, :3], before.gates[:, :3])
    assert torch.allclose(made.use("soft").attend(changed).output[:, :3], before.output[:, :3])
    assert not torch.allclose(made.attend(changed).gates[:, 3:], before.gates[:, 3:])
    # what is read has no order, and a gate of the query side
    memory, (y, _) = torch.randn(3, 7, 8, dtype=DOUBLE), tokens()
    found = made.attend(y, memory)
    assert torch.equal(found.gates, before.gates)
    turned = made.attend(y, memory.flip(1)).output
    assert torch.allclose(turned, found.output)


def test_padding_reaches_no_gate_and_an_empty_row_reads_zeros() -> None:
    x, mask = tokens()
    other = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert torch.equal(gate_input(x, mask), gate_input(other, mask))
    assert torch.equal(gate_input(x, mask & False), torch.zeros(3, 8, dtype=DOUBLE))
    made = layer()
    assert torch.allclose(made(other, mask), made(x, mask))
    assert torch.equal(made(x, mask & False), torch.zeros_like(x))
    assert made(x[:, :1]).shape == (3, 1, 8)
    rows = made.weights_of(other, mask).sum(-1)
    assert torch.allclose(rows, mask[:, None].to(DOUBLE).expand_as(rows))


@pytest.mark.parametrize("causal", [False, True])
def test_weights_told_are_weights_used_however_low_the_scores(causal: bool) -> None:
    made, (x, mask) = layer(causal=causal), tokens()
    with torch.no_grad():
        # all scores lie far below -1e4
        made.query.bias.fill_(3e3)
        made.key.bias.fill_(-3e3)
    x.requires_grad_()
    weights = made.weights_of(x, mask)
    rows = weights.sum(-1)
    torch.testing.assert_close(rows, mask[:, None].to(DOUBLE).expand_as(rows))
    (gradient,) = torch.autograd.grad(weights.square().sum(), x)
    assert bool(gradient.isfinite().all())


def test_the_gate_is_even_before_training_and_is_told_when_asked() -> None:
    gate = ExpertGate(8, 4, drop=2)
    assert gate(torch.randn(2, 3, 8)).tolist() == [[1.0] * 4] * 2
    assert ExpertGate(8, 4, causal=True)(torch.randn(2, 3, 8)).shape == (2, 3, 4)
    even = torch.full((400, 2), 0.5)
    torch.manual_seed(0)
    assert 150 < int(drawn(even).sum()) < 250
    causal = torch.zeros(1, 3, 2)
    causal[0, :, 0] = 1.0
    causal[0, 1] = torch.tensor([0.0, 1.0])
    assert drawn(causal, torch.tensor([[True, True, False]])).item() == 1
    assert drawn(causal).item() == 0


def dialects(count: int = 96) -> tuple[Tensor, Tensor]:
    """Words behind a token that says whether they are copied (2) or turned around (3); targets of each place."""
    words = torch.randint(4, 9, (count, 4), generator=torch.Generator().manual_seed(0))
    rule = torch.arange(count) % 2
    told = torch.cat([rule[:, None] + 2, words], 1)
    target = torch.where(rule[:, None] == 0, words, words.flip(1))
    return told, F.pad(target, (1, 0))


def classifier(**settings: Any) -> MAEClassifier:
    torch.manual_seed(0)
    return MAEClassifier(9, 9, per_token=True, dim=16, hidden=16, layers=1, heads=4, gate_hidden=8, **settings)


@pytest.mark.parametrize(
    ("scheme", "moves"),
    [("alternating", (False, True)), ("even", (True, False)), ("joint", (True, True)), ("attention", (True, False))],
)
def test_each_step_trains_its_own_part(scheme: Any, moves: tuple[bool, bool]) -> None:
    told, target = dialects(8)
    model = classifier()
    phi = gate_parameters(model)
    theta = [p for p in model.parameters() if not any(p is q for q in phi)]
    before = [[p.detach().clone() for p in part] for part in (theta, phi)]

    def loss(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(told[chosen]).transpose(1, 2), target[chosen])

    # the last of two epochs is a G epoch where they take turns: see what it leaves alone
    seen: list[list[Tensor]] = []

    def score() -> float:
        seen.append([p.detach().clone() for p in (*theta, *phi)])
        return float(len(seen))

    train_mixture(model, 8, loss, scheme, epochs=2, batch=4, lr=0.01, gate_every=2, score=score)
    first, last = seen
    changed = [
        any(not torch.equal(a, b) for a, b in zip(first[s], last[s], strict=True))
        for s in (slice(0, len(theta)), slice(len(theta), None))
    ]
    assert tuple(changed) == moves
    if scheme == "alternating":
        # the F epoch before it left the gates to the bit
        assert all(torch.equal(a, b) for a, b in zip(before[1], first[len(theta) :], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(before[0], first[: len(theta)], strict=True))
    assert [m.mixture for m in mixtures(model)] == ["even" if scheme in ("even", "attention") else "soft"]


@pytest.mark.parametrize("scheme", ["alternating", "joint", "attention"])
def test_a_training_that_fails_leaves_no_trace(scheme: Any) -> None:
    told, target = dialects(8)
    model = classifier()
    calls = []

    def loss(chosen: Tensor) -> Tensor:
        calls.append(chosen)
        if len(calls) == 2:
            raise RuntimeError("on the way")
        return F.cross_entropy(model(told[chosen]).transpose(1, 2), target[chosen])

    with pytest.raises(RuntimeError, match="on the way"):
        train_mixture(model, 8, loss, scheme, epochs=2, batch=4, gate_every=2)
    assert not any(m.training for m in model.modules())
    assert [m.mixture for m in mixtures(model)] == ["even" if scheme == "attention" else "soft"]


def test_gates_alone_are_tuned_and_tell_a_label() -> None:
    told, _ = dialects()
    model = classifier()
    label = told[:, 0] - 2

    def loss(chosen: Tensor) -> Tensor:
        # what the gate can change: pooled logits must tell the dialect
        return F.cross_entropy(model(told[chosen]).mean(1)[:, :2], label[chosen])

    theta = {n: p.detach().clone() for n, p in model.named_parameters() if ".gate." not in n}
    adapt_gates(model, len(told), loss, epochs=6, lr=0.05)
    assert all(torch.equal(p, theta[n]) for n, p in model.named_parameters() if n in theta)
    with gates_of(model) as found, torch.no_grad():
        model(told)
    (gates,) = (torch.cat(g) for g in found.values())
    assert specialisation(gates, label).information > 0.0
    assert gates.shape == (96, 4)
    with pytest.raises(InputError, match="has no gate of experts"), gates_of(nn.Linear(2, 2)):
        pass
    with pytest.raises(InputError, match="has no mixture layer"):
        mix_all("soft", nn.Linear(2, 2))


def test_training_keeps_the_best_epoch_and_can_stop_early() -> None:
    model = nn.Linear(2, 1)
    scores = iter([0.1, 0.9, 0.5, 0.4, 0.3])
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    fitted = fit(
        model, 4, lambda c: model(torch.ones(len(c), 2)).mean(), [stepper],
        epochs=5, batch=2, score=lambda: next(scores), patience=2,
    )  # fmt: skip
    assert fitted.best == 1
    assert fitted.scores == (0.1, 0.9, 0.5, 0.4)
    with pytest.raises(InputError, match="loss: is nan at step 0"):
        fit(model, 2, lambda c: model.weight.sum() * float("nan"), [stepper], epochs=1, batch=2)


def test_measures_of_specialisation() -> None:
    gates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    found = specialisation(gates, labels)
    assert found.information == pytest.approx(math.log(2))
    assert found.shares.tolist() == found.best.tolist() == [0.5, 0.5]
    assert specialisation(gates, torch.tensor([0, 1, 0, 1])).information == pytest.approx(0.0)
    even = specialisation(torch.full((4, 2), 0.5), labels)
    assert (even.information, even.entropy) == (0.0, pytest.approx(math.log(2)))
    words = torch.tensor([[0, 2], [0, 2], [1, 2], [1, 2]])
    information = word_information(gates, words, 4)
    assert information[0, 0] == pytest.approx(math.log(2))
    assert information[2].tolist() == pytest.approx([0.0, 0.0])
    assert bool(information[3].isnan().all())
    assert bool(word_information(gates, words, 4, least=3)[0].isnan().all())
    assert strongest(information, ["a", "b", "both", "none"], 1) == [["a"], ["b"]]
    with pytest.raises(InputError, match="labels: expected one for each of 4"):
        specialisation(gates, labels[:2])


def transformer() -> MAETransformer:
    torch.manual_seed(0)
    return MAETransformer(9, dim=16, hidden=16, layers=1, heads=4, gate_hidden=8, dropout=0.0).eval()


def test_the_transformer_is_causal_and_blind_to_padding() -> None:
    model = transformer()
    for gate in (m for m in model.modules() if isinstance(m, ExpertGate)):
        nn.init.normal_(gate.output.weight)
    source, target = torch.tensor([[5, 6, 2], [7, 2, 0]]), torch.tensor([[1, 5, 6], [1, 7, 8]])
    before = model(source, target)
    changed = target.clone()
    changed[:, 2] = 3
    assert torch.allclose(model(source, changed)[:, :2], before[:, :2], atol=1e-6)
    assert torch.allclose(model(source[1:, :2], target[1:]), before[1:], atol=1e-5)
    assert torch.allclose(model(F.pad(source, (0, 2)), F.pad(target, (0, 1)))[:, :3], before, atol=1e-5)
    assert model.loss(source, torch.tensor([[5, 2], [7, 2]])).isfinite()
    with pytest.raises(InputError, match="pad, start, end: expected tokens below 9"):
        MAETransformer(9, end=9, dim=16, layers=1, heads=4)


def test_the_base_size_is_that_of_the_paper() -> None:
    with torch.device("meta"):
        model = MAETransformer(100, gate_hidden=256)
    found = [m for m in model.modules() if isinstance(m, MixtureAttention)]
    assert len(found) == 18
    assert len(model.encoder) == len(model.decoder) == 6
    assert all(len(m.gate.members) == 8 for m in found)
    gates = parameters_of([m.gate for m in found])
    assert gates == 18 * (512 * 256 + 256 + 256 * 8 + 8)


def test_decoding_is_greedy_or_by_beams() -> None:
    model = transformer()
    source = torch.tensor([[5, 6, 2], [7, 2, 0]])

    def probability(text: Tensor) -> Tensor:
        logits = model(source, F.pad(text[:, :-1], (1, 0), value=1)).log_softmax(-1)
        return (logits.gather(-1, text[..., None])[..., 0] * (text != 0)).sum(1)

    greedy = model.decode(source, 4)
    told = torch.full((2, 1), 1)
    for step in range(4):
        logits = model(source, told)[:, -1]
        logits[:, 0] = -math.inf
        best = logits.argmax(-1)
        ended = (greedy[:, :step] == 2).any(1)
        assert torch.equal(greedy[:, step], best.masked_fill(ended, 0))
        told = torch.cat([told, best[:, None]], 1)
    wide = model.decode(source, 4, beams=6, length_penalty=0.0)
    assert bool((probability(wide) >= probability(greedy) - 1e-5).all())
    assert torch.equal(model.decode(source, 4, beams=1), greedy)
    assert wide.shape == (2, 4)


def test_a_trained_encoder_is_the_same_under_even_gates() -> None:
    library = tiny.transformers()
    model = library.BertModel(library.BertConfig(**{**tiny.TEXT, "num_hidden_layers": 2})).eval().double()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    before = model(**inputs).last_hidden_state
    live = LiveMixture(model, lambda: model(**inputs))
    assert not any(gate.causal for gate in live.gates)
    with live.on(model):
        assert float((model(**inputs).last_hidden_state - before).abs().max().detach()) < 1e-12
    for gate in live.gates:
        nn.init.normal_(gate.output.weight)
    with live.on(model):
        changed = model(**inputs).last_hidden_state
        changed.sum().backward()
        shorter = model(input_ids=ids[1:, :2]).last_hidden_state
    assert not torch.allclose(changed, before)
    assert torch.allclose(shorter, changed[1:, :2])
    assert all(p.grad is not None for p in live.parameters())
    # what the first block's heads are multiplied by
    states = model.embeddings(ids)
    gates = live.gates[0].experts(states, ids > 0)
    assert torch.allclose(live.last[live.places[0].path], gates[1:])
    assert torch.equal(model(**inputs).last_hidden_state, before)
    for mixture in ("hard", "sampled", "even"):
        with live.use(mixture).on(model):
            assert model(**inputs).last_hidden_state.isfinite().all()


def test_gates_of_a_decoder_know_no_later_token_and_decode_with_a_cache() -> None:
    library = tiny.transformers()
    torch.manual_seed(0)
    model = library.LlamaForCausalLM(
        library.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=20,
        )
    ).eval()  # fmt: skip
    ids = torch.tensor([[5, 6, 7, 8]])
    live = LiveMixture(model, lambda: model(ids))
    assert all(gate.causal for gate in live.gates)
    for gate in live.gates:
        nn.init.normal_(gate.output.weight, std=3.0)
    with torch.no_grad(), live.on(model):
        whole = model(torch.cat([ids, torch.tensor([[9, 10]])], 1)).logits
    with torch.no_grad(), live.on(model):
        assert torch.allclose(model(ids).logits, whole[:, :4], atol=1e-5)
    with torch.no_grad(), live.on(model):
        first = model(ids, use_cache=True)
        second = model(torch.tensor([[9]]), past_key_values=first.past_key_values, use_cache=True)
        third = model(torch.tensor([[10]]), past_key_values=second.past_key_values, use_cache=True)
    assert torch.allclose(second.logits[:, -1], whole[:, 4], atol=1e-5)
    assert torch.allclose(third.logits[:, -1], whole[:, 5], atol=1e-5)


def test_the_schedule_runs_on_a_trained_model_too() -> None:
    library = tiny.transformers()
    torch.manual_seed(0)
    model = library.BertForSequenceClassification(
        library.BertConfig(**{**tiny.TEXT, "num_hidden_layers": 1, "num_labels": 2})
    )
    ids, labels = torch.tensor([[5, 6, 7], [7, 6, 5], [5, 5, 7], [7, 7, 5]]), torch.tensor([0, 1, 0, 1])
    live = LiveMixture(model, lambda: model(ids))

    def loss(chosen: Tensor) -> Tensor:
        with live.on(model):
            return F.cross_entropy(model(ids[chosen]).logits, labels[chosen])

    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def score() -> float:
        seen.append(([p.detach().clone() for p in model.parameters()], [p.detach().clone() for p in live.parameters()]))
        return float(len(seen))

    train_mixture(model, 4, loss, live=live, epochs=2, batch=4, gate_every=2, score=score)
    (theta, phi), (theta_behind, phi_behind) = seen
    assert all(torch.equal(a, b) for a, b in zip(theta, theta_behind, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(phi, phi_behind, strict=True))
    assert all(float(g.output.weight.detach().abs().max()) > 0 for g in live.gates)
    before = [p.detach().clone() for p in model.parameters()]
    adapt_gates(model, 4, loss, live=live, epochs=1, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
