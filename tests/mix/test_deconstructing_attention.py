"""Forms of attention that lack one principle each, the decoder made of them, and the statistics of its maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.deconstructing_attention.decoder import (
    SIZES,
    VARIANTS,
    MixedDecoder,
    MixedDecoding,
    Variant,
    layout,
    train_decoder,
    without_layers,
)
from cenote.mix.deconstructing_attention.forms import (
    CausalForm,
    DotProductForm,
    GatedMLPForm,
    RunningForm,
    SilentForm,
    TaylorForm,
)
from cenote.mix.deconstructing_attention.indicators import indicators, scaled_for_plots
from cenote.mix.deconstructing_attention.running import (
    RunningMean,
    linear_attention,
    running_softmax,
    taylor_joint,
    taylor_literal,
)
from cenote.testing import check_mixer

FORMS = [DotProductForm, TaylorForm, RunningForm, GatedMLPForm, SilentForm]
FIXED = torch.arange(40) % 11


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(*variants: Variant, longest: int = 12) -> MixedDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MixedDecoder(11, variants, dim=12, heads=2, inner=20, longest=longest, text=FIXED).double()
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_form_keeps_the_contract_of_mixers(form: type[CausalForm]) -> None:
    check_mixer(form(8, 2), leave_out=["export", "gradients"] if form is SilentForm else ["export"])


def test_a_running_softmax_is_the_sum_over_all_before() -> None:
    scores, v = 3 * randn(2, 3, 13), randn(2, 3, 13, 4, seed=1)
    found, state = running_softmax(scores, v)
    weights = scores.unsqueeze(2).expand(-1, -1, 13, -1).tril().exp().tril()
    expected = (weights / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(found, expected)
    half, between = running_softmax(scores[..., :5], v[:, :, :5])
    rest, end = running_softmax(scores[..., 5:], v[:, :, 5:], before=between)
    torch.testing.assert_close(torch.cat([half, rest], 2), found)
    torch.testing.assert_close(end.mean, state.mean)
    assert isinstance(end, RunningMean)


def test_large_scores_stay_finite() -> None:
    scores = torch.tensor([[[800.0, -900.0, 5000.0, 5000.0]]]).requires_grad_()
    v = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 1, 4, 1).requires_grad_()
    found, _ = running_softmax(scores, v)
    assert found.flatten().tolist() == [1.0, 1.0, 3.0, 4.0]
    for gradient in torch.autograd.grad(found.sum(), (scores, v)):
        assert bool(gradient.isfinite().all())
    half, _ = running_softmax(scores.detach().bfloat16(), v.detach().bfloat16())
    assert half.flatten().tolist() == [1.0, 1.0, 3.0, 4.0]


def test_sums_in_chunks_are_sums_over_pairs() -> None:
    q, k, v = (randn(2, 2, 21, 3, seed=i) for i in range(3))
    for chunk in (1, 4, 64):
        total, mass, _ = linear_attention(q, k, v, lambda x: x.square(), chunk=chunk)
        pairs = (q.square() @ k.square().mT).tril()
        torch.testing.assert_close(total, pairs @ v)
        torch.testing.assert_close(mass, pairs.sum(-1))


def test_the_joint_expansion_comes_near_softmax_as_scores_get_small() -> None:
    q, k, v = (randn(1, 1, 16, 4, seed=i) for i in range(3))
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    errors = []
    for size in (0.1, 0.05):
        exact = ((size * q @ k.mT) / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        errors.append(float((taylor_joint(size * q, k, v)[0] - exact).abs().max()))
    # the order of the error: half the score, an eighth of it
    assert errors[0] / errors[1] > 6.5
    x = torch.linspace(-9, 9, 101)
    assert float((1 + x + x.square() / 2).min()) >= 0.5


def test_expansions_go_on_from_a_state() -> None:
    q, k, v = (randn(1, 2, 9, 3, seed=i) for i in range(3))
    for form in (taylor_joint, taylor_literal):
        whole, _ = form(q, k, v)  # type: ignore[operator]
        first, state = form(q[:, :, :4], k[:, :, :4], v[:, :, :4])  # type: ignore[operator]
        rest, _ = form(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], before=state)  # type: ignore[operator]
        torch.testing.assert_close(torch.cat([first, rest], 2), whole)


def test_without_queries_the_running_form_is_the_running_mean() -> None:
    form, x = RunningForm(8, 2).double(), randn(1, 6, 8)
    with torch.no_grad():
        form.q.weight.zero_()
    values, out = form.values_of(x)
    mean = values.cumsum(2) / torch.arange(1, 7).view(-1, 1)
    torch.testing.assert_close(form(x), out(mean.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("form", [DotProductForm, TaylorForm, RunningForm])
def test_the_first_token_takes_its_own_value(form: type[CausalForm]) -> None:
    layer, x = form(8, 2).double(), randn(1, 6, 8)
    values, out = layer.values_of(x)  # type: ignore[operator]
    torch.testing.assert_close(layer(x)[:, 0], out(values[:, :, 0].flatten(1)))


def test_the_perceptron_mixes_nothing() -> None:
    form, x = GatedMLPForm(9).double(), randn(1, 6, 9)
    order = torch.tensor([2, 0, 5, 1, 4, 3])
    torch.testing.assert_close(form(x[:, order]), form(x)[:, order], atol=0, rtol=0)


def test_all_forms_have_the_parameters_of_attention() -> None:
    sizes = {form: sum(p.numel() for p in form(12, 2).parameters()) for form in FORMS[:-1]}
    assert set(sizes.values()) == {4 * 12**2}
    counts = {sum(p.numel() for p in decoder(*layout("even", v, 4)).parameters()) for v in VARIANTS[:-1]}
    assert len(counts) == 1


def test_the_form_without_mixing_is_as_near_to_attention_as_a_whole_width_can_be() -> None:
    for dim, _, heads, _ in SIZES.values():
        with torch.device("meta"):
            own, attention = (
                sum(p.numel() for p in form(dim, heads).parameters()) for form in (GatedMLPForm, DotProductForm)
            )
        assert own - attention == {512: 512, 768: 0, 896: 896, 2048: 2048}[dim]


@pytest.mark.parametrize("form", [DotProductForm, TaylorForm])
def test_heads_of_an_odd_width_are_turned_by_no_position(form: type[DotProductForm | TaylorForm]) -> None:
    with pytest.raises(InputError, match="heads are 3 wide"):
        form(6, 2)
    assert form(6, 2, rope=False)(torch.zeros(1, 2, 6)).shape == (1, 2, 6)


def test_sizes_by_name() -> None:
    least = {"70M": 65e6, "160M": 150e6, "500M": 450e6, "1.7B": 1.7e9}
    for size, (dim, layers, _, inner) in SIZES.items():
        count = layers * (4 * dim**2 + 3 * dim * inner) + 2 * 50304 * dim
        assert least[size] < count < 1.25 * least[size] + 5e6
    with torch.device("meta"):
        model = MixedDecoder.of_size("70M", 50304, "even", "nonapprox", tied=False, longest=4)
    norms = 13 * 512
    assert sum(p.numel() for p in model.parameters()) == 6 * (4 * 512**2 + 3 * 512 * 2048) + 2 * 50304 * 512 + norms


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["uniform", "even"])
def test_decoding_is_reading_whole(variant: Variant, name: str) -> None:
    model = decoder(*layout(name, variant, 3))  # type: ignore[arg-type]
    tokens = torch.arange(14).view(2, 7) % 11
    with torch.no_grad():
        whole = model(tokens)
    decoding = MixedDecoding(model, 9)
    pieces = [decoding.step(tokens[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert decoding.read == 7
    with pytest.raises(InputError, match="longest"):
        decoding.step(tokens[:, :3])


def test_no_token_is_told_of_a_later_one() -> None:
    tokens = torch.arange(14).view(2, 7) % 11
    other = torch.cat([tokens[:, :4], 10 - tokens[:, 4:]], 1)
    model = decoder(*VARIANTS[:-1])
    torch.testing.assert_close(model(tokens)[:, :4], model(other)[:, :4])


def test_fixed_maps_are_the_same_for_all_inputs_to_the_bit() -> None:
    model = decoder("standard", "rndembqk", "fixedseqqk", "staticembqk")
    one, two = (torch.arange(7).add(i).remainder(11).unsqueeze(0) for i in (0, 3))
    first, second = model.maps(one), model.maps(two)
    for layer, same in enumerate((False, True, True, False)):
        a, b = first[layer], second[layer]
        assert a is not None
        assert b is not None
        assert torch.equal(a, b) == same


def test_maps_of_static_embeddings_do_not_depend_on_the_stream() -> None:
    model = decoder("mlp", "staticembqk")
    tokens = torch.arange(7).unsqueeze(0)
    before = model.maps(tokens)[1]
    with torch.no_grad():
        model.blocks[0].form.down.weight.mul_(5)  # type: ignore[union-attr, operator]
    after = model.maps(tokens)[1]
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_gradients_pass_through_fixed_streams() -> None:
    model = decoder("mlp", "fixedseqqk", "rndembqk")
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    unused = model.embedding.weight.grad
    assert unused is not None
    # the fixed text alone has these tokens
    assert bool((unused.abs().sum(-1) > 0).all())
    assert not any(name == "table" for name, _ in model.named_parameters())


def test_a_model_without_some_layers_is_the_model_of_the_others() -> None:
    model = decoder(*layout("even", "nonapprox", 4))
    tokens = torch.tensor([[1, 2, 3]])
    shorter = without_layers(model, (0, 2))
    assert shorter.variants == ("standard", "standard")
    assert len(model.blocks) == 4
    other = decoder("standard", "standard")
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("blocks")}
    for i, block in enumerate((1, 3)):
        state |= {f"blocks.{i}.{n}": v for n, v in model.blocks[block].state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(shorter(tokens), other(tokens))
    with pytest.raises(InputError, match="layers"):
        without_layers(model, range(4))


def test_layouts() -> None:
    where = {
        name: [i for i, v in enumerate(layout(name, "mlp", 8)) if v == "standard"]  # type: ignore[arg-type]
        for name in ("uniform", "even", "odd", "top", "middle", "bottom", "quarter", "first", "last", "ends")
    }
    assert where == {
        "uniform": [],
        "even": [1, 3, 5, 7],
        "odd": [0, 2, 4, 6],
        "top": [4, 5, 6, 7],
        "middle": [2, 3, 4, 5],
        "bottom": [0, 1, 2, 3],
        "quarter": [3, 7],
        "first": [0],
        "last": [7],
        "ends": [0, 7],
    }


def test_training_learns_a_text_that_repeats() -> None:
    text = torch.arange(200) % 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixedDecoder(5, layout("even", "nonapprox", 2), dim=12, heads=2, inner=16)
    losses = train_decoder(model, text, steps=40, batch=4, length=12, learning_rate=2e-2, warm_up=5)
    assert losses[0] > 1.5
    assert losses[-1] < 0.3
    with pytest.raises(InputError, match="text"):
        train_decoder(model, text[:4], steps=1, length=12)


def test_indicators_of_uniform_and_of_one_hot_maps() -> None:
    n = 6
    uniform = torch.ones(2, n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1).view(-1, 1)
    found = indicators(uniform)
    torch.testing.assert_close(found.entropy, torch.full((2,), sum(math.log(i) for i in range(1, n + 1))).double())
    torch.testing.assert_close(found.sink, torch.full((2,), sum(1 / i for i in range(1, n + 1)) / n).double())
    assert float(found.head_diversity) == 0
    one_hot = torch.eye(n, dtype=torch.float64).expand(2, -1, -1)
    found = indicators(one_hot)
    assert found.entropy.tolist() == [0.0, 0.0]
    torch.testing.assert_close(found.concentration, torch.full((2,), math.sqrt(n)).double())
    assert found.local_focus[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert indicators(torch.ones(1, 1, 1)).local_focus.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    differing = torch.stack([uniform[0], one_hot[0]])
    expected = (uniform[0] - one_hot[0]).abs().sum() / 2 * 2 / (n * (n + 1))
    torch.testing.assert_close(indicators(differing).head_diversity, expected)
    assert set(found.means()) >= {"entropy", "sink", "local_focus_3"}
    with pytest.raises(InputError, match="maps"):
        indicators(torch.ones(1, 2, 3))
    assert scaled_for_plots(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_maps_of_a_decoder_have_rows_that_sum_to_one() -> None:
    for weights in decoder("standard", "nonapprox", "staticembqk").maps(torch.arange(7).unsqueeze(0)):
        assert weights is not None
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 7, dtype=torch.float64))


def test_what_does_not_fit_is_named() -> None:
    for call, said in (
        (lambda: MixedDecoder(5, ("fixedseqqk",), dim=4, heads=2, longest=8), "text"),
        (lambda: MixedDecoder(5, ("softmax",), dim=4, heads=2), "variants"),  # type: ignore[arg-type]
        (lambda: layout("left", "mlp", 3), "name"),  # type: ignore[arg-type]
        (lambda: decoder("rndembqk", longest=4)(torch.zeros(1, 5, dtype=torch.long)), "fixed streams"),
        (lambda: MixedDecoding(decoder("mlp").train(), 4), "eval mode"),
        (lambda: DotProductForm(6, 2), "rope"),
    ):
        with pytest.raises(InputError, match=said):
            call()
