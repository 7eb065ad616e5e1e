import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.pools import by_rules, shaken
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models import load
from cenote.pool import (
    AamSoftmax,
    AttentiveStatisticsPool,
    D3Net,
    Ecapa2d,
    LayerAttentionPool,
    LayerAwareTDNN,
    SpeakerStatisticsPool,
    enrolled,
    equal_errors,
    min_detection_cost,
    trial_scores,
)
from cenote.pool.sequence.layer_aware_tdnn.speakers import SpeakerVerifier, random_crop_of, span_out, train_speakers
from cenote.testing import check_layer_pool, check_pool

FRONTS = ["ecapa", "d3net", None]


def stack(batch: int = 2, layers: int = 5, tokens: int = 9, dim: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layers, tokens, dim, generator=generator, dtype=torch.float64)


def model(front: str | None, **settings: object) -> LayerAwareTDNN:
    torch.manual_seed(0)
    small = {"layers": 5, "out_dim": 8, "channels": 8, "hidden": 12, "heads": 3}
    return shaken(LayerAwareTDNN(6, front=front, **{**small, **settings}))


@pytest.mark.parametrize("front", FRONTS)
def test_padding_changes_nothing(front: str | None) -> None:
    net, x = model(front), stack()
    mask = torch.arange(13).expand(2, 13) < torch.tensor([[9], [4]])
    padded = torch.cat([x, stack(tokens=4, seed=2)], 2)
    for content in (1e3, float("nan")):
        filled = padded.masked_fill(~mask[:, None, :, None], content)
        torch.testing.assert_close(net(filled, mask)[:1], net(x)[:1])
        torch.testing.assert_close(net(filled, mask)[1:], net(x[1:, :, :4]))
    torch.testing.assert_close(net(x, torch.ones(2, 9, dtype=torch.bool)), net(x))


@pytest.mark.parametrize("front", FRONTS)
def test_padding_does_not_count_in_training(front: str | None) -> None:
    a, b = model(front, dropout=0.0).train(), model(front, dropout=0.0).train()
    x = stack()
    mask = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(a(x, mask), b(x[:, :, :6]))
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("front", FRONTS)
def test_one_frame_and_no_frame(front: str | None) -> None:
    net, x = model(front), stack(tokens=1).requires_grad_()
    y = net(x)
    assert y.isfinite().all()
    assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()
    mask = torch.tensor([[True, False], [False, False]])
    y = net(stack(tokens=2), mask)
    assert y[0].isfinite().all()
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    # training divides by variances of very few frames
    net.train()
    y = net(stack(batch=3, tokens=1))
    y.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("front", FRONTS)
def test_gradients_are_right_and_reach_every_parameter(front: str | None) -> None:
    # slices of one channel would die as a whole behind a ReLU
    net, x = model(front, dropout=0.0, channels=32), stack(tokens=4).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda x: net(x, mask), (x,), fast_mode=True)
    net.train()
    y = net(stack(batch=3))
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)))
    # a BatchNorm, or a softmax over frames, takes these away again
    inert = {f"time_pool.{name}" for name in net.time_pool.inert_parameters}
    silent = {name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    assert silent <= inert


def test_batch_mates_do_not_matter_and_dtype_is_kept() -> None:
    net, x = model("ecapa"), stack(3)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
    half = model("ecapa").to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@by_rules(check_layer_pool)
@pytest.mark.parametrize("front", ["d3net", None])
def test_contract_of_the_other_fronts(front: str | None, left_out: tuple[str, ...]) -> None:
    # narrow: the contract shakes the weights, and behind running statistics that never saw them a wide residual net of
    # convolutions grows its values to thousands, where bfloat16 no longer settles which frame the attention takes
    torch.manual_seed(0)
    check_layer_pool(
        LayerAwareTDNN(6, layers=5, out_dim=8, channels=8, front=front, hidden=12, heads=3),
        layers=5,
        leave_out=left_out,
    )


def test_open_gates_are_the_largest_layer_of_the_projection() -> None:
    pool = shaken(LayerAttentionPool(6, 12, layers=5, heads=3))
    x = stack().permute(0, 3, 1, 2)
    with torch.no_grad():
        pool.w2.zero_()
        pool.b2.fill_(50.0)
    largest = pool.projected(x).amax(2)
    tokens = pool.outwards(largest)
    expected = F.batch_norm(
        tokens, pool.out_norm.running_mean, pool.out_norm.running_var, pool.out_norm.weight, pool.out_norm.bias
    )
    torch.testing.assert_close(pool(x), expected)


def test_equal_layers_and_a_silent_gate_give_half_the_projection() -> None:
    pool = shaken(LayerAttentionPool(6, 12, layers=5, heads=3))
    x = stack(layers=1).permute(0, 3, 1, 2).expand(-1, -1, 5, -1)
    with torch.no_grad():
        for p in (pool.w1, pool.w2, pool.b1, pool.b2):
            p.zero_()
        pool.outwards.weight.copy_(torch.eye(12).unsqueeze(-1))
        nn.init.ones_(pool.out_norm.weight)
        nn.init.zeros_(pool.out_norm.bias)
        pool.out_norm.running_mean.zero_()
        pool.out_norm.running_var.fill_(1 - pool.out_norm.eps)
    torch.testing.assert_close(pool(x), pool.projected(x)[:, :, 0] / 2)


def test_the_gate_of_one_frame_does_not_see_another() -> None:
    net, x = model(None), stack()
    y = x.clone()
    y[:, :, 4] += 1
    same = torch.arange(9) != 4
    assert torch.equal(net.layer_gates(x)[..., same], net.layer_gates(y)[..., same])
    assert torch.equal(net.frames(x)[:, same], net.frames(y)[:, same])
    assert not torch.equal(net.layer_gates(x)[..., 4], net.layer_gates(y)[..., 4])


def test_gates_lie_between_0_and_1_and_are_0_on_padding() -> None:
    net, x = model("d3net"), stack()
    mask = torch.arange(9).expand(2, 9) < 6
    gates = net.layer_gates(x, mask)
    assert gates.shape == (2, 3, 5, 9)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert torch.equal(gates[..., 6:], torch.zeros_like(gates[..., 6:]))


@pytest.mark.parametrize(("front", "channels"), [(Ecapa2d, 16), (D3Net, 8)])
def test_fronts_keep_the_map_and_stack_three_blocks(front: type[nn.Module], channels: int) -> None:
    net = shaken(front(6, channels))
    x = stack().permute(0, 3, 1, 2)
    y = net(x)
    assert y.shape == (2, 3 * channels, 5, 9)
    assert net.out_channels == 3 * channels
    assert (y >= 0).all()


def test_a_front_sees_neighbouring_frames_and_layers() -> None:
    x = stack().permute(0, 3, 1, 2)
    for front, frames in ((Ecapa2d, 3), (D3Net, 5)):
        net = shaken(front(6, 8))
        y = x.clone()
        y[:, :, 2, 4] += 1
        moved = (net.conv(net.norm(x)) != net.conv(net.norm(y))).flatten(0, 1).any(0)
        assert moved.any(0).sum() == frames
        assert moved.any(1).sum() == (5 if front is Ecapa2d else 1)


def test_the_last_slice_of_a_res2_block_passes_unchanged() -> None:
    from cenote.pool.sequence.layer_aware_tdnn.fronts import Res2Block

    block = shaken(Res2Block(16, dilation=2))
    x = torch.randn(2, 16, 5, 9, dtype=torch.float64)
    seen: list[Tensor] = []
    block.after.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(x)
    torch.testing.assert_close(seen[0][:, 14:], block.before(x)[:, 14:])
    assert not torch.allclose(seen[0][:, :14], block.before(x)[:, :14])


@by_rules(check_pool)
def test_contract_of_the_time_pool(left_out: tuple[str, ...]) -> None:
    check_pool(SpeakerStatisticsPool(16, 5), leave_out=left_out)


def test_equal_scores_give_mean_and_population_deviation() -> None:
    pool = shaken(SpeakerStatisticsPool(6, 4))
    with torch.no_grad():
        pool.statistics.score.weight.zero_()
    x = stack()[:, 0]
    expected = torch.cat([x.mean(1), x.std(1, correction=0)], -1)
    torch.testing.assert_close(pool(x), pool.out_norm(pool.projection(pool.norm(expected))))
    assert isinstance(pool.statistics, AttentiveStatisticsPool)


def test_the_embedding_is_cut_and_normalised_per_loss_head() -> None:
    net = model(None, loss_heads=2)
    y = net.embed(stack())
    assert y.shape == (2, 2, 4)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(y[:, 0], F.normalize(net(stack())[:, :4], dim=-1))


def test_no_margin_is_the_cross_entropy_of_scaled_cosines() -> None:
    loss = shaken(AamSoftmax(8, classes=3, heads=2, margin=0.0))
    x, labels = stack(4, 1, 1, 8).flatten(1), torch.tensor([0, 2, 1, 1])
    heads = [
        F.cross_entropy(30 * F.cosine_similarity(x[:, 4 * h : 4 * h + 4, None], loss.weight[h], dim=1), labels)
        for h in range(2)
    ]
    torch.testing.assert_close(loss(x, labels), torch.stack(heads).mean())
    torch.testing.assert_close(loss.probabilities(x).sum(-1), torch.ones(4, dtype=torch.float64))


def test_the_margin_widens_the_angle_of_the_right_class_alone() -> None:
    loss = AamSoftmax(2, classes=2, margin=0.3)
    angles = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    cosines = angles.cos()[:, None, None].expand(3, 1, 2)
    y = loss.with_margin(cosines, torch.tensor([0, 0, 0]))
    # beyond pi - m the angle cannot be widened: a straight line goes on
    expected = torch.stack([(angles[0] + 0.3).cos(), (angles[1] + 0.3).cos(), angles[2].cos() - 0.3 * math.sin(0.3)])
    torch.testing.assert_close(y[:, 0, 0], expected)
    torch.testing.assert_close(y[:, 0, 1], angles.cos())


def test_an_embedding_right_on_its_class_has_a_finite_gradient() -> None:
    loss = AamSoftmax(4, classes=3)
    x = loss.weight[0, :, :1].T.detach().clone().requires_grad_()
    loss(x, torch.tensor([0])).backward()
    assert x.grad.isfinite().all()
    assert loss.weight.grad.isfinite().all()


def trials(count: int = 200, apart: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    same = torch.arange(count) % 3 == 0
    return torch.randn(count, generator=generator, dtype=torch.float64) + apart * same, same


def test_speakers_are_enrolled_with_clips_of_any_length_and_compared() -> None:
    net, x = model("ecapa", loss_heads=2), stack(4)
    mask = torch.arange(9) < torch.tensor([[9], [6], [4], [9]])
    clips = net.embed(x, mask)
    speaker = enrolled(clips[:2])
    torch.testing.assert_close(speaker, F.normalize(clips[:2].sum(0), dim=-1))
    torch.testing.assert_close(enrolled(clips[:1]), clips[0])
    scores = trial_scores(speaker.expand(2, -1, -1), clips[2:])
    torch.testing.assert_close(scores, (speaker * clips[2:]).sum(-1).mean(-1))
    torch.testing.assert_close(scores[0], trial_scores(speaker[None], net.embed(x[2:3, :, :4]))[0])
    torch.testing.assert_close(trial_scores(clips, clips), torch.ones(4, dtype=torch.float64))
    with pytest.raises(InputError, match="clips"):
        enrolled(clips[:0])


def test_equal_errors_are_equal_at_the_threshold_of_the_trials() -> None:
    scores, same = trials(3000)
    rate, threshold, low, high = equal_errors(scores, same)
    missed = float((scores[same] < threshold).double().mean())
    falsely = float((scores[~same] >= threshold).double().mean())
    assert missed == pytest.approx(rate, abs=1e-3)
    assert falsely == pytest.approx(rate, abs=1e-3)
    # two normals one deviation apart: half of it beyond
    assert rate == pytest.approx(0.5 * math.erfc(0.5 / math.sqrt(2)), abs=0.02)
    assert low < rate < high < low + 0.06
    assert equal_errors(torch.exp(scores), same).rate == pytest.approx(rate)
    development = equal_errors(*trials(3000, seed=1)).threshold
    assert float((scores[~same] >= development).double().mean()) == pytest.approx(rate, abs=0.05)


def test_equal_errors_at_their_edges() -> None:
    same = torch.tensor([True, True, False, False, False])
    right, wrong = torch.tensor([0.8, 0.9, 0.1, 0.2, 0.3]), torch.tensor([0.1, 0.2, 0.7, 0.8, 0.9])
    found = equal_errors(right, same)
    assert found[:1] + found[2:] == (0.0, 0.0, 0.0)
    assert bool(((right >= found.threshold) == same).all())
    assert equal_errors(wrong, same).rate == 1.0
    assert equal_errors(torch.zeros(5), same).rate == 0.5
    assert min_detection_cost(right, same) == 0.0
    assert min_detection_cost(wrong, same) == min_detection_cost(torch.zeros(5), same) == 1.0


def test_the_least_detection_cost_is_that_of_the_best_threshold() -> None:
    scores, same = trials()
    costs = [
        (5 * 0.05 * float((scores[same] < t).double().mean()) + 2 * 0.95 * float((scores[~same] >= t).double().mean()))
        / 0.25
        for t in [*scores.tolist(), 100.0]
    ]
    assert min_detection_cost(scores, same, 0.05, 5.0, 2.0) == pytest.approx(min(costs))
    for call, named in (
        (lambda: equal_errors(scores, torch.ones_like(same)), "trials_of_two_speakers"),
        (lambda: equal_errors(scores[1:], same), "scores, same"),
        (lambda: equal_errors(scores / 0, same), "scores: expected finite"),
        (lambda: min_detection_cost(scores, same, 1.0), "prior"),
    ):
        with pytest.raises(InputError, match=named):
            call()


def test_wrong_arguments_are_named() -> None:
    net, x = model(None), stack()
    for wrong in (x[:, :4], x[..., :5], x[0]):
        with pytest.raises(InputError, match="x:"):
            net(wrong)
    for mask in (torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 9)):
        with pytest.raises(InputError, match="mask"):
            net(x, mask)
    with pytest.raises(InputError, match="front"):
        LayerAwareTDNN(6, front="xvector")
    with pytest.raises(InputError, match="layers"):
        LayerAttentionPool(6, 12, layers=1, heads=3)
    with pytest.raises(InputError, match="heads"):
        LayerAttentionPool(6, 12, layers=4, heads=5)
    with pytest.raises(InputError, match="slices"):
        Ecapa2d(6, channels=12)
    with pytest.raises(InputError, match="depth"):
        D3Net(6, channels=6)
    with pytest.raises(InputError, match="one set"):
        net.train()(x[:1])
    with pytest.raises(InputError, match="labels"):
        AamSoftmax(4, classes=3)(torch.randn(1, 4), torch.tensor([3]))
    with pytest.raises(InputError, match="margin"):
        AamSoftmax(4, classes=3, margin=4.0)


def test_a_verifier_hears_sounds_and_comes_back(tmp_path: Path) -> None:
    encoder = load(str(tiny.wav2vec2(tmp_path / "encoder")))
    torch.manual_seed(0)
    verifier = SpeakerVerifier.on(encoder, channels=16, hidden=16, loss_heads=2)
    assert (verifier.pool.dim, verifier.pool.layers) == (32, 3)
    sounds = [torch.randn(n) for n in (4000, 6000)]
    embedded = verifier.embed(sounds)
    assert embedded.shape == (2, 2, 96)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(2, 2))
    # what stands beside a sound does not change it
    torch.testing.assert_close(verifier.embed(sounds[:1]), embedded[:1])
    torch.testing.assert_close(verifier.score(sounds, sounds), torch.ones(2))
    verifier.save(tmp_path / "saved")
    torch.testing.assert_close(
        SpeakerVerifier.load(tmp_path / "saved", encoder).embed(sounds), embedded, rtol=0, atol=0
    )
    assert verifier.cost(sounds).parameters == sum(p.numel() for p in verifier.pool.parameters())
    other = load(str(tiny.vit(tmp_path / "images")))
    with pytest.raises(InputError, match="encoder: expected one of sound"):
        SpeakerVerifier.on(other)
    with pytest.raises(InputError, match="sounds: expected at least one"):
        verifier.embed([])
    with pytest.raises(InputError, match="holds no whole speaker verifier"):
        SpeakerVerifier.load(tmp_path, encoder)


def test_spans_are_left_out_of_all_layers_of_some_clips() -> None:
    x = torch.ones(4, 2, 40, 3)
    lost = span_out(x, share=0.5, start=0.1, generator=torch.Generator().manual_seed(1)) == 0
    assert bool((lost == lost[:, :1, :, :1]).all())
    of_clip = lost[:, 0, :, 0]
    assert 0 < int(of_clip.any(1).sum()) < 4
    for clip in of_clip[of_clip.any(1)]:
        runs = [len(run) for run in "".join("x" if gone else " " for gone in clip[:-3].tolist()).split()]
        assert min(runs) >= 3
    assert torch.equal(span_out(x, share=0.0), x)
    with pytest.raises(InputError, match="share, start"):
        span_out(x, share=2.0)


def test_crops_are_stretches_of_the_sound() -> None:
    sound = torch.arange(10.0)
    starts = {int(random_crop_of(sound, 8)[0]) for _ in range(100)}
    assert starts == {0, 1, 2}
    assert random_crop_of(sound, 8).diff().eq(1).all()


def test_the_recipe_learns_to_tell_speakers_apart() -> None:
    def encode(sounds: list[Tensor]) -> tuple[Tensor, None]:
        frames = torch.stack([s.view(5, 16) for s in sounds])
        return torch.stack([frames, frames.abs()], 1), None

    torch.manual_seed(0)
    verifier = SpeakerVerifier(encode, rate=80, dim=16, layers=2, channels=16, hidden=16, front=None, dropout=0.0)
    voices = torch.randn(3, 16)
    speakers = torch.arange(24) % 3
    sounds = [(voices[k] + 0.3 * torch.randn(10, 16)).flatten() for k in speakers.tolist()]
    history = train_speakers(verifier, sounds, speakers, steps=120, batch=16, seconds=1.0, spans=True)
    assert history.losses[1] < history.losses[0]
    assert not verifier.pool.training
    cut = [s[:80] for s in sounds]
    scores = verifier.score([cut[i] for i in range(12) for _ in range(12)], cut[12:24] * 12)
    same = (speakers[:12, None] == speakers[None, 12:]).flatten()
    assert equal_errors(scores, same).rate < 0.1
    with pytest.raises(InputError, match="speakers: expected one for each"):
        train_speakers(verifier, sounds, speakers[:2])
    with pytest.raises(InputError, match="rise"):
        train_speakers(verifier, sounds, speakers, rise=1.0)
