import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pools import by_rules, features, shaken
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.pool import AttentiveTemporalPool, LinearCalibration, StatisticsPool, adapt_logits
from cenote.pool.sequence.attentive_temporal_pooling.encoders import StreamingEncoder, matched
from cenote.pool.sequence.attentive_temporal_pooling.front_end import StackedLogMel, mel_filters
from cenote.pool.sequence.attentive_temporal_pooling.streams import (
    StreamingClassifier,
    Streams,
    accuracy_over_time,
    stream_loss,
    time_to_decision,
    train_streams,
)
from cenote.testing import check_pool


def streamed(pool: AttentiveTemporalPool, x: Tensor, mask: Tensor, cuts: list[int]):
    pieces, state = [], None
    for a, b in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        piece, state = pool.step(x[:, a:b], state, mask[:, a:b])
        pieces.append(piece)
    return torch.cat(pieces, 1), state


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    seed=st.integers(0, 2**16),
    statistics=st.sampled_from(["mean", "mean_std"]),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_any_cut_into_packets_gives_the_offline_result(
    tokens: int, cuts: list[int], seed: int, statistics: str, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pool = AttentiveTemporalPool(5, statistics=statistics)
    x = torch.randn(3, tokens, 5, generator=generator) + offset
    mask = torch.rand(3, tokens, generator=generator) > 0.3
    whole = pool.running(x, mask)
    pieces, state = streamed(pool, x, mask, sorted(min(c, tokens) for c in cuts))
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-6)
    # the last row is what the set form says, which sums in another order and precision
    torch.testing.assert_close(whole[:, -1], pool(x, mask), atol=1e-4, rtol=1e-4)
    assert [t.shape for t in state if t is not None] == [(3, 1), *[(3, 5)] * (len(state) - (state.sum_xx is None) - 1)]


def test_in_float64_packets_and_the_set_form_agree_to_rounding() -> None:
    pool, x = shaken(AttentiveTemporalPool(16, hidden=7)), features(3, 50)
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) > 0.3
    whole = pool.running(x, mask)
    for cuts in ([1], [7, 7, 30], list(range(1, 50))):
        torch.testing.assert_close(streamed(pool, x, mask, cuts)[0], whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(whole[:, -1], pool(x, mask), atol=1e-10, rtol=1e-10)


def test_running_is_the_set_form_of_every_prefix() -> None:
    pool, x = shaken(AttentiveTemporalPool(16)), features(2, 12)
    expected = torch.stack([pool(x[:, :t]) for t in range(1, 13)], 1)
    torch.testing.assert_close(pool.running(x), expected, atol=1e-10, rtol=1e-10)


def test_the_state_is_as_large_after_ten_thousand_frames_as_after_one() -> None:
    pool = AttentiveTemporalPool(4)
    states = [pool.step(torch.randn(1, n, 4))[1] for n in (1, 10_000)]
    # and it owns no more memory than it shows
    owned = [sum(t.untyped_storage().nbytes() for t in state) for state in states]
    assert owned[0] == owned[1] == (1 + 4 + 4) * 8


def test_a_long_stream_keeps_nothing_but_its_state() -> None:
    """Nothing that a packet brought is alive after it: no tensor is left over, however many packets there were."""
    pool = AttentiveTemporalPool(8)

    def alive() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is Tensor)

    state, counts, sizes = None, [], []
    with torch.inference_mode():
        for packet in range(300):
            _, state = pool.step(torch.randn(1, 20, 8), state)
            if packet % 100 == 99:
                counts.append(alive())
                sizes.append(sum(t.untyped_storage().nbytes() for t in state))
    # what other tests left behind may die meanwhile
    assert counts == sorted(counts, reverse=True)
    assert len(set(sizes)) == 1


def test_a_packet_without_frames_changes_nothing() -> None:
    pool, x = shaken(AttentiveTemporalPool(16)), features()
    _, state = pool.step(x)
    output, after = pool.step(x[:, :0], state)
    assert output.shape == (2, 0, 32)
    for a, b in zip(state, after, strict=True):
        torch.testing.assert_close(a, b)


def test_the_numbers_of_the_authors_own_test() -> None:
    """Their second packet has a padded frame, which their unweighted form leaves out as ours does.

    Their expected deviations are those without `eps` under the root, which their own formula exceeds by 4e-6.
    """
    x = torch.arange(48.0, dtype=torch.float64).reshape(8, 2, 3).transpose(0, 1)
    pool = AttentiveTemporalPool(3, weighted=False, eps=1e-12)
    _, state = pool.step(x)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 2] = False
    output, _ = pool.step(x + 1, state, mask)
    expected = torch.tensor(
        [
            [22.066668, 23.066668, 24.066668, 14.026007, 14.026007, 14.026007],
            [24.5, 25.5, 26.5, 13.756816, 13.756816, 13.756816],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(output[:, -1], expected, atol=2e-6, rtol=0)


def test_full_weights_are_the_plain_running_statistics() -> None:
    pool, x = shaken(AttentiveTemporalPool(16, eps=1e-12)), features()
    with torch.no_grad():
        pool.scorer[-1].weight.zero_()
        pool.scorer[-1].bias.fill_(100.0)
    torch.testing.assert_close(pool.running(x)[:, -1], StatisticsPool(16, eps=1e-12)(x), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(pool.running(x)[:, 4], StatisticsPool(16, eps=1e-12)(x[:, :5]), atol=1e-9, rtol=1e-9)


def test_a_constant_stream_has_its_own_mean_and_the_floor_as_deviation() -> None:
    pool = AttentiveTemporalPool(3)
    x = torch.tensor([1000.0, -2.0, 0.25]).expand(1, 20, 3)
    for y in (pool.running(x)[0], pool(x)):
        torch.testing.assert_close(y[:, :3], x[0, : len(y)])
        torch.testing.assert_close(y[:, 3:], torch.full((len(y), 3), 0.01), atol=1e-6, rtol=1e-4)


def test_the_first_frame_is_its_own_mean() -> None:
    pool, x = shaken(AttentiveTemporalPool(16)), features(tokens=1)
    torch.testing.assert_close(pool(x), torch.cat([x[:, 0], torch.full_like(x[:, 0], 0.01)], -1))


def test_the_past_is_never_rescaled_by_the_future() -> None:
    pool, x = shaken(AttentiveTemporalPool(16)), features()
    y = x.clone()
    y[:, 5:] = 100.0
    torch.testing.assert_close(pool.running(y)[:, :5], pool.running(x)[:, :5])


def test_masked_frames_repeat_the_last_statistics_and_their_content_is_not_read() -> None:
    pool, x = shaken(AttentiveTemporalPool(16)), features(1, 6)
    mask = torch.tensor([[False, True, True, False, True, False]])
    y = pool.running(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    assert torch.equal(y[:, 0], torch.zeros_like(y[:, 0]))
    torch.testing.assert_close(y[:, 3], y[:, 2])
    torch.testing.assert_close(y[:, 5], y[:, 4])
    torch.testing.assert_close(y[:, [1, 2, 4]], pool.running(x[:, [1, 2, 4]]))


def test_padded_frames_can_weigh_eps_as_with_the_authors() -> None:
    pool, x = shaken(AttentiveTemporalPool(16, eps=0.1)), features(2, 6)
    mask = torch.tensor([[True, True, False, True, True, False], [False] * 6])
    y = pool.running(x, mask, count_padding=True)
    w = torch.where(mask.unsqueeze(-1), torch.sigmoid(pool.scorer(x)), 0) + 0.1
    for t in range(6):
        share = w[:, : t + 1] / w[:, : t + 1].sum(1, keepdim=True)
        mean = (share * x[:, : t + 1]).sum(1)
        variance = (share * (x[:, : t + 1] - mean.unsqueeze(1)).square()).sum(1)
        torch.testing.assert_close(y[:, t], torch.cat([mean, (variance + 0.1).sqrt()], 1))
    first, state = pool.step(x[:, :4], None, mask[:, :4], count_padding=True)
    torch.testing.assert_close(torch.cat([first, pool.step(x[:, 4:], state, mask[:, 4:], True)[0]], 1), y)
    even = AttentiveTemporalPool(16, weighted=False).double()
    torch.testing.assert_close(even.running(x, mask, count_padding=True), even.running(x, mask))


def test_frames_can_pass_as_they_are() -> None:
    pool, x = AttentiveTemporalPool(16, statistics="pass_through"), features(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    assert not list(pool.parameters())
    assert torch.equal(pool.running(x), x)
    assert torch.equal(streamed(pool, x, mask, [2, 5])[0], x.masked_fill(~mask.unsqueeze(-1), 0))
    assert torch.equal(pool.running(x, mask, count_padding=True), x)
    assert torch.equal(pool(x, mask), torch.stack([x[0, 5], x[1, 3]]))


def test_what_is_forgotten() -> None:
    pool, x = shaken(AttentiveTemporalPool(16, forget=0.7)), features(2, 11)
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) > 0.3
    w, c, m, q = torch.sigmoid(pool.scorer(x)) + pool.eps, 0.0, 0.0, 0.0
    y = pool.running(x, mask)
    for t in range(11):
        real = mask[:, t, None]
        c, m, q = (
            torch.where(real, 0.7 * s + w[:, t] * part, torch.as_tensor(s))
            for s, part in ((c, torch.ones(2, 1)), (m, x[:, t]), (q, x[:, t].square()))
        )
        seen = mask[:, : t + 1].any(1)
        expected = torch.cat([m / c, ((q / c - (m / c).square()).clamp(min=0) + pool.eps).sqrt()], 1)
        torch.testing.assert_close(y[seen, t], expected[seen])
    torch.testing.assert_close(y[:, -1], pool(x, mask))
    for cuts in ([3], [1, 2, 8]):
        torch.testing.assert_close(streamed(pool, x, mask, cuts)[0], y)
    assert not torch.allclose(pool(x.flip(1)), pool(x))


def test_a_stream_without_frames_has_finite_gradients() -> None:
    pool, x = shaken(AttentiveTemporalPool(16)), features().requires_grad_()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0] = True
    pool.running(x, mask).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in pool.parameters())


def test_streaming_is_differentiable() -> None:
    pool, x = shaken(AttentiveTemporalPool(4)), features(1, 5, 4).requires_grad_()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return streamed(pool, x, torch.ones(1, 5, dtype=torch.bool), [2, 3])[0]

    assert torch.autograd.gradcheck(run, (x, *pool.parameters()))


def test_weights_are_shares_of_the_last_statistics() -> None:
    pool, x = shaken(AttentiveTemporalPool(16, statistics="mean")), features()
    output, weights = pool.attend(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, dtype=x.dtype))
    torch.testing.assert_close((weights @ x).squeeze(1), output)


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings",
    [{"statistics": "mean"}, {"weighted": False}, {"hidden": 8}, {"forget": 0.9}, {"statistics": "pass_through"}],
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(AttentiveTemporalPool(16, **settings), leave_out=left_out)


def test_wrong_arguments_are_named() -> None:
    pool, x = AttentiveTemporalPool(4), torch.randn(2, 3, 4)
    _, state = pool.step(x)
    with pytest.raises(InputError, match="state"):
        pool.step(x[:1], state)
    with pytest.raises(InputError, match="state"):
        AttentiveTemporalPool(4, statistics="mean").step(x, state)
    with pytest.raises(InputError, match="Bags"):
        pool.step(Bags.from_padded(x))
    with pytest.raises(InputError, match="statistics"):
        AttentiveTemporalPool(4, statistics="std")
    with pytest.raises(InputError, match="eps"):
        AttentiveTemporalPool(4, eps=0.0)
    for forget in (0.0, 1.5):
        with pytest.raises(InputError, match="forget"):
            AttentiveTemporalPool(4, forget=forget)


def test_other_frequencies_of_classes_are_bayes_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    likelihood = torch.rand(20, 4, generator=generator, dtype=torch.float64)
    old, new = (torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = (likelihood * old).log() + torch.randn(20, 1, generator=generator, dtype=torch.float64)
    expected = likelihood * new / (likelihood * new).sum(1, keepdim=True)
    torch.testing.assert_close(adapt_logits(logits, new, old).exp(), expected)
    torch.testing.assert_close(adapt_logits(logits, old, old), logits.log_softmax(-1))


def test_a_class_that_does_not_occur_is_never_chosen() -> None:
    posterior = adapt_logits(torch.randn(5, 3), torch.tensor([0.5, 0.0, 0.5])).exp()
    assert torch.equal(posterior[:, 1], torch.zeros(5))


@pytest.mark.parametrize("prior", [torch.ones(2), torch.tensor([-1.0, 1.0, 1.0]), torch.zeros(3)])
def test_wrong_frequencies_are_named(prior: Tensor) -> None:
    for arguments in ((prior,), (torch.ones(3), prior)):
        with pytest.raises(InputError, match="prior"):
            adapt_logits(torch.zeros(1, 3), *arguments)


@pytest.mark.parametrize("diagonal", [False, True])
def test_calibration_starts_as_identity_and_learns_a_distorted_domain(diagonal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    logits = 4 * torch.nn.functional.one_hot(labels, 3) + torch.randn(300, 3, generator=generator)
    distorted = logits * torch.tensor([1.0, 0.2, 3.0]) + torch.tensor([0.0, -3.0, 6.0])
    calibration = LinearCalibration(3, diagonal)
    torch.testing.assert_close(calibration(distorted), distorted)
    optimiser = torch.optim.LBFGS(calibration.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(calibration(distorted[:150]), labels[:150])
        value.backward()
        return value

    optimiser.step(loss)

    def accuracy(scores: Tensor) -> float:
        return float((scores[150:].argmax(1) == labels[150:]).float().mean())

    assert accuracy(distorted) < 0.8
    assert accuracy(calibration(distorted)) > 0.93


KINDS = ["conformer", "transformer", "lstm"]


def encoder(kind: str, **settings: int) -> StreamingEncoder:
    torch.manual_seed(0)
    small = {"dim": 8, "layers": 2, "heads": 2, "context": 5, "kernel": 4}
    return shaken(StreamingEncoder(6, kind=kind, **{**small, **settings}))


@pytest.mark.parametrize("kind", KINDS)
def test_packets_of_any_size_are_encoded_as_the_whole_stream(kind: str) -> None:
    net, x = encoder(kind), features(2, 23, 6)
    whole = net(x)
    for sizes in ([1] * 23, [3, 0, 9, 11], [0, 22, 1]):
        state, pieces = None, []
        for packet in x.split(sizes, 1):
            piece, state = net.step(packet, state)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
    later = x.clone()
    later[:, 12:] += 1
    torch.testing.assert_close(net(later)[:, :12], whole[:, :12])
    assert (net(later)[:, 12:] != whole[:, 12:]).any()


@pytest.mark.parametrize("kind", ["conformer", "transformer"])
def test_the_left_context_is_limited_and_the_state_does_not_grow(kind: str) -> None:
    net, x = encoder(kind, layers=1), features(1, 40, 6)
    earlier = x.clone()
    earlier[:, 10] += 1
    reach = 5 + (3 if kind == "conformer" else 0)
    changed = (net(earlier) - net(x)).abs().amax(-1)[0] > 1e-12
    assert changed.nonzero().flatten().tolist() == list(range(10, 10 + reach + 1))
    _, state = net.step(x)
    assert [t.shape[1] for t in state[0]] == [5, 3 if kind == "conformer" else 0]


def test_encoders_of_equal_size() -> None:
    def size(net: torch.nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    conformer = StreamingEncoder(6, dim=16, layers=2)
    for kind in ("transformer", "lstm"):
        assert abs(size(matched(conformer, 6, kind, layers=2)) / size(conformer) - 1) < 0.15


def test_the_front_end_is_the_same_in_packets() -> None:
    front, sound = StackedLogMel().double(), features(2, 1, 8000).squeeze(1)
    whole = front(sound)
    assert whole.shape == (2, 16, 512)
    for sizes in ([100, 0, 411, 1, 3000, 4488], [8000], [160] * 50):
        state, pieces = None, []
        for packet in sound.split(sizes, 1):
            piece, state = front.step(packet, state)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
    rows = StackedLogMel(stack=1, stride=1).double()(sound)
    torch.testing.assert_close(whole[:, 2], rows[:, 3:7].flatten(1))
    torch.testing.assert_close(whole[:, 0], rows[:, :1].expand(-1, 4, -1).flatten(1))


def test_a_tone_is_loudest_in_the_filter_around_it() -> None:
    time = torch.arange(16000) / 16000
    for tone in (500.0, 2000.0):
        row = StackedLogMel(stack=1)(torch.sin(2 * torch.pi * tone * time)[None])[0, 5]
        filters = mel_filters(1024, 16000, 128)
        assert int(row.argmax()) == int(filters[:, round(tone * 1024 / 16000)].argmax())
    with pytest.raises(InputError, match="bins: 400 filters are finer"):
        mel_filters(256, 16000, 400)
    with pytest.raises(InputError, match="sound"):
        StackedLogMel()(torch.zeros(5))


def classifier(kind: str = "conformer") -> StreamingClassifier:
    return shaken(StreamingClassifier(encoder(kind), AttentiveTemporalPool(8), classes=3))


def test_decisions_come_frame_by_frame() -> None:
    model, x = classifier(), features(2, 9, 6)
    heard = list(model.listen(x.split(4, 1), seconds=0.5))
    assert [h.seconds for h in heard] == [0.5 * (t + 1) for t in range(9)]
    probabilities = model(x).softmax(-1)
    torch.testing.assert_close(torch.stack([h.probabilities for h in heard], 1), probabilities)
    assert torch.equal(torch.stack([h.decision for h in heard], 1), probabilities.argmax(-1))
    torch.testing.assert_close(torch.stack([h.confidence for h in heard], 1), probabilities.amax(-1))
    with pytest.raises(InputError, match="pool: expected one of width 8"):
        StreamingClassifier(encoder("lstm"), AttentiveTemporalPool(6), classes=3)


def test_the_loss_is_of_the_last_frame_or_of_all() -> None:
    model, x, labels = classifier(), features(2, 6, 6), torch.tensor([2, 0])
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    logs = model(x, mask).log_softmax(-1)
    last = -(logs[0, 5, 2] + logs[1, 3, 0]) / 2
    torch.testing.assert_close(stream_loss(model, Streams(x, labels, mask)), last)
    frames = -(logs[0, :, 2].sum() + logs[1, :4, 0].sum()) / 10
    torch.testing.assert_close(stream_loss(model, Streams(x, labels, mask), "frames"), frames)
    torch.testing.assert_close(
        stream_loss(model, Streams(x, labels)), stream_loss(model, Streams(x, labels, mask >= 0))
    )


def test_streams_are_learned() -> None:
    torch.manual_seed(0)
    labels = torch.arange(24) % 2
    streams = Streams(torch.randn(24, 8, 6) + labels[:, None, None], labels)
    model = StreamingClassifier(
        StreamingEncoder(6, dim=8, layers=1, heads=2, dropout=0.0), AttentiveTemporalPool(8), classes=2
    )
    history = train_streams(model, lambda: [streams], passes=25, lr=1e-2, over="frames")
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert float(accuracy_over_time(model(streams.x), labels)[-1]) > 0.9


def test_how_soon_it_is_right() -> None:
    said = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    logits, labels = torch.nn.functional.one_hot(said, 2).double(), torch.tensor([1, 1, 0])
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
    assert accuracy_over_time(logits, labels).tolist() == pytest.approx([2 / 3, 1, 2 / 3, 1 / 3])
    assert accuracy_over_time(logits, labels, mask).tolist() == pytest.approx([2 / 3, 1, 1, 1])
    assert time_to_decision(logits, seconds=0.5).tolist() == [1.0, 1.5, 2.0]
    assert time_to_decision(logits, mask, 0.5).tolist() == [1.0, 0.5, 0.5]
    assert time_to_decision(logits, torch.zeros_like(mask)).tolist() == [0, 0, 0]
