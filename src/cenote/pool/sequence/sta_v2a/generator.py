"""A diffusion model of sound that is told what a video shows and when: prompt tokens and a ControlNet.

Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025; the ControlNet is that of Zhang,
Rao, Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import real_tokens
from cenote.models.controlnet import controlnet_of, predicted
from cenote.pool.sequence.sta_v2a.onsets import StaV2aOnsets
from cenote.pool.sequence.sta_v2a.prompt import StaV2aPrompt


class Prompt(NamedTuple):
    """What the cross-attention of a diffusion model reads, and which of it is real."""

    states: Float[Tensor, "batch tokens width"]
    mask: Bool[Tensor, "batch tokens"]


class Video(NamedTuple):
    """What a video says to the generator, computed once for all steps.

    Attributes:
        tokens: of the prompt; none of them without the global view.
        condition: of the ControlNet, `[batch, channels, latent_frames]`; `None` without the local view.
    """

    tokens: Float[Tensor, "batch prompts width"]
    condition: Float[Tensor, "batch channels latent_frames"] | None


def append_prompt(
    text: Float[Tensor, "batch text width"],
    tokens: Float[Tensor, "batch prompts width"],
    text_mask: Bool[Tensor, "batch text"] | None = None,
) -> Prompt:
    """Pooled tokens behind the text states, all of them real: `encoder_hidden_states` and `encoder_attention_mask`.

    Args:
        text: states of a text encoder.
        tokens: of `StaV2aPrompt`, or any pool with vectors of that width.
        text_mask: True on real text.

    Raises:
        InputError: where the widths or numbers of items differ, or the mask does not fit the text.

    Example:
        >>> states, mask = append_prompt(torch.zeros(2, 7, 16), torch.ones(2, 4, 16))
        >>> states.shape, mask.shape
        (torch.Size([2, 11, 16]), torch.Size([2, 11]))
    """
    if text.dim() != 3 or tokens.dim() != 3 or text.shape[::2] != tokens.shape[::2]:
        raise InputError(
            f"text, tokens: expected [batch, number, width] of the same batch and width, "
            f"got {tuple(text.shape)} and {tuple(tokens.shape)}"
        )
    text_mask = real_tokens(text, text_mask)
    if text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool:
        raise InputError(
            f"text_mask: expected bool {tuple(text.shape[:2])}, got {text_mask.dtype} {tuple(text_mask.shape)}"
        )
    return Prompt(torch.cat([text, tokens.to(text.dtype)], 1), F.pad(text_mask, (0, tokens.shape[1]), value=True))


class StaV2a(nn.Module):
    """Text-to-audio diffusion that also listens to a video: `eps(z_t, t, [text ; prompt(video)], ControlNet(onsets(video)))`.

    The U-Net stays as it is. A ControlNet, at first a copy of its downward half, is given the onset features, repeated over
    frequency and mapped by a convolution that starts at zero; what it finds is added to the U-Net through convolutions that
    start at zero too, so that the untrained model is the U-Net.

    Args:
        unet: a diffusers `UNet2DConditionModel` of latents `[batch, channels, latent_frames, frequencies]`.
        prompt: the global view, as wide as the text states; `None`: without.
        onsets: the local view, trained beforehand and frozen here; `None`: without it and without ControlNet.
        train_unet: whether the U-Net is trained too.

    Raises:
        InputError: where diffusers is not installed, or the prompt's width is not that of the U-Net's cross-attention.

    ```python
    from diffusers import UNet2DConditionModel

    model = StaV2a(UNet2DConditionModel.from_pretrained("folder/unet"), StaV2aPrompt(512, width=1024), StaV2aOnsets(512))
    loss = model.loss(latents, text, video, scheduler)
    latents = model.generate(text, video, scheduler)
    ```

    Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025.

    Note:
        The authors published inference code alone: the training loss follows their text.
        diffusers' ControlNet takes no mask of the text; it is given one here, so that padding of a prompt is not read.
    """

    def __init__(
        self,
        unet: Any,
        prompt: StaV2aPrompt | None = None,
        onsets: StaV2aOnsets | None = None,
        train_unet: bool = False,
    ) -> None:
        super().__init__()
        self.unet: Any = unet
        self.prompt = prompt
        self.onsets = onsets
        self.train_unet = train_unet
        width = unet.config.cross_attention_dim
        if prompt is not None and prompt.out_dim != width:
            raise InputError(
                f"prompt: the U-Net attends to tokens of width {width}, got tokens of width {prompt.out_dim}"
            )
        unet.requires_grad_(train_unet)
        self.controlnet: Any = None
        if onsets is not None:
            onsets.requires_grad_(False)
            self.controlnet = controlnet_of(self.unet, onsets.onset.in_features)
        self.train(self.training)

    def train(self, mode: bool = True) -> StaV2a:
        """As usual, but what is frozen stays in eval mode."""
        super().train(mode)
        if not self.train_unet:
            self.unet.eval()
        if self.onsets is not None:
            self.onsets.eval()
        return self

    def forward(
        self,
        latents: Float[Tensor, "batch channels latent_frames frequencies"],
        timestep: Int[Tensor, "batch"] | Int[Tensor, ""] | int,
        text: Float[Tensor, "batch text width"],
        video: Float[Tensor, "batch frames dim"] | Video,
        text_mask: Bool[Tensor, "batch text"] | None = None,
        video_mask: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "batch channels latent_frames frequencies"]:
        """The U-Net's prediction for noisy latents.

        Args:
            latents: noisy latents of the sound.
            timestep: of the diffusion.
            text: states of a frozen text encoder.
            video: frames, or what `watch` made of them.
            text_mask, video_mask: True on real tokens and frames.

        Raises:
            InputError: where the sizes do not fit.
        """
        seen = video if isinstance(video, Video) else self.watch(video, video_mask)
        states, mask = append_prompt(text, seen.tokens, text_mask)
        condition = None
        if self.controlnet is not None:
            assert seen.condition is not None
            condition = _over_frequencies(seen.condition, latents)
        return predicted(self.unet, latents, timestep, states, mask, self.controlnet, condition)

    def watch(
        self, video: Float[Tensor, "batch frames dim"], mask: Bool[Tensor, "batch frames"] | None = None
    ) -> Video:
        """What the generator is told of a video."""
        if self.prompt is None:
            tokens = video.new_zeros((len(video), 0, self.unet.config.cross_attention_dim))
        else:
            tokens = self.prompt(video, mask).unflatten(-1, (-1, self.prompt.out_dim)).flatten(1, -2)
        if self.onsets is None:
            return Video(tokens, None)
        with torch.no_grad():
            return Video(tokens, self.onsets(video, mask).features.transpose(1, 2))

    def loss(
        self,
        latents: Float[Tensor, "batch channels latent_frames frequencies"],
        text: Float[Tensor, "batch text width"],
        video: Float[Tensor, "batch frames dim"],
        scheduler: Any,
        text_mask: Bool[Tensor, "batch text"] | None = None,
        video_mask: Bool[Tensor, "batch frames"] | None = None,
        text_dropout: float = 0.1,
        min_snr: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Squared error of the predicted noise, or velocity, at a random step.

        Args:
            latents: of the true sound.
            text, video, text_mask, video_mask: as in calling the model.
            scheduler: a diffusers scheduler, which also says whether noise or velocity is predicted.
            text_dropout: share of the items whose text states become zero, for guidance.
            min_snr: cap `c` of the weights `min(snr, c) / snr` (of velocities `min(snr, c) / (snr + 1)`); `None`: all 1.
            generator: of noise, steps and dropped texts.

        Raises:
            InputError: where the scheduler predicts something else.
        """
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise InputError(f"scheduler: expected one that predicts 'epsilon' or 'v_prediction', got {kind!r}")
        batch, device = len(latents), latents.device
        noise = torch.randn(latents.shape, generator=generator, device=device, dtype=latents.dtype)
        total = scheduler.config.num_train_timesteps
        steps = torch.randint(total, (batch,), generator=generator, device=device)
        dropped = torch.rand(batch, generator=generator, device=device) < text_dropout
        noisy = scheduler.add_noise(latents, noise, steps)
        target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, steps)
        told = text.masked_fill(dropped.view(-1, 1, 1), 0)
        errors = (self(noisy, steps, told, video, text_mask, video_mask) - target).square().flatten(1).mean(1)
        if min_snr is None:
            return errors.mean()
        kept = scheduler.alphas_cumprod.to(device)[steps]
        snr = kept / (1 - kept)
        return (snr.clamp(max=min_snr) / (snr if kind == "epsilon" else snr + 1) * errors).mean()

    @torch.no_grad()
    def generate(
        self,
        text: Float[Tensor, "batch text width"],
        video: Float[Tensor, "batch frames dim"],
        scheduler: Any,
        text_mask: Bool[Tensor, "batch text"] | None = None,
        video_mask: Bool[Tensor, "batch frames"] | None = None,
        steps: int = 200,
        guidance: float = 3.0,
        frequencies: int = 16,
        latent_frames: int = 256,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch channels latent_frames frequencies"]:
        """Latents of a sound, by guidance on the text alone: the video is told to both branches.

        `eps = eps(no text, video) + guidance (eps(text, video) - eps(no text, video))`

        Args:
            text, video, text_mask, video_mask: as in calling the model.
            scheduler: a diffusers scheduler.
            steps: of the diffusion.
            guidance: 1 for none.
            frequencies, latent_frames: size of the latents; with the local view, its own `latent_frames`.
            generator: of the noise.
        """
        seen = self.watch(video, video_mask)
        frames = latent_frames if self.onsets is None else self.onsets.latent_frames
        shape = (len(text), self.unet.config.in_channels, frames, frequencies)
        latents = torch.randn(shape, generator=generator, device=text.device, dtype=text.dtype)
        scheduler.set_timesteps(steps, device=text.device)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents, t)
            guided = self.guided(inputs, t, text, seen, text_mask, guidance)
            latents = scheduler.step(guided, t, latents, generator=generator, return_dict=False)[0]
        return latents

    def guided(
        self,
        latents: Float[Tensor, "batch channels latent_frames frequencies"],
        timestep: Int[Tensor, ""] | int,
        text: Float[Tensor, "batch text width"],
        video: Video,
        text_mask: Bool[Tensor, "batch text"] | None = None,
        guidance: float = 3.0,
    ) -> Float[Tensor, "batch channels latent_frames frequencies"]:
        """The guided prediction of one step."""
        if guidance == 1:
            return self(latents, timestep, text, video, text_mask)
        tokens, condition = video
        both = Video(torch.cat([tokens, tokens]), None if condition is None else torch.cat([condition, condition]))
        masks = None if text_mask is None else torch.cat([text_mask, text_mask])
        texts = torch.cat([torch.zeros_like(text), text])
        without, with_text = self(torch.cat([latents, latents]), timestep, texts, both, masks).chunk(2)
        return without + guidance * (with_text - without)


def _over_frequencies(
    condition: Float[Tensor, "batch features latent_frames"],
    latents: Float[Tensor, "batch channels latent_frames frequencies"],
) -> Float[Tensor, "batch features latent_frames frequencies"]:
    if condition.shape[-1] != latents.shape[2]:
        raise InputError(
            f"latents: the onset features are made for {condition.shape[-1]} latent frames, got {latents.shape[2]}; "
            f"build StaV2aOnsets with latent_frames={latents.shape[2]}"
        )
    return condition.to(latents.dtype).unsqueeze(-1).expand(-1, -1, -1, latents.shape[3])
