"""Denoising loops: what is seen before a step, what is set, what a look returns, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.live import zoo
from tests.pools import thoroughly_but
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import (
    AttentionCall,
    AttentionEdit,
    AttentionMaps,
    Denoising,
    DenoisingStep,
    Look,
    MapRecorder,
    Place,
    RowEdit,
    RowRecorder,
    Where,
    denoising,
    edited,
    recorded,
    spans,
)

# of diffusers, whose schedulers make numpy arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

CROSS = Where(kinds=["cross"])
EVERYWHERE = Where(kinds=["cross", "self"])
STEPS = 3
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {"num_train_timesteps": 100},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}
# of first order, of second, that keeps what it was given, that skips it
QUICK = {"DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "DPMSolverSinglestepScheduler"}
OF_TWO = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "PNDMScheduler",
)
"""That evaluate the denoiser twice in the first step, if not in all."""


def scheduler(name: str = "EulerDiscreteScheduler", **settings: Any) -> Any:
    return getattr(zoo.diffusers(), name)(**{**SCHEDULERS.get(name, {}), **settings})


def unet(**settings: Any) -> nn.Module:
    if not settings:
        return zoo.unet("").model
    torch.manual_seed(0)
    return zoo.diffusers().UNet2DConditionModel(**{**zoo.unet("").model.config, **settings}).eval()


def noise(items: int = 2, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(items, channels, size, size, generator=torch.Generator().manual_seed(5))


def states(rows: int = 4) -> Tensor:
    return torch.randn(rows, 5, 12, generator=torch.Generator().manual_seed(6))


Changes = dict[int, Callable[[Tensor], Tensor]]


@torch.no_grad()
def loop(
    model: nn.Module, schedule: Any, z: Tensor, read: Tensor, steps: int = STEPS, changes: Changes | None = None
) -> Tensor:
    """As pipelines do it, with guidance where twice as many rows are read as there are latents.

    `changes` change the latents before an evaluation, by its number.
    """
    schedule.set_timesteps(steps)
    copies = len(read) // len(z)
    for number, t in enumerate(schedule.timesteps):
        if changes and number in changes:
            z = changes[number](z)
        x = torch.cat([z] * copies)
        if hasattr(schedule, "scale_model_input"):
            x = schedule.scale_model_input(x, t)
        predicted = model(x, t, encoder_hidden_states=read).sample
        if copies == 2:
            without, told = predicted.chunk(2)
            predicted = without + 3.0 * (told - without)
        torch.manual_seed(number)
        z = schedule.step(predicted, t, z).prev_sample
    return z


def pipeline(folder: Path, seed: int = 0, name: str = "DDIMScheduler") -> Any:
    """Stable Diffusion, of tiny parts: a text model of eight tokens, 8 x 8 latents."""
    library, of_text = zoo.diffusers(), tiny.transformers()
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{c}</w>" for c in letters),
        "ca",
        "cat</w>",
        "ha",
        "hat</w>",
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nh a\nha t</w>\n")
    tokenizer = of_text.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    torch.manual_seed(seed)
    config = of_text.CLIPTextConfig(
        vocab_size=len(words), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    made = library.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=of_text.CLIPTextModel(config).eval(), tokenizer=tokenizer,
        unet=unet(), scheduler=scheduler(name, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def autoencoder() -> nn.Module:
    return zoo.diffusers().AutoencoderKL(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=2, sample_size=8,
    ).eval()  # fmt: skip


def painted(pipe: Any, prompts: Sequence[str] = ("a cat hat", "a hat"), guidance: float = 5.0, **more: Any) -> Tensor:
    return pipe(
        list(prompts), num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator().manual_seed(3), height=8, width=8, **more,
    ).images  # fmt: skip


def looking(step: DenoisingStep) -> None:
    look = step.look()
    look.gradient(look.prediction.square().sum())


def everything(run: Any) -> list[Any]:
    """What entering could leave on a denoiser or a scheduler."""
    found: list[Any] = []
    for module in run.modules() if isinstance(run, nn.Module) else ():
        own = vars(module)
        found.append([(k, list(v)) for k, v in own.items() if isinstance(v, dict) and "hook" in k])
        found.append(("forward" in own, module.training))
        found += [(k, id(p), p._version, p.requires_grad, p.grad) for k, p in module.named_parameters()]
    if not isinstance(run, nn.Module):
        found += [sorted(vars(run)), run.step, getattr(run, "scale_model_input", None)]
    return found


class Halved(AttentionEdit):
    """Heads give half."""

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        return y / 2


class Louder(RowEdit):
    """Queries of conditional rows take twice as much from a span."""

    at = CROSS
    asks = ("cat",)

    def queries(self, call: AttentionCall) -> Tensor:
        assert call.conditional is not None
        return call.conditional[:, None].expand(-1, call.queries)

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        weights = weights * (1 + call.keys_in("cat")[:, None, None])
        return weights / weights.sum(-1, keepdim=True)


CAT = torch.tensor([[False, True, False, False, False], [False, False, True, True, False]])


def test_kinds_are_several() -> None:
    place = Place(0, "cross", "blocks", "blocks.0.attn2", nn.Identity())
    with pytest.raises(InputError, match="kinds: expected names"):
        AttentionMaps({place: torch.full((1, 2, 16, 5), 0.2)}).mean(4, 4, kinds="cross")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- what stays as it is


@pytest.mark.parametrize("name", thoroughly_but(QUICK, SCHEDULERS, "a scheduler of a kind that is there"))
@pytest.mark.parametrize("guided", [True, False])
def test_a_loop_that_is_looked_into_is_the_same_to_the_bit(name: str, guided: bool) -> None:
    model, z, read = unet(), noise(), states(4 if guided else 2)
    plain = loop(model, scheduler(name), z, read)
    indices: list[int] = []

    def on_step(step: DenoisingStep) -> None:
        indices.append(step.index)
        assert step.conditional.tolist() == ([False, False, True, True] if guided else [True, True])
        looking(step)

    with denoising(model, scheduler=(schedule := scheduler(name)), on_step=on_step, maps=EVERYWHERE) as run:
        assert torch.equal(loop(model, schedule, z, read), plain)
    assert indices == ([0, 1] if "Singlestep" in name else list(range(STEPS)))
    assert run.now is None


def test_a_pipeline_is_the_same_to_the_bit_and_put_back(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    plain = painted(pipe, eta=0.7)
    before = everything(pipe.unet), everything(pipe.scheduler)
    signature = inspect.signature(pipe.scheduler.step)
    with denoising(pipe, MapRecorder(), on_step=looking, maps=CROSS):
        assert inspect.signature(pipe.scheduler.step) == signature
        assert torch.equal(painted(pipe, eta=0.7), plain)
    assert (everything(pipe.unet), everything(pipe.scheduler)) == before
    assert torch.equal(painted(pipe, eta=0.7), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["step", "look", "edit"])
def test_everything_is_put_back_after_an_error(tmp_path: Path, error: type[BaseException], where: str) -> None:
    pipe = pipeline(tmp_path, name="EulerDiscreteScheduler")
    plain = painted(pipe)
    before = everything(pipe.unet), everything(pipe.scheduler)

    class Failing(AttentionEdit):
        def context(self, call: AttentionCall, y: Tensor) -> Tensor:
            if where == "edit" or (where == "look" and y.requires_grad):
                raise error("mine")
            return y

    def on_step(step: DenoisingStep) -> None:
        if step.index == 1 and where == "step":
            step.latents = step.latents + 1
            raise error("mine")
        if where == "look":
            step.look()

    with pytest.raises(error, match="mine"), denoising(pipe, Failing(), on_step=on_step, maps=CROSS):
        painted(pipe)
    assert (everything(pipe.unet), everything(pipe.scheduler)) == before
    assert torch.equal(painted(pipe), plain)
    assert torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()


def test_parameters_gather_nothing_and_looks_are_let_go() -> None:
    model = unet()
    frozen = next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    kept: list[weakref.ref[Any]] = []

    def on_step(step: DenoisingStep) -> None:
        look = step.look()
        look.gradient(look.maps.mean(8, 8).square().sum())
        kept.extend([weakref.ref(look), *map(weakref.ref, look.maps.weights.values()), weakref.ref(look.prediction)])

    with denoising(model, scheduler=(schedule := scheduler()), on_step=on_step, maps=CROSS) as run:
        loop(model, schedule, noise(), states())
        gc.collect()
        assert len(kept) > 2 * STEPS
        assert all(ref() is None for ref in kept)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before
    assert not frozen.requires_grad
    assert run.now is None


# --------------------------------------------------------------------------------------------------------- gradients of looks


class Stored:
    """A processor that writes attention out and keeps its weights, as those of published releases do."""

    def __init__(self, cross: bool, kept: list[Tensor]) -> None:
        self.cross, self.kept = cross, kept

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = map(attn.head_to_batch_dim, (attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read)))
        weights = (q @ k.mT * attn.scale).softmax(-1)
        if self.cross:
            self.kept.append(weights.unflatten(0, (len(hidden_states), -1)))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def stored(model: Any, run: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    before = dict(model.attn_processors)
    model.set_attn_processor({name: Stored("attn2" in name, kept) for name in before})
    run()
    model.set_attn_processor(before)
    return kept


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_gradients_are_those_of_the_denoiser_called_directly(name: str) -> None:
    model, read = unet().double(), states().double()
    gradients: list[tuple[Tensor, Tensor]] = []
    probe = torch.randn(2, 5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def on_step(step: DenoisingStep) -> None:
        look = step.look()
        ours = look.gradient((look.maps.mean(8, 8) * probe).sum())
        z = step.latents.clone().requires_grad_()
        x = real(z, step.timestep)

        def plainly() -> None:
            model(x, step.timestep, encoder_hidden_states=read[2:])

        found = [m for m in stored(model, plainly) if m.shape[2] == 64]
        assert len(found) > 1
        maps = torch.cat(found, 1).mean(1).mT.reshape(2, 5, 8, 8)
        assert torch.allclose(maps, look.maps.mean(8, 8), atol=1e-12)
        gradients.append((ours, torch.autograd.grad((maps * probe).sum(), z)[0]))

    schedule = scheduler(name)
    real = schedule.scale_model_input
    with denoising(model, scheduler=schedule, on_step=on_step, maps=CROSS):
        loop(model, schedule, noise().double() * 3, read)
    assert len(gradients) == STEPS
    for ours, theirs in gradients:
        assert ours.abs().max() > 1e-8
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-14)


def test_gradients_are_finite_differences() -> None:
    model, read = unet().double(), states().double()
    direction = noise().double()

    def loss(look: Look) -> Tensor:
        return look.maps.of(CAT, 8, 8)[:, 2:5, 2:5].sum() + look.prediction.square().mean()

    def on_step(step: DenoisingStep) -> None:
        look = step.look()
        told = (look.gradient(loss(look)) * direction).sum()
        ahead, behind = (loss(step.look(step.latents + h * direction)) for h in (1e-5, -1e-5))
        seen.append(bool(torch.isclose((ahead - behind) / 2e-5, told, rtol=1e-6, atol=1e-10)))

    seen: list[bool] = []
    with denoising(model, scheduler=(schedule := scheduler()), on_step=on_step, maps=CROSS):
        loop(model, schedule, noise().double(), read)
    assert seen == [True] * STEPS


def test_a_look_keeps_the_graph_of_its_latents_and_several_gradients() -> None:
    model = unet()
    factor = torch.tensor(1.5, requires_grad=True)

    def on_step(step: DenoisingStep) -> None:
        look = step.look(step.latents * factor)
        first = look.gradient(look.prediction.sum(), retain=True)
        assert torch.equal(first, look.gradient(look.prediction.sum((1, 2, 3)), retain=True))
        (found,) = torch.autograd.grad(look.prediction.sum(), factor)
        assert torch.allclose(found, (first * step.latents).sum(), rtol=1e-4)

    with denoising(model, scheduler=(schedule := scheduler()), on_step=on_step):
        loop(model, schedule, noise(), states(), 1)


def test_a_look_at_places_of_one_size() -> None:
    def on_step(step: DenoisingStep) -> None:
        whole, some = step.look().maps, step.look(queries=16).maps
        assert {w.shape[2] for w in whole.weights.values()} == {16, 64}
        assert {w.shape[2] for w in some.weights.values()} == {16}
        assert torch.allclose(whole.mean(4, 4), some.mean(4, 4), atol=1e-6)
        assert torch.allclose(whole.mean(8, 8).sum(1), torch.ones(2, 8, 8))
        assert torch.allclose(whole.of(CAT, 8, 8)[1], whole.mean(8, 8)[1, 2:4].mean(0))
        assert torch.equal(whole.of(CAT[1:], 8, 8)[1], whole.of(CAT, 8, 8)[1])

    with denoising(model := unet(), scheduler=(schedule := scheduler()), on_step=on_step, maps=EVERYWHERE):
        loop(model, schedule, noise(), states(), 1)


# ------------------------------------------------------------------------------------------------------- latents that are set


@pytest.mark.parametrize("name", thoroughly_but(QUICK, SCHEDULERS, "a scheduler of a kind that is there"))
@pytest.mark.parametrize("at", [0, 1])
def test_latents_that_are_set_act_in_their_own_step(name: str, at: int) -> None:
    model, z, read = unet(), noise(), states()
    number = 2 * at if name in OF_TWO else at

    def change(latents: Tensor) -> Tensor:
        return latents * 0.5 + 0.1

    expected = loop(model, scheduler(name), z, read, changes={number: change})
    schedule = scheduler(name)

    def on_step(step: DenoisingStep) -> None:
        if step.index == at:
            step.latents = change(step.latents)

    def in_place(step: DenoisingStep) -> None:
        if step.index == at:
            step.latents.mul_(0.5).add_(0.1)

    given = z.clone()
    for act in (on_step, in_place):
        with denoising(model, scheduler=schedule, on_step=act):
            assert torch.equal(loop(model, schedule, z, read), expected)
        assert torch.equal(z, given)
    assert not torch.equal(loop(model, schedule, z, read), expected)


def test_latents_are_set_beside_other_channels() -> None:
    """As for inpainting: a mask and a picture stand behind the latents."""
    model, z, read, beside = unet(in_channels=9), noise(), states(), noise(4, 5)
    schedule = scheduler()

    def inpainted(change: Tensor | float) -> Tensor:
        with torch.no_grad():
            schedule.set_timesteps(2)
            latents = z
            for t in schedule.timesteps:
                latents = latents + change
                x = torch.cat([schedule.scale_model_input(torch.cat([latents] * 2), t), beside], 1)
                predicted = model(x, t, encoder_hidden_states=read).sample
                latents = schedule.step(predicted[2:], t, latents).prev_sample
            return latents

    def on_step(step: DenoisingStep) -> None:
        step.latents = step.latents + 0.25
        look = step.look()
        assert look.prediction.shape == (2, 4, 8, 8)
        assert look.gradient(look.prediction.sum()).shape == (2, 4, 8, 8)

    expected = inpainted(0.25)
    with denoising(model, scheduler=schedule, on_step=on_step):
        assert torch.equal(inpainted(0.0), expected)


def test_guidance_that_calls_one_after_the_other() -> None:
    model, z, read = unet(), noise(), states()
    schedule = scheduler()

    @torch.no_grad()
    def in_turn(change: float = 0.0) -> Tensor:
        schedule.set_timesteps(STEPS)
        latents = z
        for t in schedule.timesteps:
            latents = latents + change
            x = schedule.scale_model_input(latents, t)
            told, without = (model(x, t, encoder_hidden_states=part).sample for part in (read[2:], read[:2]))
            latents = schedule.step(without + 3 * (told - without), t, latents).prev_sample
        return latents

    def on_step(step: DenoisingStep) -> None:
        assert step.conditional.tolist() == [True, True]
        step.latents = step.latents + 0.25

    expected = in_turn(0.25)
    with denoising(model, scheduler=schedule, on_step=on_step):
        assert torch.equal(in_turn(), expected)
    with denoising(model, scheduler=schedule, on_step=lambda step: indices.append(step.index)), torch.no_grad():
        indices: list[int] = []
        in_turn()
    assert indices == list(range(STEPS))
    # an edit of a span acts in the first of the two calls alone
    with denoising(model, Louder(), scheduler=schedule, spans={"cat": CAT}):
        in_turn_edited = in_turn()
    with denoising(model, Louder(), scheduler=(other := scheduler()), spans={"cat": CAT}):
        assert torch.allclose(loop(model, other, z, read), in_turn_edited, atol=1e-4)
    assert not torch.allclose(in_turn(), in_turn_edited, atol=1e-3)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "SASolverScheduler"])
def test_schedulers_that_would_lose_latents_say_so(name: str) -> None:
    model, schedule = unet(), scheduler(name)

    def on_step(step: DenoisingStep) -> None:
        if step.index == 1:
            step.latents = step.latents + 1

    def in_place(step: DenoisingStep) -> None:
        if step.index == 1:
            step.latents.add_(1)

    for act in (on_step, in_place):
        with pytest.raises(InputError, match=f"{name} goes on from"), denoising(model, scheduler=schedule, on_step=act):
            loop(model, schedule, noise(), states())
    if name == "UniPCMultistepScheduler":
        open_to_it = scheduler(name, disable_corrector=list(range(STEPS)))
        expected = loop(model, open_to_it, noise(), states(), changes={1: lambda z: z + 1})
        with denoising(model, scheduler=open_to_it, on_step=on_step):
            assert torch.equal(loop(model, open_to_it, noise(), states()), expected)


def test_steps_are_counted_anew_in_a_second_run_and_after_one_that_broke_off() -> None:
    model, schedule = unet(), scheduler("PNDMScheduler")
    indices: list[int] = []

    def on_step(step: DenoisingStep) -> None:
        indices.append(step.index)
        if len(indices) == 2:
            raise RuntimeError("mine")

    with denoising(model, scheduler=schedule, on_step=on_step):
        with pytest.raises(RuntimeError, match="mine"):
            loop(model, schedule, noise(), states())
        loop(model, schedule, noise(), states())
        loop(model, schedule, noise(), states())
    assert indices == [0, 1, 0, 1, 2, 0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------- batch rows


def test_rows_that_are_not_as_said() -> None:
    model, schedule, z, read = unet(), scheduler(), noise(), states()

    def entered(**more: Any) -> contextlib.AbstractContextManager[Denoising]:
        return denoising(model, scheduler=schedule, on_step=lambda step: None, **more)

    with pytest.raises(InputError, match="copies: 3, and the denoiser's batch of 4"), entered(copies=3):
        loop(model, schedule, z, read)
    with pytest.raises(InputError, match="copies: 2, and the denoiser's batch of 2"), entered(copies=2):
        loop(model, schedule, z, read[:2])
    with pytest.raises(InputError, match=r"4 rows were taken as 1 times 4.*given 2"), entered(copies=1):
        loop(model, schedule, z, read)
    same = z[:1].repeat(2, 1, 1, 1)
    with pytest.raises(InputError, match=r"2 rows were taken as 2 times 1.*given 2"), entered():
        loop(model, schedule, same, read[:2])
    with entered(copies=1) as run:
        loop(model, schedule, same, read[:2])
    assert run.step == STEPS - 1
    with entered():
        loop(model, schedule, same, read)
    for wrong in ({"copies": 0}, {"conditional": 2}, {"copies": 3, "conditional": -4}):
        with pytest.raises(InputError, match=r"copies|conditional"), entered(**wrong):
            pytest.fail("entered")


def test_three_copies_with_the_prompt_first() -> None:
    """As in InstructPix2Pix."""
    model, schedule, z, read = unet(), scheduler(), noise(), states(6)
    looks: list[Tensor] = []

    def on_step(step: DenoisingStep) -> None:
        assert step.conditional.tolist() == [True, True, False, False, False, False]
        looks.append(step.look().prediction)

    with torch.no_grad(), denoising(model, scheduler=schedule, on_step=on_step, copies=3, conditional=0):
        schedule.set_timesteps(1)
        t = schedule.timesteps[0]
        predicted = model(schedule.scale_model_input(torch.cat([z] * 3), t), t, encoder_hidden_states=read).sample
        schedule.step(predicted[:2], t, z)
    assert torch.allclose(looks[0], predicted[:2], atol=1e-5)


def test_a_look_is_of_the_conditional_rows_of_all_inputs() -> None:
    """As of SDXL, whose U-Net is told sizes and a pooled text beside."""
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 3
    )
    beside = {"time_ids": torch.arange(24.0).view(4, 6), "text_embeds": torch.randn(4, 3)}
    schedule, z, read = scheduler(), noise(), states()
    looks: list[Tensor] = []
    with (
        torch.no_grad(),
        denoising(model, scheduler=schedule, on_step=lambda step: looks.append(step.look().prediction), maps=CROSS),
    ):
        schedule.set_timesteps(1)
        t = schedule.timesteps[0]
        x = schedule.scale_model_input(torch.cat([z] * 2), t)
        (predicted,) = model(x, t, read, added_cond_kwargs=beside, return_dict=False)
        schedule.step(predicted[2:], t, z)
    assert torch.allclose(looks[0], predicted[2:], atol=1e-5)


def test_a_batch_has_the_gradients_of_its_items() -> None:
    model, z, read = unet(), noise(), states()

    def gradient(items: list[int]) -> Tensor:
        found: list[Tensor] = []

        def on_step(step: DenoisingStep) -> None:
            look = step.look()
            found.append(look.gradient(look.maps.of(CAT[items], 8, 8)[:, :4].sum((1, 2))))

        with denoising(model, scheduler=(schedule := scheduler()), on_step=on_step, maps=CROSS):
            loop(model, schedule, z[items], read[[*items, *(2 + i for i in items)]], 1)
        return found[0]

    both = gradient([0, 1])
    assert both.abs().amax((1, 2, 3)).min() > 1e-6
    for item in (0, 1):
        assert torch.allclose(gradient([item])[0], both[item], rtol=1e-3, atol=1e-7)


def test_spans_lie_in_conditional_rows() -> None:
    model, z, read = unet(), noise(4), states(8)
    cats = CAT.repeat_interleave(2, 0)
    outputs: dict[str, Tensor] = {}
    handle = model.register_forward_hook(lambda *given: outputs.update(now=given[-1].sample))
    plain = loop(model, scheduler(), z, read, 1), outputs.pop("now")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    whole = torch.cat([torch.zeros_like(cats), cats])
    for name, span in {"prompts": CAT, "items": cats, "rows": whole}.items():
        schedule = scheduler()
        with denoising(model, Louder(), scheduler=schedule, spans={"cat": span}) as run:
            found[name] = loop(model, schedule, z, read, 1), outputs.pop("now")
        assert {step for _, step in run.effect} == {0}
    handle.remove()
    # the unconditional half is as it was
    assert torch.equal(found["prompts"][1][:4], plain[1][:4])
    assert not torch.allclose(found["prompts"][1][4:], plain[1][4:], atol=1e-5)
    assert torch.equal(found["prompts"][0], found["items"][0])
    assert torch.equal(found["prompts"][0], found["rows"][0])
    with (
        pytest.raises(InputError, match="'cat' is of 3 items"),
        denoising(model, Louder(), scheduler=(schedule := scheduler()), spans={"cat": cats[:3]}),
    ):
        loop(model, schedule, z, read, 1)


# ------------------------------------------------------------------------------------------------------- edits and recorders


def test_edits_hold_in_looks_and_are_not_counted_there() -> None:
    model, z, read = unet(), noise(), states()
    maps: list[Tensor] = []
    recorder = RowRecorder("all", CROSS)

    def on_step(step: DenoisingStep) -> None:
        maps.append(step.look().maps.mean(8, 8).detach())

    counts = []
    for act in (on_step, None):
        schedule = scheduler()
        with denoising(
            model, Louder(), recorder, scheduler=schedule, on_step=act, maps=CROSS, spans={"cat": CAT}
        ) as run:
            loop(model, schedule, z, read)
        counts.append(run.effect)
        # looks are not among what the loop recorded
        assert {len(found) for found in recorder.found.values()} == {STEPS}
    assert counts[0] == counts[1]
    assert {step for _, step in counts[0]} == set(range(STEPS))
    for number, ours in enumerate(maps):
        found = AttentionMaps({place: found[number][2:] for place, found in recorder.found.items()})
        assert torch.allclose(found.mean(8, 8), ours, atol=1e-5)


def test_edits_around_the_loop_hold_in_looks() -> None:
    model, z, read = unet(), noise(), states()
    plain: list[Tensor] = []
    ours: list[Tensor] = []
    with denoising(model, scheduler=(schedule := scheduler()), on_step=lambda s: plain.append(s.look().prediction)):
        loop(model, schedule, z, read, 1)
    schedule = scheduler()
    with (
        edited(model, Halved()),
        denoising(model, scheduler=schedule, on_step=lambda s: ours.append(s.look().prediction)),
    ):
        edited_loop = loop(model, schedule, z, read, 1)
    with edited(model, Halved()):
        t, x = schedule.timesteps[0], noise()
        scaled = x / (schedule.sigmas[0] ** 2 + 1) ** 0.5
        direct = model(scaled, t, encoder_hidden_states=read[2:]).sample
        assert torch.equal(loop(model, scheduler(), z, read, 1), edited_loop)
    assert torch.allclose(ours[0], direct, atol=1e-5)
    assert not torch.allclose(ours[0], plain[0], atol=1e-4)


def test_maps_of_the_loop_are_means_over_steps_and_heads() -> None:
    model, z, read, schedule = unet(), noise(), states(), scheduler()
    plain = loop(model, schedule, z, read)
    every, small = MapRecorder(), MapRecorder(queries=16)
    with recorded(model, "rows", rows="all", at=CROSS) as found:
        loop(model, schedule, z, read)
    with denoising(model, every, small, scheduler=schedule, on_step=looking, maps=CROSS):
        assert torch.equal(loop(model, schedule, z, read), plain)
    for size in (4, 8):
        for steps in (None, [0], [1, 2]):
            means = [
                AttentionMaps({place: kept[step][2:] for place, kept in found["rows"].items()}).mean(size, size)
                for step in (range(STEPS) if steps is None else steps)
            ]
            assert torch.allclose(every.maps(steps).mean(size, size), torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(small.maps().mean(4, 4), every.maps().mean(4, 4), atol=1e-7)
    assert {m.shape[2] for m in small.maps().weights.values()} == {16}
    with pytest.raises(InputError, match=r"nothing was recorded in \[7\]"):
        every.maps([7])


def test_a_token_is_moved_into_a_box(tmp_path: Path) -> None:
    """The mass of "hat" inside of a box rises with steps along the gradient, and stays where the rate is zero."""
    pipe = pipeline(tmp_path)
    prompts = ["a cat hat", "hat a cat"]
    _, found = spans.of_texts(pipe.tokenizer, prompts, {"hat": ["hat", "hat"]})
    hat = torch.nn.functional.pad(found["hat"], (0, 8 - found["hat"].shape[1]))
    assert hat.int().argmax(1).tolist() == [3, 1]
    box = torch.zeros(8, 8)
    box[1:4, 4:8] = 1.0

    def mass(look: Look) -> Tensor:
        maps = look.maps.of(hat, 8, 8)
        return (maps * box).sum((1, 2)) / maps.sum((1, 2))

    def guided(rate: float) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []

        def on_step(step: DenoisingStep) -> None:
            for _ in range(4):
                look = step.look()
                inside = mass(look)
                gradient = look.gradient(-inside)
                step.latents = step.latents - rate * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
            seen.append(mass(step.look()).detach())

        with denoising(pipe, on_step=on_step, maps=CROSS):
            return painted(pipe, prompts), seen

    plain = painted(pipe, prompts)
    still, before = guided(0.0)
    moved, after = guided(1.0)
    assert torch.equal(still, plain)
    assert not torch.allclose(moved, plain, atol=1e-2)
    assert all((a > b + 1e-4).all() for a, b in zip(after, before, strict=True))


def test_two_pipelines_at_once(tmp_path: Path) -> None:
    one, two = pipeline(tmp_path), pipeline(tmp_path, name="EulerDiscreteScheduler")

    def nudging(by: float) -> Callable[[DenoisingStep], None]:
        def on_step(step: DenoisingStep) -> None:
            step.latents = step.latents + by * step.look().prediction.detach()

        return on_step

    alone = []
    for pipe, by in ((one, 0.1), (two, 0.2)):
        with denoising(pipe, on_step=nudging(by)):
            alone.append(painted(pipe))
    with denoising(one, on_step=nudging(0.1)):
        with denoising(two, on_step=nudging(0.2)):
            assert torch.equal(painted(one), alone[0])
            assert torch.equal(painted(two), alone[1])
        assert torch.equal(painted(one), alone[0])
    first, second = denoising(one, on_step=nudging(0.1)), denoising(two, on_step=nudging(0.2))
    first.__enter__()
    second.__enter__()
    assert torch.equal(painted(one), alone[0])
    first.__exit__(None, None, None)
    assert torch.equal(painted(two), alone[1])
    second.__exit__(None, None, None)
    assert not torch.equal(painted(two), alone[1])


def test_another_thread_is_not_heard() -> None:
    model, schedule, other = unet(), scheduler(), scheduler()
    plain = loop(model, other, noise(), states())
    found: list[Tensor] = []
    indices: list[int] = []

    def on_step(step: DenoisingStep) -> None:
        indices.append(step.index)
        if step.index == 1:
            thread = threading.Thread(target=lambda: found.append(loop(model, other, noise(), states())))
            thread.start()
            thread.join()

    with denoising(model, scheduler=schedule, on_step=on_step):
        assert torch.equal(loop(model, schedule, noise(), states()), plain)
    assert torch.equal(found[0], plain)
    assert indices == list(range(STEPS))


def test_a_copy_of_the_scheduler_is_its_own() -> None:
    model, schedule = unet(), scheduler()
    plain = loop(model, schedule, noise(), states())
    indices: list[int] = []
    with denoising(model, scheduler=schedule, on_step=lambda step: indices.append(step.index)):
        twin = copy.deepcopy(schedule)
        twin.set_timesteps(STEPS)
        t = twin.timesteps[0]
        twin.step(twin.scale_model_input(noise(), t), t, noise())
        assert (twin.step_index, schedule.step_index) == (1, STEPS)
        assert not indices
        assert torch.equal(loop(model, schedule, noise(), states()), plain)
    assert indices == list(range(STEPS))


# ------------------------------------------------------------------------------------------------------------- transformers


def test_the_pipeline_for_dit() -> None:
    """Conditional rows come first, and the scheduler is given both halves."""
    library = zoo.diffusers()
    model = zoo.dit("").model
    model.transformer_blocks[0].norm1.emb.class_embedder.num_classes = 1000
    torch.manual_seed(0)
    model = library.DiTTransformer2DModel(**{**model.config, "num_embeds_ada_norm": 1000}).eval()
    pipe = library.DiTPipeline(model, autoencoder(), scheduler("DDIMScheduler"))
    pipe.set_progress_bar_config(disable=True)

    def painting() -> Tensor:
        images = pipe([1, 2], 3.0, torch.Generator().manual_seed(0), STEPS, output_type="np").images
        return torch.as_tensor(images)

    plain = painting()

    def look(step: DenoisingStep) -> None:
        assert step.conditional.tolist() == [True, True, False, False]
        found = step.look().maps.mean(4, 4, kinds=("self",))
        assert found.shape == (2, 16, 4, 4)
        looking(step)

    def nudge(step: DenoisingStep) -> None:
        step.latents = step.latents + (0.5 if step.index == 0 else 0.0)

    said = {"copies": 2, "conditional": 0}
    with denoising(pipe, on_step=look, maps=Where(kinds=["self"]), **said):
        assert torch.equal(painting(), plain)
    with denoising(pipe, on_step=nudge, **said):
        assert not torch.allclose(painting(), plain, atol=1e-4)
    with pytest.raises(InputError, match="4 rows were taken as 2 times 2"), denoising(pipe, on_step=lambda step: None):
        painting()
    with pytest.raises(InputError, match="has no place"), denoising(pipe, on_step=nudge, maps=CROSS):
        pytest.fail("entered")


def sd3() -> nn.Module:
    torch.manual_seed(0)
    return zoo.diffusers().SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip


def test_joint_attention_of_sd3() -> None:
    model, z, read, schedule = sd3(), noise(), states(), scheduler("FlowMatchEulerDiscreteScheduler")
    pooled = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def sampled(change: float = 0.0) -> Tensor:
        schedule.set_timesteps(STEPS)
        latents = z
        for t in schedule.timesteps:
            latents = latents + change
            x = torch.cat([latents] * 2)
            told = {"encoder_hidden_states": read, "pooled_projections": pooled}
            predicted = model(hidden_states=x, timestep=t.expand(4), return_dict=False, **told)[0]
            latents = schedule.step(predicted[:2] + 3 * (predicted[2:] - predicted[:2]), t, latents).prev_sample
        return latents

    pixels = (torch.arange(21) < 16)[None]

    def on_step(step: DenoisingStep) -> None:
        assert step.timestep.shape == (4,)
        assert step.conditional.tolist() == [False, False, True, True]
        look = step.look()
        assert len(look.maps.weights) == 2
        maps = look.maps.mean(4, 4, kinds=("joint",), image=pixels)
        assert maps.shape == (2, 21, 4, 4)
        assert torch.allclose(maps.sum(1), torch.ones(2, 4, 4), atol=1e-5)
        assert look.gradient(maps[:, 16:].square().sum()).abs().max() > 0
        with pytest.raises(InputError, match="no place of kind joint has 4 x 4 queries; there are places of 21"):
            look.maps.mean(4, 4, kinds=("joint",))
        with pytest.raises(InputError, match=r"image: \(1, 20\)"):
            look.maps.mean(4, 4, kinds=("joint",), image=pixels[:, :20])

    plain, expected = sampled(), sampled(0.25)
    with denoising(model, scheduler=schedule, on_step=on_step, maps=Where(kinds=["joint"])):
        assert torch.equal(sampled(), plain)

    def nudge(step: DenoisingStep) -> None:
        step.latents = step.latents + 0.25

    with denoising(model, scheduler=schedule, on_step=nudge):
        assert torch.equal(sampled(), expected)


def test_tokens_of_flux() -> None:
    case, schedule = zoo.flux(""), scheduler("FlowMatchEulerDiscreteScheduler")
    inputs = {name: value for name, value in case.inputs.items() if name not in ("hidden_states", "timestep")}

    @torch.no_grad()
    def sampled(change: float = 0.0) -> Tensor:
        schedule.set_timesteps(STEPS)
        latents = case.inputs["hidden_states"]
        for t in schedule.timesteps:
            latents = latents + change
            predicted = case.model(hidden_states=latents, timestep=t.expand(1) / 1000, **inputs).sample
            latents = schedule.step(predicted, t, latents).prev_sample
        return latents

    # text stands first here
    pixels = (torch.arange(9) >= 3)[None]

    def on_step(step: DenoisingStep) -> None:
        look = step.look()
        kinds = {place.kind for place in look.maps.weights}
        maps = look.maps.mean(2, 3, kinds=tuple(kinds), image=pixels)
        assert maps.shape == (1, 9, 2, 3)
        assert look.gradient(maps[:, 0].sum()).abs().max() > 0
        step.latents = step.latents + 0.25

    expected = sampled(0.25)
    with denoising(case.model, scheduler=schedule, on_step=on_step, maps=Where()):
        assert torch.equal(sampled(), expected)


# -------------------------------------------------------------------------------------------------------------------- errors


class Fast:
    """A processor that calls a kernel of its own, as that of xformers does."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        return hidden_states


def test_out_of_reach_is_said_at_entry(tmp_path: Path) -> None:
    schedule = scheduler()
    from diffusers.models.attention_processor import AttnProcessor

    for processor in (Fast(), AttnProcessor()):
        model = unet()
        name = next(name for name in model.attn_processors if "attn2" in name)
        model.set_attn_processor({**model.attn_processors, name: processor})
        says = f"attn2 cannot be reached: {type(processor).__name__}"
        with pytest.raises(InputError, match=says), denoising(model, scheduler=schedule, on_step=looking, maps=CROSS):
            pytest.fail("entered")
        with pytest.raises(InputError, match=says), denoising(model, MapRecorder(), scheduler=schedule):
            pytest.fail("entered")
        # elsewhere it is reached
        with denoising(model, scheduler=schedule, on_step=looking, maps=Where(kinds=["self"])):
            loop(model, schedule, noise(), states())
    compiled = unet()
    compiled.mid_block.compile(backend="eager")
    for wrong, says in (
        (torch.compile(unet(), backend="eager"), "is compiled"),
        (compiled, "compiled in place"),
        ("unet", "str has none of unet, transformer"),
        (autoencoder(), None),
    ):
        with (
            pytest.raises(InputError, match=says or "has no place"),
            denoising(wrong, scheduler=schedule, on_step=looking, maps=CROSS),
        ):
            pytest.fail("entered")
    for wrong in (None, unet(), object()):
        with (
            pytest.raises(InputError, match="scheduler: expected the loop's own"),
            denoising(unet(), scheduler=wrong, on_step=looking),
        ):
            pytest.fail("entered")
    with pytest.raises(InputError, match="give at least one, or on_step"), denoising(unet(), scheduler=schedule):
        pytest.fail("entered")
    model = unet()
    with denoising(model, scheduler=schedule, on_step=looking):
        for again in ((model, scheduler()), (unet(), schedule)):
            with (
                pytest.raises(InputError, match="entered already"),
                denoising(again[0], scheduler=again[1], on_step=looking),
            ):
                pytest.fail("entered")
        loop(model, schedule, noise(), states())


def test_loops_that_are_not_as_said() -> None:
    model, schedule = unet(), scheduler()
    with pytest.raises(InputError, match="did not run"), denoising(model, scheduler=schedule, on_step=looking):
        pass
    with (
        pytest.raises(InputError, match="is this the loop's own scheduler"),
        denoising(model, scheduler=scheduler(), on_step=looking),
    ):
        loop(model, schedule, noise(), states(), 1)
    with (
        pytest.raises(InputError, match="did not run before it"),
        denoising(unet(), scheduler=schedule, on_step=looking),
    ):
        loop(model, schedule, noise(), states(), 1)
    with pytest.raises(InputError, match="expected latents"), denoising(model, scheduler=schedule, on_step=looking):
        model(None, 3, states())


def test_what_a_step_refuses() -> None:
    model, schedule = unet(), scheduler()
    stale: list[DenoisingStep] = []

    def too_far(step: DenoisingStep) -> None:
        step.latents.div_(0)

    with pytest.raises(InputError, match="not finite at step 0"), denoising(model, scheduler=schedule, on_step=too_far):
        loop(model, schedule, noise(), states(), 2)

    def refused(step: DenoisingStep) -> None:
        for wrong, says in (
            (step.latents[:1], r"latents: expected a tensor \(2, 4, 8, 8\)"),
            (3.0, "got float"),
            (step.latents / 0, "not finite at step"),
        ):
            with pytest.raises(InputError, match=says):
                step.latents = wrong
        assert not step.changed
        with pytest.raises(InputError, match=r"expected \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
            step.look(step.latents[:1])
        look = step.look()
        look.gradient(look.prediction.sum())
        with pytest.raises(InputError, match="retain=True"):
            look.gradient(look.prediction.square().sum())
        with pytest.raises(InputError, match="has no graph"):
            look.gradient(look.prediction.detach().sum())
        with pytest.raises(InputError, match="does not depend on the latents"):
            look.gradient(torch.ones(1, requires_grad=True).sum())
        with pytest.raises(InputError, match="no place of kind cross has 3 x 3 queries; there are places of 16, 64"):
            look.maps.mean(3, 3)
        with pytest.raises(InputError, match="span: has no token"):
            look.maps.of(CAT & False, 8, 8)
        with pytest.raises(InputError, match=r"span: \(2, 4\), and the maps are of 2 items and 5 keys"):
            look.maps.of(CAT[:, :4], 8, 8)
        stale.append(step)

    with denoising(model, scheduler=schedule, on_step=refused, maps=CROSS):
        loop(model, schedule, noise(), states(), 2)
    for step in stale:
        with pytest.raises(InputError, match="is over"):
            step.look()
        with pytest.raises(InputError, match="is over"):
            step.latents = step.latents + 1


def test_inference_mode_and_checkpointing() -> None:
    model, schedule, z, read = unet(), scheduler(), noise(), states()
    with (
        torch.inference_mode(),
        pytest.raises(InputError, match=r"run the loop under torch\.no_grad"),
        denoising(model, scheduler=schedule, on_step=looking),
    ):
        loop(model, schedule, z, read)

    def nudge(step: DenoisingStep) -> None:
        step.latents = step.latents + 0.25

    def in_place(step: DenoisingStep) -> None:
        step.latents.add_(0.25)

    expected = loop(model, schedule, z, read, 1, {0: lambda z: z + 0.25})
    for act in (nudge, in_place):
        with torch.inference_mode(), denoising(model, scheduler=schedule, on_step=act):
            assert torch.equal(loop(model, schedule, z, read, 1), expected)
    with torch.inference_mode():
        made = read.clone()
    with denoising(model, scheduler=schedule, on_step=looking, maps=CROSS):
        loop(model, schedule, z, made)
    model.enable_gradient_checkpointing()
    with (
        pytest.raises(InputError, match="disable_gradient_checkpointing"),
        denoising(model, scheduler=schedule, on_step=looking, maps=CROSS),
    ):
        loop(model, schedule, z, read)
    with denoising(model, scheduler=schedule, on_step=looking):
        loop(model, schedule, z, read)


def test_latents_that_the_loop_changes_itself() -> None:
    model, schedule, z = unet(), scheduler(), noise()

    def nudge(step: DenoisingStep) -> None:
        step.latents = step.latents + 0.25

    @torch.no_grad()
    def odd(between: Callable[[Tensor], Tensor]) -> None:
        schedule.set_timesteps(1)
        t = schedule.timesteps[0]
        predicted = model(schedule.scale_model_input(z, t), t, encoder_hidden_states=states(2)).sample
        schedule.step(predicted, t, between(z))

    for between, says in ((lambda z: z + 1, "changed its own between"), (lambda z: z[:, :2], "is given")):
        with pytest.raises(InputError, match=says), denoising(model, scheduler=schedule, on_step=nudge):
            odd(between)

    @torch.no_grad()
    def twice() -> None:
        schedule.set_timesteps(1)
        t = schedule.timesteps[0]
        for latents in (z, z + 1):
            predicted = model(schedule.scale_model_input(latents, t), t, encoder_hidden_states=states(2)).sample
        schedule.step(predicted, t, z)

    with (
        pytest.raises(InputError, match="again with other latents"),
        denoising(model, scheduler=schedule, on_step=nudge),
    ):
        twice()
    indices: list[int] = []
    with denoising(model, scheduler=schedule, on_step=lambda step: indices.append(step.index)):
        twice()
    assert indices == [0]


def test_half_precision() -> None:
    model, z, read, schedule = unet().bfloat16(), noise(), states().bfloat16(), scheduler()
    changed: list[Tensor] = []

    def on_step(step: DenoisingStep) -> None:
        look = step.look()
        gradient = look.gradient(look.maps.mean(8, 8)[:, 1].square().sum())
        assert gradient.dtype == step.latents.dtype == torch.float32
        assert gradient.isfinite().all()
        changed.append(gradient)
        step.latents = step.latents - gradient

    # latents in full precision, the denoiser in half, as in newer pipelines
    with torch.no_grad(), denoising(model, scheduler=schedule, on_step=on_step, maps=CROSS):
        schedule.set_timesteps(1)
        t = schedule.timesteps[0]
        x = schedule.scale_model_input(torch.cat([z] * 2), t).bfloat16()
        predicted = model(x, t, encoder_hidden_states=read).sample
        ours = schedule.step(predicted[2:].float(), t, z).prev_sample
        schedule.set_timesteps(1)
        z = z - changed[0]
        x = schedule.scale_model_input(torch.cat([z] * 2), t).bfloat16()
    with torch.no_grad():
        predicted = model(x, t, encoder_hidden_states=read).sample
        schedule.set_timesteps(1)
        schedule.scale_model_input(z, t)
        assert torch.equal(schedule.step(predicted[2:].float(), t, z).prev_sample, ours)
