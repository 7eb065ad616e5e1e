"""Sensitivities against closed forms and derivatives, the greedy choice against loops, a model that is fed less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.compare.ranking import spearman
from cenote.core import InputError
from cenote.models.live import AttentionCall, AttentionEdit, edited
from cenote.models.live.entering import features_entering
from cenote.reduce import DiverseTokens, ZOOPrune, exact_sensitivity, losses_left_out, select, sensitivity
from cenote.testing import check_reducer
from tests.models.live import zoo

OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def directions(m: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(m, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def project() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)).double()


# sensitivity


def test_an_affine_map_is_as_sensitive_to_every_token() -> None:
    weight = numbers(5, 6)
    found = sensitivity(lambda x: x @ weight.T + 1.0, numbers(2, 7, 6), directions=9)
    assert (found == found[:, :1]).all()
    expected = (directions(9, 6) @ weight.double().T).norm(dim=-1).mean()
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("step", [1e-3, 1.0])
def test_a_quadratic_map_is_exact_for_any_step(step: float) -> None:
    x = numbers(1, 4, 6, dtype=torch.float64)
    found = sensitivity(torch.square, x, directions=8, step=step)
    expected = (2 * x[0][None] * directions(8, 6)[:, None]).norm(dim=-1).mean(0)
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=0)


def test_small_steps_give_products_with_the_jacobian(project: nn.Module) -> None:
    x = numbers(1, 4, 6, dtype=torch.float64)
    found = sensitivity(project, x, directions=8, step=1e-4)
    products = [torch.func.jvp(project, (x[0],), (u.expand(4, 6),))[1].norm(dim=-1) for u in directions(8, 6)]
    torch.testing.assert_close(found[0], torch.stack(products).mean(0), rtol=1e-3, atol=0)


def test_mean_squares_converge_to_the_jacobians_norm(project: nn.Module) -> None:
    x = numbers(1, 5, 6, dtype=torch.float64)
    exact = exact_sensitivity(project, x)
    jacobian = torch.func.vmap(torch.func.jacrev(project))(x[0])
    torch.testing.assert_close(exact[0], jacobian.flatten(1).norm(dim=-1))

    def off(m: int) -> float:
        return float((sensitivity(project, x, directions=m, mean="squares").sqrt() / exact - 1).abs().max())

    assert off(20_000) < 0.02 < off(20)


def test_relative_steps_are_of_the_features_size(project: nn.Module) -> None:
    x = numbers(1, 4, 6, dtype=torch.float64)
    power = x.square().mean().sqrt()
    torch.testing.assert_close(
        sensitivity(project, x, step=0.1, relative=True), sensitivity(project, x, step=0.1 * float(power))
    )


def test_chunks_padding_and_half_precision_change_nothing(project: nn.Module) -> None:
    project.float()
    x, mask = numbers(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    whole = sensitivity(project, x, mask=mask)
    torch.testing.assert_close(sensitivity(project, x, mask=mask, rows=1), whole)
    torch.testing.assert_close(sensitivity(project, x[1:, :3])[0], whole[1, :3])
    assert not whole[~mask].any()
    half = x.half()
    small = sensitivity(project.half(), half, step=1e-4)
    assert small.dtype == torch.float32
    torch.testing.assert_close(small, sensitivity(project.float(), half.float(), step=1e-4))
    assert len(small[0].unique()) > 1


def test_a_patch_merger_is_pushed_by_its_groups() -> None:
    merger = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").Qwen2_5_VLPatchMerger
    torch.manual_seed(0)
    merge = merger(dim=5, context_dim=3, spatial_merge_size=2).eval()
    x = numbers(1, 8, 3)
    found = sensitivity(merge, x, directions=6, group=4)
    assert found.shape == (1, 2)
    u = directions(6, 12).float().view(6, 4, 3)
    moved = [(merge(x[0, :4] + 0.01 * v) - merge(x[0, :4] - 0.01 * v)).norm() / 0.02 for v in u]
    torch.testing.assert_close(found[0, 0], torch.stack(moved).mean(), rtol=1e-3, atol=0)
    with pytest.raises(InputError, match="group: 7 tokens cannot be put together by 4"):
        sensitivity(merge, x[:, :7], group=4)


def test_the_order_of_tokens_is_theirs(project: nn.Module) -> None:
    x = numbers(1, 6, 6, dtype=torch.float64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(sensitivity(project, x[:, order]), sensitivity(project, x)[:, order])


# the choice


def greedy(s: Tensor, z: Tensor, k: int) -> list[int]:
    """By two loops."""
    spread = float(s.max() - s.min())
    scaled = [(float(v) - float(s.min())) / spread for v in s]
    chosen = [max(range(len(s)), key=lambda i: (scaled[i], -i))]
    while len(chosen) < k:

        def score(i: int) -> float:
            return scaled[i] * (1 - max(float(nn.functional.cosine_similarity(z[i], z[j], dim=0)) for j in chosen))

        chosen.append(max((i for i in range(len(s)) if i not in chosen), key=lambda i: (score(i), -i)))
    return chosen


def test_the_choice_is_that_of_two_loops() -> None:
    for seed in range(5):
        s, z = numbers(1, 9, seed=seed, dtype=torch.float64).exp(), numbers(1, 9, 4, seed=seed + 9, dtype=torch.float64)
        assert select(s, z, torch.tensor([7]))[0].tolist() == greedy(s[0], z[0], 7)


def test_of_two_groups_of_duplicates_one_each() -> None:
    z = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 2.0]] * 3])
    found = select(torch.tensor([[5.0, 4.0, 4.0, 1.0, 2.0, 1.5]]), z, torch.tensor([2]))
    assert found.tolist() == [[0, 4]]


def test_a_factor_changes_nothing(project: nn.Module) -> None:
    x = numbers(1, 9, 6, dtype=torch.float64)
    once, twice = sensitivity(project, x), sensitivity(lambda y: 4.0 * project(y), x)
    torch.testing.assert_close(twice, 4 * once)
    z = project(x).detach()
    assert torch.equal(select(once, z, torch.tensor([5])), select(twice, 4 * z, torch.tensor([5])))


def test_all_of_a_set_is_all_of_it_once() -> None:
    s, z = numbers(2, 6).exp(), numbers(2, 6, 3, seed=1)
    for rule in ("product", "sum", "sensitivity", "diversity"):
        found = select(s, z, torch.tensor([9, 6]), rule=rule)
        assert found.sort(dim=1).values.tolist() == [list(range(6))] * 2


def test_equal_sensitivities_leave_diversity_alone() -> None:
    z = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0]]])
    assert select(torch.full((1, 4), 0.3), z, torch.tensor([3])).tolist() == [[0, 2, 3]]


def test_of_products_that_are_all_zero_the_highest_then_the_lowest_number_and_duplicates_last() -> None:
    z = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2 + [[-1.0, 0.1]]])
    # behind 0: 1 and 2 are its duplicates; 3, 4, 5 are not, and the least sensitive
    found = select(torch.tensor([[9.0, 2.0, 5.0, 1.0, 1.0, 1.0]]), z, torch.tensor([6]))
    assert found.tolist() == [[0, 3, 5, 2, 1, 4]]


def test_padding_is_never_chosen_and_sets_no_scale() -> None:
    s, z = numbers(1, 6).exp(), numbers(1, 6, 3, seed=1)
    padded = torch.cat([torch.full((1, 2), 99.0), s], 1), torch.cat([numbers(1, 2, 3, seed=2), z], 1)
    mask = torch.tensor([[False, False] + [True] * 6])
    alone = select(s, z, torch.tensor([4]))
    assert torch.equal(select(*padded, torch.tensor([4]), mask), alone + 2)
    assert select(s, z, torch.tensor([9]), torch.zeros(1, 6, dtype=torch.bool)).shape == (1, 0)


def test_diversity_alone_takes_the_farthest() -> None:
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.05], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]]])
    assert select(torch.ones(1, 5), z, torch.tensor([3]), rule="diversity")[0, 0] == 4
    assert select(torch.ones(1, 5), z, torch.tensor([1]), rule="sensitivity").tolist() == [[0]]


# reducers


def test_reducers_keep_the_contract() -> None:
    torch.manual_seed(0)
    maps: list[Callable[[Tensor], Tensor]] = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)), torch.tanh]
    for project in maps:
        check_reducer(ZOOPrune(project, factor=3, directions=4))
    check_reducer(DiverseTokens(factor=3))


def test_the_map_is_no_part_of_the_reducer(project: nn.Module) -> None:
    assert not list(ZOOPrune(project, tokens=2).parameters())


def test_the_rank_correlation_with_the_exact_norm_is_one_for_a_diagonal_map() -> None:
    x = numbers(1, 12, 1, dtype=torch.float64)
    found, exact = sensitivity(lambda y: y**3, x, step=1e-4)[0], exact_sensitivity(lambda y: y**3, x)[0]
    assert spearman(found.numpy(), exact.numpy()) == pytest.approx(1.0)
    assert spearman(-found.numpy(), exact.numpy()) == pytest.approx(-1.0)


def test_losses_of_tokens_that_are_left_out() -> None:
    worth = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]])
    span = torch.tensor([[True, False, True], [False, False, True]])
    found = losses_left_out(lambda kept: -(worth * kept).sum(1), span)
    assert found.tolist() == [[1.0, 0.0, 4.0], [0.0, 0.0, 7.0]]


# in a model


@pytest.fixture
def llava() -> tuple[Any, dict[str, Tensor], Tensor]:
    case = zoo.llava("sdpa")
    return case.model, case.inputs, case.inputs["input_ids"] == 39


class Hiding(AttentionEdit):
    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def inputs(self, call: AttentionCall) -> AttentionCall:
        if "language" not in call.place.stack:
            return call
        before = call.readable()
        keep = nn.functional.pad(self.keep, (0, call.keys - self.keep.shape[1]), value=True)[:, None, None]
        return call.replace(allowed=lambda rows: keep if before is None else before & keep)


def test_all_tokens_are_the_model_itself(llava: Any) -> None:
    model, inputs, image = llava
    plain = model(**inputs).logits
    with ZOOPrune(model.model.multi_modal_projector, fraction=1.0).on(model, image):
        assert torch.equal(model(**inputs).logits, plain)
    with (
        pytest.raises(RuntimeError, match="no"),
        ZOOPrune(model.model.multi_modal_projector, tokens=3).on(model, image),
    ):
        raise RuntimeError("no")
    assert torch.equal(model(**inputs).logits, plain)


def test_decoding_goes_on_from_the_short_cache_as_if_the_others_were_hidden(llava: Any) -> None:
    model, inputs, image = llava
    prompt = image.shape[1]
    with torch.no_grad(), ZOOPrune(model.model.multi_modal_projector, tokens=5).on(model, image) as entered:
        short = model.generate(**inputs, **OPTIONS)
    assert entered.kept is not None
    assert entered.kept.sum(1).tolist() == [prompt - 11] * 2
    assert entered.kept[~image].all()
    assert {layer.keys.shape[2] for layer in short.past_key_values.layers} == {prompt - 11 + 3}
    with torch.no_grad(), edited(model, Hiding(entered.kept)):
        whole = model.generate(**inputs, **OPTIONS)
    assert torch.equal(short.sequences, whole.sequences)
    for ours, theirs in zip(short.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # without a cache: the tokens that are left, and all so far
    with torch.no_grad(), edited(model, Hiding(entered.kept)):
        again = model(input_ids=short.sequences[:, :-1], pixel_values=inputs["pixel_values"], use_cache=False).logits[
            :, -1
        ]
    torch.testing.assert_close(again, short.logits[-1], rtol=1e-4, atol=1e-5)


def test_what_enters_is_what_the_reducer_chooses_of_the_features(llava: Any) -> None:
    model, inputs, image = llava
    projector = model.model.multi_modal_projector
    seen: list[Tensor] = []
    handle = projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    reducer = ZOOPrune(projector, tokens=5)
    with torch.no_grad(), reducer.on(model, image) as entered:
        model(**inputs)
    handle.remove()
    assert entered.rows is not None
    assert torch.equal(entered.rows, reducer(seen[0]).assignment >= 0)
    assert entered.kept is not None
    assert torch.equal(entered.kept[image].view(2, -1), entered.rows)


def test_padded_prompts_of_other_numbers_of_tokens_are_each_as_alone(llava: Any) -> None:
    model, inputs, _ = llava
    words = torch.cat([torch.zeros(2, 2, dtype=torch.long), inputs["input_ids"]], 1)
    words[1, :2] = 7
    mask = torch.ones_like(words)
    mask[0, :2] = 0
    span = words == 39
    counts = torch.tensor([3, 6])

    def uneven(x: Tensor, z: Tensor) -> Tensor:
        return torch.arange(z.shape[1]) % 2 < (torch.arange(z.shape[1]) < 2 * counts[:, None])

    projector = model.model.multi_modal_projector
    with torch.no_grad(), features_entering(model, projector, uneven, span) as entered:
        both = model.generate(input_ids=words, attention_mask=mask, pixel_values=inputs["pixel_values"], **OPTIONS)
    assert entered.kept is not None
    with torch.no_grad(), edited(model, Hiding(entered.kept)):
        whole = model.generate(input_ids=words, attention_mask=mask, pixel_values=inputs["pixel_values"], **OPTIONS)
    for ours, theirs in zip(both.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_says_so(llava: Any) -> None:
    model, inputs, image = llava
    projector = model.model.multi_modal_projector
    with (
        pytest.raises(InputError, match="project: Linear is no module of"),
        ZOOPrune(nn.Linear(2, 2), tokens=1).on(model, image),
    ):
        pass
    with pytest.raises(InputError, match="image: expected bool"), ZOOPrune(projector, tokens=1).on(model, image.long()):
        pass
    with (
        pytest.raises(InputError, match="image: has 30 places"),
        ZOOPrune(projector, tokens=1).on(model, image.roll(1, 1) & image),
    ):
        model(**inputs)
    with (
        pytest.raises(InputError, match="project: expected the model's own"),
        ZOOPrune(torch.tanh, tokens=1).on(model, image),
    ):
        pass
    with pytest.raises(InputError, match="rule: expected"):
        ZOOPrune(projector, tokens=1, rule="both")  # type: ignore[arg-type]
