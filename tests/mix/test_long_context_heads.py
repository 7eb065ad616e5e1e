"""QAdA: masses by hand, moments as they run, limits of the criterion, decoders that leave far keys alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.answers import UNASKED
from cenote.mix.blocks import masked_weights, repeated
from cenote.mix.long_context_heads.agreement import agreement, needle_misses, score_auc
from cenote.mix.long_context_heads.criterion import Masses, Moments, expected, local_keys, masses, static_labels
from cenote.mix.long_context_heads.live import HeadCalibration, QAdA, calibrate_heads, random_words, sweep_heads
from cenote.mix.long_context_heads.prompts import look
from cenote.models.live import Where, edited, recorded
from tests.mix.decoders import decoder, generated, logits, numbers, state_of, texts, unchanged


def test_moments_that_run_are_those_of_all_keys() -> None:
    keys = numbers(2, 3, 20, 4).double() + 50
    among = torch.rand(2, 1, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    whole, running = Moments.of(keys, among), Moments.none(keys)
    for start, end in ((0, 1), (1, 2), (2, 9), (9, 9), (9, 20)):
        running = running.with_(keys[:, :, start:end], among[:, :, start:end])
    for one, other in zip(running, whole, strict=True):
        torch.testing.assert_close(one, other)
    kept = keys[0, 1][among[0, 0]]
    torch.testing.assert_close(whole.covariance[0, 1], torch.cov(kept.T, correction=0))
    assert Moments.of(numbers(1, 2, 4, 3).half()).mean.dtype == torch.float32


def test_nothing_far_is_local_and_thresholds_of_none_and_all() -> None:
    mass = Masses(torch.tensor([0.0, 0.0, -50.0]), torch.tensor([float("-inf"), 1.0, 50.0]))
    assert mass.local(0.9).tolist() == [True, False, False]
    assert mass.local(0.0).tolist() == [True, True, True]
    assert mass.local(1.0).tolist() == [True, False, False]
    torch.testing.assert_close(mass.share, torch.tensor([1.0, 1 / (1 + math.e), 0.0]))
    for tau in (0.5, 0.6, 0.95):
        assert torch.equal(mass.local(tau), mass.share >= tau)
    with pytest.raises(InputError, match="tau: expected a share from 0 to 1"):
        mass.local(1.5)


def test_equal_keys_are_estimated_exactly_and_a_query_of_zeros_counts_keys() -> None:
    keys = numbers(2, 1, 8).double().expand(-1, 12, -1)
    q = numbers(2, 3, 8, seed=1).double() * 3
    near = local_keys(torch.arange(12), torch.tensor([11]), sinks=2, window=3)
    exact = masses(q @ keys.mT / 8**0.5, near)
    moments = Moments.of(keys, ~near)
    torch.testing.assert_close(expected(q, moments), exact.far)
    varied = Moments.of(numbers(2, 12, 8, seed=3).double(), ~near)
    silent = Masses(torch.full((2, 1), math.log(5.0)).double(), expected(torch.zeros(2, 1, 8).double(), varied))
    torch.testing.assert_close(silent.share, torch.full((2, 1), 5 / 12).double())


def test_gaussian_keys_are_estimated_better_the_more_there_are_and_large_queries_stay_finite() -> None:
    q = numbers(40, 8).double()
    errors = []
    for count in (50, 5000):
        keys = numbers(count, 8, seed=2).double()
        true = (q @ keys.T / 8**0.5).logsumexp(-1)
        errors.append(float((expected(q, Moments.of(keys)) - true).abs().mean()))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.05
    huge = expected(q * 1e4, Moments.of(numbers(50, 8).double()))
    assert bool(huge.isfinite().all())
    keys = numbers(50, 8).double()
    bound = expected(q * 1e4, Moments.of(keys), longest=keys.norm(dim=-1).max())
    assert bool((bound >= (q * 1e4 @ keys.T / 8**0.5).logsumexp(-1) - 1e-6).all())
    assert bool((bound < huge).any())


def test_cheaper_covariances() -> None:
    moments = Moments.of(numbers(30, 6).double())
    assert torch.equal(moments.as_("diagonal").covariance.diagonal(), moments.covariance.diagonal())
    torch.testing.assert_close(moments.as_("low-rank", rank=6).covariance, moments.covariance)
    low = moments.as_("low-rank", rank=2).covariance
    torch.testing.assert_close(low.trace(), moments.covariance.trace())


def test_static_labels_are_the_heads_that_were_local_most_often() -> None:
    shares = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.8, 0.2]])
    assert static_labels(shares, 0.5).int().tolist() == [[1, 0, 1], [0, 1, 0]]
    assert not bool(static_labels(shares, 0.0).any())
    assert bool(static_labels(shares, 1.0).all())


@pytest.mark.parametrize("rows", [3, 128])
def test_every_query_of_a_text_is_looked_at_as_it_would_be_alone(rows: int) -> None:
    q, k, v = numbers(2, 4, 26, 8) * 2, numbers(2, 2, 26, 8, seed=1), numbers(2, 2, 26, 8, seed=2)
    real = torch.arange(26) < torch.tensor([[26], [20]])
    found = look(q, k, v, real, sinks=2, window=6, exact=True, rows=rows)
    assert found.far is not None
    number = torch.arange(26)
    for item, i in ((0, 0), (0, 7), (0, 8), (0, 25), (1, 19)):
        near = local_keys(number, torch.tensor([i]), 2, 6)[0]
        far = (number <= i) & ~near
        scores = q[item, :, i : i + 1] @ repeated(k, 4)[item].mT / 8**0.5
        exact = masses(scores.masked_fill(number > i, float("-inf")), near[None])
        torch.testing.assert_close(found.near[item, :, i], exact.near[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.far[item, :, i], exact.far[:, 0], atol=1e-4, rtol=1e-4)
        guess = expected(q[item, :, i : i + 1], Moments.of(repeated(k, 4)[item], far[None]))[:, 0]
        torch.testing.assert_close(found.guessed[item, :, i], guess, atol=1e-4, rtol=1e-4)
        alone = scores[:, 0, near].softmax(-1)[:, None] @ repeated(v, 4)[item][:, near]
        torch.testing.assert_close(found.local[item, :, i], alone[:, 0], atol=1e-4, rtol=1e-4)
        assert int(found.away[item, i]) == int(far.sum())


def test_a_window_of_everything_is_the_decoder_to_the_bit() -> None:
    model, (ids, mask) = decoder(), texts()
    made, steps = generated(model, ids, mask)
    heads = QAdA(0.9, sinks=2, window=64)
    with edited(model, heads):
        again, same = generated(model, ids, mask)
    assert torch.equal(again, made)
    assert torch.equal(same, steps)
    assert math.isnan(heads.share_local())


def test_no_threshold_below_one_reads_everything_and_zero_reads_what_is_near() -> None:
    model, (ids, mask) = decoder(), texts()
    before, plain = state_of(model), generated(model, ids, mask)[1]
    found = {}
    for tau in (0.0, 1.0):
        heads = QAdA(tau, sinks=2, window=6)
        with edited(model, heads):
            found[tau] = generated(model, ids, mask)[1]
        assert heads.share_local() == 1 - tau
        assert (heads.keys_read() == 1) is (tau == 1)
    torch.testing.assert_close(found[1.0], plain, atol=1e-4, rtol=1e-4)
    assert float((found[0.0] - plain).abs().max()) > 0.1
    assert unchanged(model, before)


@pytest.mark.parametrize("rule", ["qada", "oracle"])
def test_decoding_is_recomputing_and_a_row_of_a_batch_is_the_row_alone(rule: str) -> None:
    model, (ids, mask) = decoder(), texts()
    heads = QAdA(0.6, sinks=2, window=6, rule=rule)  # type: ignore[arg-type]
    with edited(model, heads):
        made, steps = generated(model, ids, mask)
    assert 0 < heads.share_local() < 1
    longer = torch.cat([mask, torch.ones(2, 6, dtype=torch.bool)], 1)
    with edited(model, QAdA(0.6, sinks=2, window=6, rule=rule)):  # type: ignore[arg-type]
        at_once = logits(model, made, longer)
        alone = logits(model, made[:1, 5:])
    torch.testing.assert_close(at_once[:, 17:-1], steps, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(alone, at_once[:1, 5:], atol=1e-3, rtol=1e-3)


def test_labels_decide_per_query_head_and_groups_are_read_where_one_head_needs_it() -> None:
    model, (ids, mask) = decoder(num_hidden_layers=1), texts()
    given = HeadCalibration({}, {0: torch.tensor([0.9, 0.1, 0.8, 0.7])}, {})
    heads = QAdA(sinks=2, window=6, rule="static", calibration=given, share=0.75)
    with edited(model, heads), recorded(model, "inputs", "heads") as found:
        generated(model, ids, mask, tokens=2)
    last = next(iter(heads.read.values()))[-1]
    assert last.local[0, :, 0].tolist() == [True, False, True, True]
    assert last.keys.tolist() == [[14, 8], [19, 8]]
    call = next(iter(found["inputs"].values()))[-1]
    y = next(iter(found["heads"].values()))[-1]
    near = torch.cat([torch.arange(2), torch.arange(13, 19)])
    for head, seen in ((0, near), (1, torch.arange(19))):
        weights = (call.q[1, head] @ call.k[1, 0, seen].mT * call.scale).softmax(-1)
        torch.testing.assert_close(y[1, head], weights @ call.v[1, 0, seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_a_decoded_token_is_told_by_the_keys_that_are_far_from_it(clip: bool) -> None:
    model, (ids, mask) = decoder(num_hidden_layers=1), texts()
    heads = QAdA(0.6, sinks=2, window=6, clip=clip)
    with edited(model, heads), recorded(model, "inputs") as found:
        generated(model, ids, mask, tokens=3)
    call = next(iter(found["inputs"].values()))[-1]
    told = next(iter(heads.read.values()))[-1].local[:, :, 0]
    for item, pads in ((0, 5), (1, 0)):
        q, k = call.q[item], repeated(call.k, 4)[item, :, pads:]
        near = local_keys(torch.arange(20 - pads), torch.tensor([19 - pads]), 2, 6)
        longest = k.norm(dim=-1).masked_fill(near, 0.0).amax(-1) if clip else None
        mass = Masses(masses(q @ k.mT * call.scale, near).near, expected(q, Moments.of(k, ~near), call.scale, longest))
        assert torch.equal(told[item], mass.local(0.6)[:, 0])
        if longest is not None:
            kept = next(iter(heads._states.values())).longest[item]
            torch.testing.assert_close(kept.repeat_interleave(2), longest)


def test_calibration_on_random_words_gives_moments_and_shares_of_each_head() -> None:
    model = decoder(num_hidden_layers=2)
    text = random_words(["a", "b"], 40)
    assert set(text.split()) == {"a", "b"}
    ids = torch.tensor([[5 + ord(word) - 97 for word in text.split()], [6] * 40])
    found = calibrate_heads(model, ids, tau=0.6, sinks=2, window=6)
    with torch.no_grad(), recorded(model, "inputs") as seen:
        model(ids)
    call = next(iter(seen["inputs"].values()))[0]
    keys = call.k[:, :, 2:34].transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(found.moments[0].mean, keys.mean(1), atol=1e-4, rtol=1e-4)
    exact = look(call.q, call.k, call.v, sinks=2, window=6, exact=True).exact
    torch.testing.assert_close(found.shares[0], exact.local(0.6)[:, :, 8:].float().mean((0, 2)))
    labels = found.labels(0.5)
    assert sum(int(label.sum()) for label in labels.values()) == 4
    ids, mask = texts()
    for form in ("full", "diagonal", "low-rank"):
        with edited(model, QAdA(0.6, 2, 6, calibration=found, form=form)):  # type: ignore[arg-type]
            generated(model, ids, mask, tokens=2)
    with pytest.raises(InputError, match="no text is longer than 2 sinks and a window of 60"):
        calibrate_heads(model, ids, sinks=2, window=60)


def test_agreement_with_the_oracle() -> None:
    exact = Masses(torch.tensor([2.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, float("-inf")]))
    found = agreement(exact, exact, 0.5)
    assert found == (1.0, 0.0, 0.0, 0.0)
    wrong = agreement(exact, Masses(exact.near, torch.tensor([3.0, -1.0, 0.5, 0.0])), 0.5)
    assert wrong == (0.0, 3.0, 1.0, 0.5)
    assert score_auc(torch.tensor([1.0, 1.0]), torch.tensor([True, False])) == 0.5
    assert math.isnan(score_auc(torch.tensor([1.0]), torch.tensor([True])))


def test_a_far_key_with_most_of_the_weight_is_a_needle_that_was_missed() -> None:
    q, k = numbers(1, 2, 12, 8), numbers(1, 2, 12, 8, seed=1)
    k[:, :, 3] = 20 * q[:, :, 11]
    may = torch.ones(12, 12, dtype=torch.bool).tril()
    weights = masked_weights(q, k, may[None, None])
    near = local_keys(torch.arange(12), torch.arange(12), 1, 4)
    told: Tensor = torch.ones(1, 2, 12, dtype=torch.bool)
    assert needle_misses(weights, near, told)[0, :, 11].tolist() == [True, True]
    assert not bool(needle_misses(weights, near, ~told).any())


def test_lighter_tails_than_gaussian_are_over_estimated_by_large_queries() -> None:
    keys = torch.ones(48, 8).double()
    keys[::2] = -1.0
    for size, least, most in ((0.1, 0.0, 0.05), (1.0, 0.5, float("inf"))):
        q = size * torch.ones(1, 8).double()
        true = (q @ keys.T / 8**0.5).logsumexp(-1)
        off = float((expected(q, Moments.of(keys)) - true).exp()) - 1
        assert least < off < most


def test_a_sweep_shows_what_is_lost_by_how_much_is_local() -> None:
    model, (ids, mask) = decoder(num_hidden_layers=2), texts()
    answers = torch.full_like(ids, UNASKED)
    answers[:, -1] = logits(model, ids, mask)[:, -2].argmax(-1)
    options = {"sinks": 2, "window": 6, "mask": mask, "answers": answers}
    none, some, all_ = sweep_heads(model, ids, (1.0, 0.6, 0.0), **options)  # type: ignore[arg-type]
    assert (none.share, none.recall) == (0.0, 1.0)
    assert 0 < some.share < all_.share == 1.0
    assert none.loss != all_.loss
    (drawn,) = sweep_heads(model, ids, (0.5,), rule="random", **options)  # type: ignore[arg-type]
    assert 0.3 < drawn.share < 0.7


def test_what_cannot_be_is_said() -> None:
    model, (ids, mask) = decoder(), texts()
    with pytest.raises(InputError, match="calibration: 'static' needs one"):
        QAdA(rule="static", share=0.5)
    with pytest.raises(InputError, match="share: 'random' needs how much"):
        QAdA(rule="random")
    with pytest.raises(InputError, match="decode without beams"), edited(model, QAdA(0.5, 2, 6)):
        generated(model, ids, mask, num_beams=3)
    with pytest.raises(InputError, match="local: expected a share from 0 to 1"):
        static_labels(torch.zeros(1, 2), 2.0)
    assert QAdA(at=Where([1])).at.blocks == [1]
