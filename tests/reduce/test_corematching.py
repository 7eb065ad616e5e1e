"""Core neurons and core tokens: counts by hand, elbows by rule, a model that goes on with fewer of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.models.live import AttentionCall, AttentionEdit, Where, edited, recorded
from cenote.reduce import Budget, CoreMatching, ElbowTokens
from cenote.reduce.corematching import matching as m
from cenote.testing import check_reducer
from tests.models.live import zoo

STACK = "model.language_model.layers"
OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# neurons


def by_hand(a: Tensor, share: float, token_share: float) -> set[int]:
    """One item, `[tokens, neurons]`, by loops."""
    counts = [0] * a.shape[1]
    for token in a.tolist():
        positive = sorted((n for n, v in enumerate(token) if v > 0), key=lambda n, t=token: (-t[n], n))
        for n in positive[: int(round(token_share * len(positive), 9))]:
            counts[n] += 1
    order = sorted((n for n, c in enumerate(counts) if c), key=lambda n: (-counts[n], n))
    return set(order[: int(round(share * a.shape[1], 9))])


@pytest.mark.parametrize(("share", "token_share"), [(0.4, 0.2), (0.29, 0.5), (1.0, 1.0), (0.1, 1.0)])
def test_core_neurons_by_loops(share: float, token_share: float) -> None:
    a = (numbers(3, 7, 20) * 2).round() / 2  # with ties and zeros
    found = m.core_neurons(a, share, token_share)
    for item, row in zip(a, found, strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == by_hand(item, share, token_share)


def test_padding_and_batch_mates_change_no_neuron() -> None:
    a = numbers(1, 6, 20)
    padded = torch.cat([torch.nn.functional.pad(a, (0, 0, 3, 0), value=9.0), numbers(1, 9, 20, seed=1)])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    assert torch.equal(m.core_neurons(padded, mask=mask)[0], m.core_neurons(a)[0])


def test_one_limit_for_all_tokens_is_that_of_the_mean() -> None:
    a = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [1.0, -1.0, -1.0, -1.0]]])
    # (4 + 1) / 2 = 2.5 positive ones, of which .8 are two
    assert m.core_neurons(a, 1.0, 0.8, one_limit=True).tolist() == [[True, True, False, False]]
    assert m.core_neurons(a, 1.0, 0.8).tolist() == [[True, True, True, False]]


def test_with_all_neurons_the_overlap_is_how_many_are_active() -> None:
    a = numbers(2, 5, 12)
    assert torch.equal(m.matching(a, m.core_neurons(a, 1.0, 1.0)), (a > 0).sum(-1).int())


def test_positive_factors_change_nothing_and_equal_tokens_score_alike() -> None:
    a = numbers(1, 6, 30)
    a[0, 4] = a[0, 1]
    core = m.core_neurons(a)
    scores = m.matching(a, core)
    assert scores.dtype == torch.int32
    assert scores[0, 4] == scores[0, 1]
    factors = torch.rand(1, 6, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(m.matching(a * factors, core), scores)
    assert torch.equal(m.core_neurons(a * 3.0), core)


def test_exact_zeros_are_not_active() -> None:
    a = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 2.0, 3.0]]])
    core = m.core_neurons(a, 1.0, 1.0)
    assert core.tolist() == [[False, True, True]]
    assert m.matching(a, core).tolist() == [[1, 2]]


def test_the_token_that_the_release_matches_with_counts_real_ones_from_the_end() -> None:
    a = numbers(2, 8, 6)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 6:] = False
    found = m.token_neurons(a, -5, mask)
    assert torch.equal(found, torch.stack([a[0, 1] > 0, a[1, 3] > 0]))
    with pytest.raises(InputError, match=r"number: -9 is no token of an item of 8 tokens"):
        m.token_neurons(a, -9)


@pytest.mark.parametrize(("name", "given"), [("share", {"share": 0.0}), ("token_share", {"token_share": 1.5})])
def test_shares_are_shares(name: str, given: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{name}: expected a share above 0"):
        m.core_neurons(numbers(1, 2, 3), **given)


# elbows


def test_a_step_has_its_elbow_at_the_step() -> None:
    scores = torch.tensor([[9, 9, 9, 9, 1, 1, 1, 1, 1, 1]])
    assert m.elbow(scores).tolist() == [1.0]
    assert m.above_elbow(scores, strict=True)[0].sum() == 4
    assert m.above_elbow(torch.tensor([[9, 9, 9, 8, 1, 0, 0]]))[0].tolist() == [True] * 4 + [False] * 3


def test_elbows_are_the_points_farthest_from_the_chord() -> None:
    for seed in range(20):
        scores = (numbers(1, 40, seed=seed).exp() * 10).round()
        falling = sorted(scores[0].tolist(), reverse=True)
        end = complex(39, falling[-1] - falling[0])
        # the part of each point that is turned away from the chord
        apart = [abs((complex(i, y - falling[0]) * end.conjugate() / abs(end)).imag) for i, y in enumerate(falling)]
        assert m.elbow(scores).item() == falling[apart.index(max(apart))]


def test_equal_scores_keep_all_and_so_do_fewer_than_three() -> None:
    for strict in (False, True):
        assert m.above_elbow(torch.full((1, 5), 3), strict=strict).all()
        assert m.above_elbow(torch.tensor([[9, 1]]), strict=strict).all()


def test_padding_has_no_elbow() -> None:
    scores = torch.tensor([[9.0, 100.0, 1.0, 1.0, 9.0, 0.0], [9.0, 9.0, 1.0, 1.0, 0.0, 5.0]])
    mask = torch.tensor([[True, False, True, True, True, True], [True] * 5 + [False]])
    assert torch.equal(m.elbow(scores, mask)[0], m.elbow(torch.tensor([[9.0, 1.0, 1.0, 9.0, 0.0]]))[0])
    kept = m.above_elbow(scores, mask)
    assert not kept[~mask].any()
    assert torch.equal(kept[1, :5], m.above_elbow(scores[1:, :5])[0])
    assert m.elbow(torch.zeros(1, 0)).isnan().all()


def test_a_minimum_is_kept() -> None:
    scores = torch.tensor([[9, 1, 1, 0, 0, 0]])
    assert m.above_elbow(scores, strict=True).sum() == 1
    assert m.above_elbow(scores, strict=True, minimum=3)[0].tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("strict", [False, True])
def test_tokens_above_the_elbow_keep_the_contract(strict: bool) -> None:
    with torch.enable_grad():
        check_reducer(ElbowTokens(strict=strict))


# measures


def test_contributions_sum_to_the_length_of_the_output() -> None:
    weights, values = numbers(2, 3, 7).softmax(-1), numbers(2, 3, 7, 4, seed=1)
    found = m.projections(weights, values)
    out = (weights[..., None] * values).sum(-2)
    torch.testing.assert_close(found.sum(-1), out.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(values, out[..., None, :], dim=-1)
    torch.testing.assert_close(found, weights * values.norm(dim=-1) * cosine)
    assert not m.projections(torch.ones(1, 2), torch.tensor([[[1.0], [-1.0]]])).any()


def test_contributions_in_a_running_model_sum_to_the_heads_outputs() -> None:
    case = zoo.llava("sdpa")
    at = Where(blocks=[1], stack=STACK)
    with recorded(case.model, "rows", "inputs", "heads", at=at) as found:
        case.model(**case.inputs)
    ((place, (rows,)),) = found["rows"].items()
    values = found["inputs"][place][0].v.repeat_interleave(2, 1)
    total = m.projections(rows[:, :, 0], values).sum(-1)
    torch.testing.assert_close(total, found["heads"][place][0][:, :, -1].norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_share_on_the_object_by_hand() -> None:
    kept = torch.tensor([[True, True, True, False], [False] * 4])
    on_object = torch.tensor([[True, False, True, True], [True] * 4])
    shares, areas = m.object_share(kept, on_object)
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 0.0]))
    assert areas.tolist() == [0.75, 1.0]


# in a model


@pytest.fixture
def llava() -> tuple[Any, dict[str, Tensor], Tensor]:
    case = zoo.llava("sdpa")
    return case.model, case.inputs, case.inputs["input_ids"] == 39


class Hiding(AttentionEdit):
    """Keys that nothing may read in these places, `[batch, tokens]`."""

    def __init__(self, keep: Tensor, at: Where) -> None:
        self.keep, self.at = keep, at

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before = call.readable()
        keep = torch.nn.functional.pad(self.keep, (0, call.keys - self.keep.shape[1]), value=True)[:, None, None]
        return call.replace(allowed=lambda rows: keep if before is None else before & keep)


def test_the_prompt_is_shorter_behind_the_block_and_decodes_as_if_the_rest_was_hidden(llava: Any) -> None:
    model, inputs, image = llava
    core = CoreMatching(0, image, stack=STACK, keep=Budget(tokens=5))
    with edited(model, core):
        short = model.generate(**inputs, **OPTIONS)
    prompt = inputs["input_ids"].shape[1]
    assert core.kept[0].sum(1).tolist() == [prompt - 11] * 2
    assert core.kept[0][~image].all()
    # three tokens are decoded with the cache: the last one is never read
    layers = short.past_key_values.layers
    assert [layer.keys.shape[2] for layer in layers] == [prompt + 3, *[prompt + 3 - 11] * (len(layers) - 1)]
    with edited(model, Hiding(core.kept[0], Where(blocks=range(1, len(layers)), stack=STACK))):
        whole = model.generate(**inputs, **OPTIONS)
    assert torch.equal(short.sequences, whole.sequences)
    for ours, theirs in zip(short.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_by_the_elbow_each_item_keeps_its_own_number(llava: Any) -> None:
    model, inputs, image = llava
    core = CoreMatching(1, image, stack=STACK)
    with edited(model, core):
        together = model(**inputs).logits[:, -1]
    for item in range(2):
        alone = CoreMatching(1, image[item : item + 1], stack=STACK)
        with edited(model, alone):
            one = model(**{name: x[item : item + 1] for name, x in inputs.items()}).logits[:, -1]
        assert torch.equal(alone.kept[1][0], core.kept[1][item])
        torch.testing.assert_close(one[0], together[item], rtol=1e-4, atol=1e-5)
    expected = m.above_elbow(core.scores[1], image) | ~image
    assert torch.equal(core.kept[1], expected)


def test_keeping_all_is_the_model_itself_and_it_is_as_it_was_after_an_exception(llava: Any) -> None:
    model, inputs, image = llava
    plain = model(**inputs).logits
    with edited(model, CoreMatching(0, image, stack=STACK, keep=Budget(fraction=1.0))):
        assert torch.equal(model(**inputs).logits, plain)
    core = CoreMatching(0, image, stack=STACK, neurons=range(3))
    with pytest.raises(ValueError, match="no_such"), edited(model, core):
        model.generate(**inputs, no_such=1)
    assert torch.equal(model(**inputs).logits, plain)


def test_core_neurons_decode_behind_core_tokens(llava: Any) -> None:
    model, inputs, image = llava
    core = CoreMatching(0, image, stack=STACK, keep=Budget(tokens=5), neurons=[1, 2], share=0.25)
    with edited(model, core) as run:
        model.generate(**inputs, **OPTIONS)
    assert sorted(core.core) == [1, 2]
    assert [int(chosen.sum(1).max()) for chosen in core.core.values()] == [12, 12]
    assert {place.block for place, step in run.effect if step} == {1, 2}


def test_all_neurons_of_all_blocks_change_no_token(llava: Any) -> None:
    model, inputs, _ = llava
    whole = model.generate(**inputs, **OPTIONS)
    with edited(model, CoreMatching(None, neurons=range(3), share=1.0, token_share=1.0, stack=STACK)) as run:
        same = model.generate(**inputs, **OPTIONS)
    assert run.effect
    # a neuron that no token of the prompt has used is not there
    assert torch.equal(same.sequences, whole.sequences)


def test_on_a_language_model_for_a_span_of_its_tokens() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    words = case.inputs["input_ids"]
    span = torch.zeros_like(words, dtype=torch.bool)
    span[:, 1:6] = True
    core = CoreMatching(0, "context", keep=Budget(tokens=2), score="last_token")
    with edited(case.model, core, spans={"context": span}):
        case.model(words)
    assert core.kept[0].sum(1).tolist() == [words.shape[1] - 3] * 2
    active = CoreMatching(0, "context", keep=Budget(tokens=2), score="active")
    with edited(case.model, active, spans={"context": span}):
        case.model(words)
    assert bool((active.scores[0] >= core.scores[0]).all())


def test_as_released_keys_are_zeroed_and_nothing_is_shorter(llava: Any) -> None:
    model, inputs, image = llava
    plain = model.generate(**inputs, **OPTIONS)
    core = CoreMatching(span="image", score="last_token", strict=True, zeroed=[1, 2], stack=STACK)
    with edited(model, core, spans={"image": image}):
        short = model.generate(**inputs, **OPTIONS)
    assert sorted(core.kept) == [1, 2]
    assert torch.equal(short.logits[0], plain.logits[0])
    assert not torch.equal(short.logits[1], plain.logits[1])
    assert {layer.keys.shape[2] for layer in short.past_key_values.layers} == {inputs["input_ids"].shape[1] + 3}

    class Zeroing(AttentionEdit):
        at = Where(blocks=[1, 2], stack=STACK)

        def inputs(self, call: AttentionCall) -> AttentionCall:
            if call.queries > 1:
                return call
            gone = torch.nn.functional.pad(~core.kept[call.place.block], (0, call.keys - image.shape[1]))
            return call.replace(k=call.k * ~gone[:, None, :, None], v=call.v * ~gone[:, None, :, None])

    with edited(model, Zeroing()):
        again = model.generate(**inputs, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(short.logits, again.logits, strict=True))


def test_impossible_settings_say_so(llava: Any) -> None:
    model, _, image = llava
    with pytest.raises(InputError, match="block: None, and no neurons"):
        CoreMatching(None)
    with pytest.raises(InputError, match="score: expected"):
        CoreMatching(score="first")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stack: the model has 2 lists"), edited(model, CoreMatching(0, image)):
        pass
