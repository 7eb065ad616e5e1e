from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.mix.sixteen_heads.gated import (
    GatedAttention,
    denominator,
    gate_gradients,
    head_importance,
    normalised,
    scaled,
)
from cenote.mix.sixteen_heads.live import Head, head_statistics, heads_of, importance_of_heads, masked_heads, scaling
from cenote.mix.sixteen_heads.pruning import (
    Ablated,
    GreedyPruning,
    ablate_all_but_one,
    ablate_each,
    by_drop,
    prune_heads,
    pruning_order,
    seconds,
)
from cenote.mix.sixteen_heads.statistics import Change, paired_bootstrap, settled, significant, statistics_of
from cenote.models.live.without_heads import WithoutHeads
from tests import tiny

DOUBLE = torch.float64


def layer(heads: int = 4, **settings: Any) -> tuple[GatedAttention, Tensor, Tensor]:
    torch.manual_seed(0)
    made = GatedAttention(8, heads, **settings).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return made, torch.randn(2, 5, 8, dtype=DOUBLE), mask


def of_heads(made: GatedAttention, x: Tensor, mask: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    contexts = made.contexts(x.masked_fill(~mask.unsqueeze(-1), 0.0), mask)
    (gradients,) = torch.autograd.grad(loss(made.joined(contexts)), contexts)
    return contexts.detach(), gradients


def test_the_gradient_of_a_gate_is_the_finite_difference() -> None:
    made, x, mask = layer()

    def loss(y: Tensor) -> Tensor:
        return (y.square() * mask.unsqueeze(-1)).sum()

    found = gate_gradients(*of_heads(made, x, mask, loss), mask).sum(0)
    step = 1e-6
    for head in range(4):
        values = []
        for side in (1, -1):
            made.gates[head] = 1 + side * step
            values.append(float(loss(made(x, mask))))
            made.gates[head] = 1.0
        assert float(found[head]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


def test_gates_of_one_change_nothing_and_all_at_zero_leave_the_bias() -> None:
    made, x, mask = layer()
    plain = nn.MultiheadAttention(8, 4, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([made.query.weight, made.key.weight, made.value.weight]))
        plain.in_proj_bias.copy_(torch.cat([made.query.bias, made.key.bias, made.value.bias]))
        plain.out_proj.load_state_dict(made.output.state_dict())
    expected = plain(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
    assert torch.allclose(made(x, mask)[mask], expected[mask])
    made.gates.zero_()
    assert torch.equal(made(x, mask)[mask], made.output.bias.expand(8, 8))


def test_gating_weights_behind_dropout_is_gating_what_they_read() -> None:
    made, x, mask = layer()
    gates = torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=DOUBLE)
    weights = made.weights_of(x, mask) * gates.view(1, -1, 1, 1)
    value = made.value(x.masked_fill(~mask.unsqueeze(-1), 0.0)).unflatten(-1, (4, -1)).transpose(1, 2)
    clean = x.masked_fill(~mask.unsqueeze(-1), 0.0)
    assert torch.allclose(weights @ value, scaled(made.contexts(clean, mask), gates))


def test_rescaling_makes_up_for_heads_that_are_gone() -> None:
    y = torch.ones(1, 4, 1, 1)
    assert scaled(y, torch.tensor([1.0, 0.0, 1.0, 0.0]), rescale=True).flatten().tolist() == [2.0, 0.0, 2.0, 0.0]
    assert scaled(y, torch.zeros(4), rescale=True).flatten().tolist() == [0.0] * 4
    with pytest.raises(InputError, match="gates: expected one for each of 4 heads"):
        scaled(y, torch.ones(3))


def test_padding_counts_nothing() -> None:
    made, x, mask = layer()
    contexts, gradients = of_heads(made, x, mask, lambda y: y.square().sum())
    other = gradients + 100 * ~mask[:, None, :, None]
    for granularity in ("token", "example", "batch"):
        of = [head_importance(contexts, g, mask, granularity) for g in (gradients, other)]  # type: ignore[arg-type]
        assert torch.equal(*of)
    assert denominator(mask).item() == 8
    assert denominator(mask, last_layer=True).item() == denominator(mask, "example").item() == 2


def test_of_a_linear_loss_importance_is_the_change_and_scales_with_the_head() -> None:
    made, x, mask = layer()
    direction = torch.randn(2, 5, 8, dtype=DOUBLE) * mask.unsqueeze(-1)

    def loss(y: Tensor) -> Tensor:
        return (y * direction).sum()

    contexts, gradients = of_heads(made, x, mask, loss)
    found = head_importance(contexts, gradients, mask, "batch")
    full = float(loss(made(x, mask)))
    for head in range(4):
        made.gates[head] = 0.0
        assert float(found[head]) == pytest.approx(abs(full - float(loss(made(x, mask)))), abs=1e-10)
        made.gates[head] = 1.0
    for granularity in ("token", "example", "batch"):
        one, three = (head_importance(c * contexts, gradients, mask, granularity) for c in (1, 3))  # type: ignore
        assert torch.allclose(three, 3 * one)


def test_granularities_differ_in_where_they_forget_the_sign() -> None:
    made, x, mask = layer()
    contexts, gradients = of_heads(made, x, mask, lambda y: y.square().sum())
    token, example, batch = (head_importance(contexts, gradients, mask, g) for g in ("token", "example", "batch"))
    assert bool((token >= example - 1e-12).all())
    assert bool((example >= batch - 1e-12).all())
    per_example = gate_gradients(contexts, gradients, mask)
    assert torch.allclose(example, per_example.abs().sum(0))
    assert torch.allclose(batch, per_example.sum(0).abs())
    assert torch.allclose(normalised(token[None]).square().sum(), torch.ones((), dtype=DOUBLE))
    with pytest.raises(InputError, match="granularity: expected 'token'"):
        head_importance(contexts, gradients, mask, "word")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gradients: expected"):
        head_importance(contexts, gradients[:1], mask)
    with pytest.raises(InputError, match="mask: expected"):
        head_importance(contexts, gradients, mask[:1])


def bert(**settings: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    library = tiny.transformers()
    torch.manual_seed(0)
    config = library.BertConfig(**{**tiny.TEXT, "num_hidden_layers": 2, **settings})
    model = library.BertForSequenceClassification(config).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    return model, {"input_ids": ids, "attention_mask": (ids > 0).long()}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    library = tiny.transformers()
    torch.manual_seed(0)
    config = library.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20,
    )  # fmt: skip
    return library.LlamaForCausalLM(config).eval(), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    library = tiny.transformers()
    torch.manual_seed(0)
    config = library.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=20, n_positions=8)
    return library.GPT2LMHeadModel(config).eval(), {"input_ids": torch.tensor([[5, 6, 7]])}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    library = tiny.transformers()
    torch.manual_seed(0)
    config = library.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20, num_mel_bins=8, max_source_positions=6,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = library.WhisperForConditionalGeneration(config).eval()
    return model, {"input_features": torch.randn(2, 8, 12), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}


def squared(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits.square().sum()


@pytest.mark.parametrize("made", [bert, llama, whisper])
def test_importance_of_running_models_is_the_gradient_at_their_heads(made: Any) -> None:
    model, inputs = made()
    before = model(**inputs).logits
    known = heads_of(model, lambda: model(**inputs))
    found = importance_of_heads(model, squared, [inputs], "batch")
    factors = {
        place: torch.ones(count, requires_grad=True) for place, count in zip(known.places, known.heads, strict=True)
    }
    from cenote.models.live import edited

    with edited(model, *scaling(factors)):
        value = squared(model, inputs)
    gradients = torch.autograd.grad(value, list(factors.values()))
    items = len(next(iter(inputs.values())))
    for own, g in zip(found.scores, gradients, strict=True):
        assert torch.allclose(own * items, g.abs(), rtol=1e-3, atol=1e-5)
    assert torch.equal(model(**inputs).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_kinds_of_attention_are_told_apart() -> None:
    model, inputs = whisper()
    known = heads_of(model, lambda: model(**inputs))
    assert list(known.types) == ["encoder self", "decoder self", "encoder-decoder"]
    assert len(known.all) == 6
    (cross,) = known.types["encoder-decoder"]
    with masked_heads(model, known, known.of_type("encoder-decoder").all):
        silent = model(**inputs).logits
    behind = model.get_submodule(f"{cross.path}.out_proj")
    with torch.no_grad():
        behind.weight.zero_()  # type: ignore[operator]
    assert torch.allclose(model(**inputs).logits, silent, atol=1e-6)
    with pytest.raises(InputError, match="kind: expected one of encoder self"):
        known.of_type("self")
    model, inputs = llama()
    known = heads_of(model, lambda: model(**inputs))
    assert known.heads == (4, 4)
    assert known.kv_heads == (2, 2)
    assert list(known.types) == ["self"]
    with pytest.raises(InputError, match="no head 4 of"):
        known.by_place([Head(known.places[0].path, 4)])
    with pytest.raises(InputError, match="no head 0 of nowhere; there are"):
        known.by_place([Head("nowhere", 0)])


def test_tokens_of_padding_do_not_count_in_running_models() -> None:
    model, inputs = bert()
    alone = {name: value[1:, :2] for name, value in inputs.items()}
    padded = {name: value[1:] for name, value in inputs.items()}
    for granularity in ("token", "example"):
        of = [importance_of_heads(model, squared, [one], granularity) for one in (alone, padded)]  # type: ignore[arg-type]
        for a, b in zip(of[0].scores, of[1].scores, strict=True):
            assert torch.allclose(a, b, rtol=1e-4)


def test_what_gives_no_importance_is_refused() -> None:
    model, inputs = bert()
    with pytest.raises(InputError, match="batches: give at least one"):
        importance_of_heads(model, squared, [])
    with pytest.raises(InputError, match="without gradient"):
        importance_of_heads(model, lambda m, b: squared(m, b).detach(), [inputs])
    with pytest.raises(InputError, match="loss: expected one number"):
        importance_of_heads(model, lambda m, b: m(**b).logits[:, 0], [inputs])
    with pytest.raises(InputError, match="twice"):
        importance_of_heads(model, lambda m, b: squared(m, b) + squared(m, b), [inputs])
    with pytest.raises(InputError, match="known: needed with without"):
        importance_of_heads(model, squared, [inputs], without=[Head("a", 0)])


def items(inputs: dict[str, Tensor]) -> Any:
    def evaluate(model: nn.Module) -> np.ndarray:
        return model(**inputs).logits.float().flatten(1).std(1).numpy()

    return evaluate


def test_ablations_of_single_heads_and_of_all_but_one() -> None:
    model, inputs = bert()
    known = heads_of(model, lambda: model(**inputs))
    found = ablate_each(model, items(inputs), known)
    assert len(found.without) == 8
    table = found.table(known)
    head = known.all[3]
    with torch.no_grad(), masked_heads(model, known, [head]):
        assert table[0, 3] == pytest.approx(float(items(inputs)(model).mean() - found.full.mean()))
    assert all(isinstance(change, Change) for change in found.changes().values())
    assert by_drop(found, known).of(head) == pytest.approx(-table[0, 3])
    one = ablate_all_but_one(model, items(inputs), items(inputs), known, "self")
    assert [h.path for h in one.without] == [p.path for p in known.places]
    own = [h for h in known.all if h.path == known.places[0].path]
    alone = []
    for h in own:
        with torch.no_grad(), masked_heads(model, known, [o for o in own if o != h]):
            alone.append(float(items(inputs)(model).mean()))
    assert next(iter(one.without)).number == int(np.argmax(alone))


def test_orders_of_pruning() -> None:
    model, inputs = bert()
    importance = importance_of_heads(model, squared, [inputs])
    order = pruning_order(importance, by_place=False)
    values = [importance.of(head) for head in order]
    assert values == sorted(values)
    assert pruning_order(importance, "reverse", by_place=False)[0] == order[-1]
    assert set(pruning_order(importance, "random")) == set(order)
    assert pruning_order(importance, "random") != pruning_order(importance, "random", random_state=1)
    protected = pruning_order(importance, keep=1)
    assert len(protected) == 6
    for place, scores in zip(importance.known.places, importance.scores, strict=True):
        assert Head(place.path, int(scores.argmax())) not in protected


def test_greedy_pruning_ends_with_the_bias_of_each_layer() -> None:
    model, inputs = bert()
    before = model(**inputs).logits
    found = GreedyPruning(0.25).run(model, items(inputs), loss=squared, batches=[inputs])
    assert [step.share for step in found] == [0.0, 0.25, 0.5, 0.75, 1.0]
    known = heads_of(model, lambda: model(**inputs))
    assert set(found[-1].gone) == set(known.all)
    kept = GreedyPruning(0.5, keep=1).run(model, items(inputs), loss=squared, batches=[inputs])
    assert kept[-1].share == 0.75
    anew = GreedyPruning(0.5, reestimate=True).run(model, items(inputs), loss=squared, batches=[inputs], until=0.5)
    assert len(anew) == 2
    anew = GreedyPruning(0.25, reestimate=True, rescale=True).run(
        model, items(inputs), loss=squared, batches=[inputs], until=0.5
    )
    again = importance_of_heads(model, squared, [inputs], known=known, without=anew[1].gone)
    assert all(again.of(head) == 0 for head in anew[1].gone)
    assert torch.equal(model(**inputs).logits, before)
    # rounded down: no step is nearer to three tenths of eight heads
    third = GreedyPruning(0.1).run(model, items(inputs), loss=squared, batches=[inputs], until=0.3)
    assert [step.share for step in third] == [0.0, 0.125, 0.25]
    with pytest.raises(InputError, match="loss: give it, with batches"):
        GreedyPruning().run(model, items(inputs))
    with pytest.raises(InputError, match="step: expected a share"):
        GreedyPruning(0.0)
    for place in known.places:
        # the last step is what is left without attention's map
        bias = model.get_submodule(place.path.replace(".self", ".output.dense"))
        with torch.no_grad():
            bias.weight.zero_()  # type: ignore[operator]
    with torch.no_grad():
        assert np.allclose(items(inputs)(model), found[-1].items, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "gone"),
    [
        (bert, {0: [0, 2], 1: [0, 1, 2, 3]}),
        (llama, {0: [0, 1], 1: [1, 2]}),
        (whisper, {0: [1], 1: [0], 2: [0]}),
        (gpt2, {0: [1, 2], 1: [0]}),
    ],
)
def test_heads_really_gone_are_heads_at_zero(made: Any, gone: dict[int, list[int]], tmp_path: Path) -> None:
    model, inputs = made()
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    known = heads_of(model, lambda: model(**inputs))
    heads = [Head(known.places[place].path, n) for place, numbers in gone.items() for n in numbers]
    smaller = prune_heads(model, known, heads, inputs)
    with torch.no_grad():
        with masked_heads(model, known, heads):
            expected = model(**inputs).logits
        assert torch.allclose(smaller.model(**inputs).logits, expected, atol=1e-6)
        counts = [sum(p.numel() for p in m.parameters()) for m in (smaller.model, model)]
        assert counts[0] < counts[1]
        left = heads_of(smaller.model, lambda: smaller.model(**inputs))
        assert [h - len(set(gone.get(i, []))) or 1 for i, h in enumerate(known.heads)] == list(left.heads)
        smaller.save(tmp_path)
        fresh, _ = made()
        again = WithoutHeads.load(tmp_path, fresh.double())
        assert torch.equal(again.model(**inputs).logits, smaller.model(**inputs).logits)
        assert again.cuts == smaller.cuts
    assert seconds(lambda: smaller.model(**inputs), repeats=1) > 0


def test_groups_of_keys_stay_even_or_are_refused() -> None:
    model, inputs = llama()
    known = heads_of(model, lambda: model(**inputs))
    path = known.places[0].path
    with pytest.raises(InputError, match=r"mask them instead, or take whole groups of 2"):
        prune_heads(model, known, [Head(path, 0)], inputs)
    # a whole group takes its key head along, one of each group keeps them all
    whole = prune_heads(model, known, [Head(path, 2), Head(path, 3)], inputs)
    each = prune_heads(model, known, [Head(path, 0), Head(path, 3)], inputs)
    shapes = [m.model.get_submodule(f"{path}.k_proj").weight.shape[0] for m in (whole, each)]  # type: ignore
    assert shapes == [8, 16]
    out = [m.model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (whole, each)]  # type: ignore
    assert [o.shape for o in out] == [(1, 7), (1, 7)]
    with pytest.raises(InputError, match="heads: name at least one"):
        prune_heads(model, known, [], inputs)
    with pytest.raises(InputError, match="is in training mode"):
        prune_heads(model.train(), known, [Head(path, 2), Head(path, 3)], inputs)


class Fixed(nn.Module):
    """Attention that writes its outputs into a width that is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], 8))


class Blocks(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_heads_that_cannot_be_taken_out_are_refused(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8)
    model = Blocks(nn.Sequential(Fixed())).eval()
    known = heads_of(model, lambda: model(x))
    with pytest.raises(InputError, match=r"does not run without these heads .* they can be masked, not taken out"):
        prune_heads(model, known, [known.all[0]], {"x": x})
    with pytest.raises(InputError, match="name a folder that save wrote"):
        WithoutHeads.load(tmp_path, model)
    # of torch's own attention the maps are no modules
    model = Blocks(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        known = heads_of(model, lambda: model(x))
        with pytest.raises(InputError, match="model: "):
            prune_heads(model, known, [known.all[0]], {"x": x})
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_statistics_of_heads() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]]])
    found = statistics_of(weights, torch.tensor([[[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2]]))
    assert found.entropy.tolist() == pytest.approx([0.0, np.log(2)], abs=1e-6)
    assert found.divergence.diagonal().tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert float(found.divergence[0, 1]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(found.outputs) == pytest.approx(0.5)
    assert float(found.attention) == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    assert found.offset.tolist() == [0.0, 0.0]
    model, inputs = bert()
    before = model(**inputs).logits
    own = head_statistics(model, lambda batch: model(**batch), [inputs, inputs])
    assert torch.equal(model(**inputs).logits, before)
    assert len(own) == 2
    real = {name: value[1:, :2] for name, value in inputs.items()}
    padded = {name: value[1:] for name, value in inputs.items()}
    one, other = (head_statistics(model, lambda batch: model(**batch), [b]) for b in (real, padded))
    for path in one:
        for a, b in zip(one[path], other[path], strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(InputError, match="mask: expected"):
        statistics_of(weights, weights, torch.ones(1, 3, dtype=torch.bool))


def test_which_changes_are_none_of_chance() -> None:
    rng = np.random.default_rng(0)
    full = rng.random(200)
    worse = paired_bootstrap(full, full - 0.2 + 0.1 * rng.random(200))
    same = paired_bootstrap(full, full + rng.normal(scale=0.1, size=200))
    better = paired_bootstrap(full, full + 0.1)
    assert worse.difference < worse.high < 0
    assert worse.p < 0.01 < same.p
    assert significant([worse, same, better]) == (pytest.approx(2 / 3), 0.5)
    assert significant([same]).improving == 0.0
    with pytest.raises(InputError, match="without: expected"):
        paired_bootstrap(full, full[1:])
    with pytest.raises(InputError, match="changes: give at least one"):
        significant([])
    early, middle, last = (torch.tensor(v) for v in ([3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]))
    assert settled([early, middle, last])[1:] == (0.5, 1.0)
    with pytest.raises(InputError, match="checkpoints"):
        settled([])


def test_ablated_tables_have_room_for_places_with_fewer_heads() -> None:
    model, inputs = whisper()
    known = heads_of(model, lambda: model(**inputs))
    ablated = Ablated(np.zeros(2), {known.all[0]: np.ones(2)})
    assert np.isnan(ablated.table(known)).sum() == 5
