import sys

import numpy as np
import pytest
import torch
from tests.pools import by_rules, features, shaken

from cenote.core import Bags, InputError, PaddedTokens
from cenote.pool import (
    FactorGraphAttention,
    StaV2a,
    StaV2aOnsets,
    StaV2aPrompt,
    aa_align,
    append_prompt,
    onset_loss,
    onset_targets,
    onset_times,
    window_mean,
)
from cenote.testing import check_pool

# the prompt


def test_without_potentials_it_is_the_mean_of_the_mapped_frames() -> None:
    pool, x = shaken(StaV2aPrompt(16)), features()
    with torch.no_grad():
        pool.attention.reduce.zero_()
    pooled, weights = pool.attention.attend(pool.fc(x))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))
    torch.testing.assert_close(pooled, pool.fc(x).mean(1))
    torch.testing.assert_close(pool(x), pool.conv(pool.fc(x).mean(1, keepdim=True)))


def test_agreement_is_the_mean_of_the_table_of_cosines() -> None:
    pool, x = shaken(FactorGraphAttention(16)), features(2, 7)
    first, second = (torch.nn.functional.normalize(m(x), dim=-1) for m in (pool.first, pool.second))
    table = first @ second.transpose(1, 2)
    torch.testing.assert_close(pool.agreement(PaddedTokens(x)).squeeze(-1), table.mean(2))
    # of the real frames alone
    mask = torch.tensor([[True] * 7, [True, False, True, True, False, False, True]])
    found = pool.agreement(PaddedTokens(x, mask))[1, mask[1]].squeeze(-1)
    torch.testing.assert_close(found, table[1][mask[1]][:, mask[1]].mean(1))


def test_one_frame_and_identical_frames() -> None:
    pool, x = shaken(StaV2aPrompt(16)), features(2, 1)
    pooled, weights = pool.attention.attend(pool.fc(x))
    torch.testing.assert_close(pooled, pool.fc(x).squeeze(1))
    torch.testing.assert_close(weights, torch.ones_like(weights))
    same = pool.attend(x.expand(2, 6, 16)).weights
    torch.testing.assert_close(same, torch.full_like(same, 1 / 6))


def test_attention_follows_the_larger_potential() -> None:
    pool, x = shaken(FactorGraphAttention(16)), features()
    with torch.no_grad():
        pool.reduce.copy_(torch.tensor([100.0, 0.0]))
    assert torch.equal(pool.attend(x).weights.argmax(-1)[:, 0], pool.unary_potential(x).argmax(1)[:, 0])
    with torch.no_grad():
        pool.reduce.copy_(torch.tensor([0.0, 1000.0]))
    assert torch.equal(pool.attend(x).weights.argmax(-1)[:, 0], pool.agreement(PaddedTokens(x)).argmax(1)[:, 0])


def test_dropout_is_a_matter_of_training_unless_asked_for() -> None:
    x = features()
    for always in (False, True):
        pool = shaken(FactorGraphAttention(16, always_dropout=always))
        torch.manual_seed(0)
        assert torch.equal(pool(x), pool(x)) is not always
        torch.manual_seed(0)
        pool.train()
        assert not torch.equal(pool(x), pool(x))


def test_the_order_of_frames_leaves_the_prompt_and_no_frame_gives_zeros() -> None:
    pool, x = shaken(StaV2aPrompt(16)), features()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(x[:, order]), pool(x))
    torch.testing.assert_close(pool.attend(x[:, order]).weights, pool.attend(x).weights[..., order])
    mask = torch.tensor([[True] * 9, [False] * 9])
    y = pool(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    torch.testing.assert_close(y[0], pool(x)[0])
    assert torch.equal(y[1], torch.zeros_like(y[1]))


@pytest.mark.parametrize("potentials", [("unary",), ("agreement",), ()])
def test_one_potential_alone_or_none(potentials: tuple) -> None:
    whole, part, x = shaken(StaV2aPrompt(16)), StaV2aPrompt(16, potentials=potentials), features()
    part.double().eval().load_state_dict(whole.state_dict())
    with torch.no_grad():
        for i, name in enumerate(("unary", "agreement")):
            if name not in potentials:
                whole.attention.reduce[i] = 0
    torch.testing.assert_close(part(x), whole(x))
    if not potentials:
        torch.testing.assert_close(part(x), part.conv(part.fc(x).mean(1, keepdim=True)))


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings",
    [{"prompts": 1, "width": 6}, {"potentials": ()}, {"potentials": ["unary"]}, {"potentials": ["agreement"]}],
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(StaV2aPrompt(16, **settings), leave_out=left_out)


def test_paper_size() -> None:
    pool = StaV2aPrompt(512, width=1024)
    assert pool.out_dim == 1024
    assert pool.vectors == 4
    assert sum(p.numel() for p in pool.attention.parameters()) == 3 * (1024 * 1024 + 1024) + 1025 + 2


# the onsets


def written_out(x: torch.Tensor, w: int) -> torch.Tensor:
    length = x.shape[1]
    return torch.stack([x[:, max(t - w, 0) : min(t + w, length)].mean(1) for t in range(length)], 1)


@pytest.mark.parametrize("w", [1, 2, 5, 30])
def test_windows_are_half_open_and_cut_at_the_ends(w: int) -> None:
    x = features(2, 13)
    torch.testing.assert_close(window_mean(x, w), written_out(x, w))
    torch.testing.assert_close(window_mean(torch.full_like(x, 3.5), w), torch.full_like(x, 3.5))


def test_a_window_of_one_sees_the_frame_and_the_one_before() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1)
    assert window_mean(x, 1).flatten().tolist() == [1.0, 1.5, 3.0, 6.0]


def test_a_masked_window_counts_real_frames() -> None:
    x, mask = features(2, 9), torch.arange(9) < torch.tensor([[9], [4]])
    dirty = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    masked = window_mean(dirty, 2, mask)
    torch.testing.assert_close(masked[0], written_out(x, 2)[0])
    torch.testing.assert_close(masked[1, :4], written_out(x[1:, :4], 2)[0])
    assert masked.isfinite().all()


def test_frames_are_stretched_to_the_grid_of_the_sound() -> None:
    model = shaken(StaV2aOnsets(3, 4, 2, windows=(), condition=2))
    x = features(1, 40, 3)
    nearest = torch.nn.functional.interpolate(model.mlp(x).transpose(1, 2), scale_factor=6.25, mode="nearest")
    stretched = torch.cat([nearest, nearest[..., -1:].expand(-1, -1, 6)], -1).transpose(1, 2)
    assert stretched.shape[1] == 256
    torch.testing.assert_close(model(x).features, torch.nn.functional.silu(model.feature(stretched)))


def test_a_clip_that_ends_early_is_as_if_it_were_alone() -> None:
    model, x = shaken(StaV2aOnsets(16, 8, 4, condition=6, latent_frames=60)), features(3, 9)
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]])
    found = model(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    torch.testing.assert_close(found.logits[:1], model(x[:1]).logits)
    torch.testing.assert_close(found.features[1:2], model(x[1:2, :4]).features)
    assert not found.features[2].any()
    assert not found.logits[2].any()
    assert model(x[:, :0]).logits.shape == (3, 60, 2)


def test_loss_is_that_of_every_latent_frame() -> None:
    logits = features(2, 5, 2)
    targets = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]])
    binary = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., 1] - logits[..., 0], targets.double())
    torch.testing.assert_close(onset_loss(logits, targets), binary)


def test_targets_stand_where_the_onsets_are() -> None:
    assert onset_targets([0.0, 0.04, 10.23, 10.24, 99.0]).nonzero().flatten().tolist() == [0, 1, 255]
    # 0.28 * 25 is 7.000000000000001, 0.29 * 100 is 28.999999999999996
    assert onset_targets([0.29], 100, 100).argmax() == 29


# the metric


def test_alignment_of_a_sound_with_itself_is_one() -> None:
    onsets = [0.3, 0.9, 1.1, 4.0]
    assert aa_align(onsets, onsets) == 1.0
    assert aa_align([], []) == 1.0
    assert aa_align(onsets, []) == aa_align([], onsets) == 0.0


def test_alignment_counts_hits_of_generated_onsets() -> None:
    assert aa_align([1.0, 2.0], [1.05, 2.5, 3.0]) == 1 / 4
    # strictly nearer than the tolerance (numbers that are exact in binary)
    assert aa_align([1.0], [1.125], tolerance=0.125) == 0.0
    assert aa_align([1.0], [1.124], tolerance=0.125) == 1.0
    assert aa_align([0.5], [0.6]) == aa_align([0.6], [0.5]) == aa_align([2.0], [2.1]) == 0.0
    # not one to one: both hit the same, and the formula passes 1
    assert aa_align([1.0], [0.99, 1.01]) == 2.0


def test_alignment_one_to_one_makes_the_most_pairs() -> None:
    assert aa_align([1.0], [0.99, 1.01], one_to_one=True) == 1 / 2
    # the nearest pair first would leave the two others without
    assert aa_align([1.0, 1.09], [1.08, 1.17], one_to_one=True) == 1.0
    assert aa_align([], [], one_to_one=True) == 1.0
    generator = np.random.default_rng(0)
    for _ in range(200):
        there, made = (generator.uniform(0, 0.6, generator.integers(1, 6)).tolist() for _ in range(2))
        most = most_pairs(there, made)
        assert aa_align(there, made, one_to_one=True) == most / (len(there) + len(made) - most) <= 1


def most_pairs(there: list[float], made: list[float]) -> int:
    """Tried out: the first onset goes with any that is near, or with none."""
    if not there:
        return 0
    rest = there[1:]
    pairs = [
        1 + most_pairs(rest, made[:i] + made[i + 1 :]) for i, m in enumerate(made) if abs(m - there[0]) < 0.1 - 1e-9
    ]
    return max([most_pairs(rest, made), *pairs])


@pytest.mark.slow("librosa compiles for 15 seconds")
def test_onsets_of_a_sound_are_found() -> None:
    pytest.importorskip("librosa", reason="cenote[audio] is not installed")
    rate, times = 16_000, [0.5, 1.2, 2.0]
    audio = 1e-4 * np.random.default_rng(0).standard_normal(3 * rate).astype(np.float32)
    for t in times:
        decay = np.exp(-np.arange(rate // 4) / (rate / 40))
        audio[int(t * rate) : int(t * rate) + rate // 4] += decay * np.sin(np.arange(rate // 4) * 0.4)
    # two onsets are at least 5 frames of librosa's apart
    found = onset_times(torch.from_numpy(audio), rate, wait=5)
    assert len(found) == 3
    assert np.abs(np.array(found) - times).max() < 0.05
    assert aa_align(times, found) == 1.0
    assert onset_times(np.zeros(rate), rate) == []


# the generator


@pytest.fixture
def unet():
    diffusers = pytest.importorskip("diffusers", reason="cenote[diffusers] is not installed")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    ).eval()


def generator(unet, prompts: int = 4, latent_frames: int = 8) -> StaV2a:
    torch.manual_seed(1)
    onsets = StaV2aOnsets(6, 8, 4, windows=(1, 2), condition=5, latent_frames=latent_frames)
    return StaV2a(unet, StaV2aPrompt(6, 32, prompts), onsets).eval()


def told(batch: int = 2):
    g = torch.Generator().manual_seed(2)
    latents, text, video = (torch.randn(s, generator=g) for s in ((batch, 4, 8, 4), (batch, 5, 32), (batch, 3, 6)))
    return latents, text, video


def moved(model: StaV2a) -> StaV2a:
    """The ControlNet away from its zeros."""
    with torch.no_grad():
        for part in (model.controlnet.controlnet_down_blocks, model.controlnet.controlnet_mid_block):
            for p in part.parameters():
                p.normal_(0, 0.2)
        for p in model.controlnet.controlnet_cond_embedding.parameters():
            p.normal_(0, 0.5)
    return model


@torch.no_grad()
def test_the_untrained_model_is_the_unet_with_a_longer_prompt(unet) -> None:
    model, (latents, text, video) = generator(unet), told()
    prompt = torch.cat([text, model.prompt(video)], 1)
    torch.testing.assert_close(model(latents, 7, text, video), unet(latents, 7, prompt).sample, atol=1e-5, rtol=1e-5)
    # without either view it is the U-Net alone
    bare = StaV2a(unet).eval()
    torch.testing.assert_close(bare(latents, 7, text, video), unet(latents, 7, text).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_control_net_is_a_copy_whose_condition_enters_after_the_first_convolution(unet) -> None:
    model, (latents, text, video) = moved(generator(unet)), told()
    seen = model.watch(video)
    states = torch.cat([text, seen.tokens], 1)
    down, mid = model.controlnet(
        latents,
        7,
        states,
        controlnet_cond=seen.condition.unsqueeze(-1).repeat(1, 1, 1, 4),
        return_dict=False,
    )
    expected = unet(latents, 7, states, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    torch.testing.assert_close(model(latents, 7, text, video), expected, atol=1e-5, rtol=1e-5)
    for name, p in unet.down_blocks.named_parameters():
        assert torch.equal(p, dict(model.controlnet.down_blocks.named_parameters())[name])
    # both views are heard
    other = model(latents, 7, text, video.flip(1) + 1)
    assert (other - expected).abs().max() > 1e-3
    mute = seen._replace(condition=torch.zeros_like(seen.condition))
    assert (model(latents, 7, text, mute) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_masked_text_is_read_by_neither_net(unet) -> None:
    model, (latents, text, video) = moved(generator(unet)), told()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = model(latents, 7, text, video, mask)
    changed = text.masked_fill(~mask.unsqueeze(-1), 50.0)
    torch.testing.assert_close(model(latents, 7, changed, video, mask), found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:], model(latents[1:], 7, text[1:, :3], video[1:]), atol=1e-4, rtol=1e-4)
    # nothing is left hanging on the ControlNet
    assert not any(b._forward_pre_hooks for b in model.controlnet.modules())


@torch.no_grad()
def test_guidance_is_on_the_text_alone(unet) -> None:
    model, (latents, text, video) = moved(generator(unet)), told()
    seen = model.watch(video)
    without = model(latents, 7, torch.zeros_like(text), video)
    with_text = model(latents, 7, text, video)
    guided = model.guided(latents, 7, text, seen, guidance=3.0)
    torch.testing.assert_close(guided, without + 3 * (with_text - without), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.guided(latents, 7, text, seen, guidance=1.0), with_text)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_that_of_the_noise_or_velocity(unet, kind: str) -> None:
    from diffusers import DDPMScheduler

    model, (latents, text, video) = generator(unet), told()
    scheduler = DDPMScheduler(prediction_type=kind)

    def draw(**settings) -> float:
        g = torch.Generator().manual_seed(3)
        return float(model.loss(latents, text, video, scheduler, text_dropout=0.0, generator=g, **settings).detach())

    g = torch.Generator().manual_seed(3)
    noise, steps = torch.randn(latents.shape, generator=g), torch.randint(1000, (2,), generator=g)
    kept = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    target = noise if kind == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
    with torch.no_grad():
        errors = (model(noisy, steps, text, video) - target).square().flatten(1).mean(1)
    assert draw() == pytest.approx(float(errors.mean()), rel=1e-4)
    snr = (kept / (1 - kept)).flatten()
    weights = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    assert draw(min_snr=5.0) == pytest.approx(float((weights * errors).mean()), rel=1e-4)


def test_what_is_frozen_stays_and_the_rest_learns(unet) -> None:
    from diffusers import DDPMScheduler

    model, (latents, text, video) = generator(unet).train(), told(4)
    assert not model.unet.training
    assert not model.onsets.training
    assert model.prompt.training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        optimiser.zero_grad()
        model.loss(latents, text, video, DDPMScheduler(), generator=g).backward()
        optimiser.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith(("unet.", "onsets.")) for k in changed)
    assert {"prompt.fc.weight", "controlnet.conv_in.weight", "controlnet.controlnet_cond_embedding.weight"} <= changed
    assert StaV2a(unet, train_unet=True).unet.conv_in.weight.requires_grad


def test_dropped_texts_are_zeros(unet) -> None:
    from diffusers import DDPMScheduler

    model, (latents, text, video) = generator(unet), told()

    def draw(text, share: float) -> float:
        g = torch.Generator().manual_seed(3)
        loss = model.loss(latents, text, video, DDPMScheduler(), text_dropout=share, generator=g)
        return float(loss.detach())

    assert draw(text, 1.0) == pytest.approx(draw(torch.zeros_like(text), 0.0))
    assert draw(text, 1.0) != pytest.approx(draw(text, 0.0))


def test_a_sound_is_made(unet) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    model, (_, text, video) = moved(generator(unet)), told()
    for scheduler in (DDPMScheduler(), DDIMScheduler()):
        sounds = [
            model.generate(text, video, scheduler, steps=3, frequencies=4, generator=torch.Generator().manual_seed(s))
            for s in (0, 0, 1)
        ]
        assert sounds[0].shape == (2, 4, 8, 4)
        assert sounds[0].isfinite().all()
        assert torch.equal(sounds[0], sounds[1])
        assert not torch.equal(sounds[0], sounds[2])


def test_one_prompt_token_is_still_a_token(unet) -> None:
    model, (latents, text, video) = generator(unet, prompts=1), told()
    assert model.watch(video).tokens.shape == (2, 1, 32)
    assert model(latents, 7, text, video).shape == latents.shape


def test_wrong_arguments_are_named(unet) -> None:
    with pytest.raises(InputError, match="dropout"):
        FactorGraphAttention(4, dropout=1.0)
    with pytest.raises(InputError, match="prompts"):
        StaV2aPrompt(4, prompts=0)
    with pytest.raises(InputError, match="potentials"):
        StaV2aPrompt(4, potentials=["pairwise"])
    for name, settings in (("windows", {"windows": (0,)}), ("fps", {"fps": 0})):
        with pytest.raises(InputError, match=name):
            StaV2aOnsets(4, **settings)
    onsets, x = StaV2aOnsets(4, 4, 4), torch.randn(1, 3, 4)
    with pytest.raises(InputError, match="first"):
        onsets(x, torch.tensor([[True, False, True]]))
    with pytest.raises(InputError, match="Bags"):
        onsets(Bags.from_padded(x))
    with pytest.raises(InputError, match="half_width"):
        window_mean(x, 0)
    with pytest.raises(InputError, match="targets"):
        onset_loss(torch.zeros(1, 4, 2), torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="times"):
        onset_targets([-1.0])
    with pytest.raises(InputError, match="tolerance"):
        aa_align([1.0], [1.0], tolerance=0.0)
    with pytest.raises(InputError, match="text_mask"):
        append_prompt(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="tokens"):
        append_prompt(torch.zeros(1, 3, 4), torch.zeros(1, 2, 5))
    with pytest.raises(InputError, match="width 32"):
        StaV2a(unet, StaV2aPrompt(4, 16))
    latents, text, video = told()
    with pytest.raises(InputError, match="latent_frames"):
        generator(unet, latent_frames=9)(latents, 1, text, video)


def test_a_missing_extra_is_named(unet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"cenote\[diffusers\]"):
        generator(unet)
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(InputError, match=r"cenote\[audio\]"):
        onset_times(np.ones(10), 16_000)
