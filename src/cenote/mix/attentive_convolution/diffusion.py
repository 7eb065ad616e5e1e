"""A diffusion transformer with attentive convolutions: blocks that the time and the class modulate, trained on a flow.

Source: Yu et al., "Attentive Convolution", 2025; the host is that of Ma et al. 2024, arXiv 2401.08740 (SiT).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.mix.attentive_convolution.convolution import ATConv
from cenote.mix.base import Mixer
from cenote.mix.basic.attention import AttentionMixer
from cenote.mix.fitting import in_training
from cenote.mix.image_training import decayed

Images = Float[Tensor, "batch channels height width"]
Mixing = Literal["atconv", "attention", "hybrid"]
FREQUENCIES = 256
EPS = 1e-6


class ModulatedBlock(nn.Module):
    """`x = x + g_1 mixer(m_1(x))`, `x = x + g_2 MLP(m_2(x))`, `m(x) = LN(x) (1 + scale) + shift`; all from a condition, from 0.

    Args:
        dim: width of a token.
        mixer: of the tokens.
        ratio: of the perceptron's inner width to the outer.
    """

    def __init__(self, dim: int, mixer: Mixer, ratio: float = 4.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        hidden = int(dim * ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The next states."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        x = x + gate * self.mixer(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class FlowTransformer(nn.Module):
    """From a noised image, its time and its class to the velocity towards the image.

    Args:
        image: channels, height and width.
        patch: side of a patch.
        dim, depth, heads: of the network.
        classes: their number; one more stands for none, for guidance.
        mixing: `"atconv"` everywhere, `"attention"` everywhere, or `"hybrid"`: attention in even blocks, from 0. Positions are
            added unless there is no attention.
        size: of the kernels.
        drop: share of labels that are left out in training.

    Raises:
        InputError: where the grid of patches is no square, or patches are not whole.

    Example:
        >>> model = FlowTransformer((1, 8, 8), 2, dim=16, depth=2, heads=2, classes=3)
        >>> model(torch.zeros(2, 1, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])).shape
        torch.Size([2, 1, 8, 8])
    """

    places: Tensor | None

    def __init__(
        self,
        image: tuple[int, int, int],
        patch: int = 2,
        *,
        dim: int = 1152,
        depth: int = 28,
        heads: int = 16,
        classes: int = 1000,
        mixing: Mixing = "atconv",
        size: int = 3,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, depth=depth, classes=classes, patch=patch)
        require_one_of(("atconv", "attention", "hybrid"), mixing=mixing)
        require_rate(drop=drop)
        channels, height, width = image
        if height != width or height % patch:
            raise InputError(f"image: expected a square of whole patches of {patch}, got {height} x {width}")
        side = height // patch
        self.image, self.patch, self.side, self.classes, self.drop = image, patch, side, classes, drop
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        of_time = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.of_time, self.of_class = of_time, nn.Embedding(classes + 1, dim)

        def mixer(block: int) -> Mixer:
            if mixing == "attention" or (mixing == "hybrid" and block % 2 == 0):
                return AttentionMixer(dim, heads, bias=True)
            return ATConv(dim, size, act=partial(nn.GELU, approximate="tanh"), grid=(side, side))

        self.blocks = nn.ModuleList(ModulatedBlock(dim, mixer(i)) for i in range(depth))
        self.register_buffer("places", None if mixing == "atconv" else grid_places(dim, side), persistent=False)
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.modulation, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, patch**2 * channels)
        for last in (self.modulation, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, x: Images, time: Float[Tensor, "batch"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The velocity.

        Args:
            x: noised images.
            time: 0 for noise to 1 for images.
            labels: classes; their number for none.
        """
        if tuple(x.shape[1:]) != self.image:
            raise InputError(f"x: expected images {list(self.image)}, got {list(x.shape[1:])}")
        if self.training and self.drop:
            left_out = torch.rand(labels.shape, device=labels.device) < self.drop
            labels = torch.where(left_out, self.classes, labels)
        condition = self.of_time(_waves(time, FREQUENCIES)) + self.of_class(labels)
        h = self.embed(x).flatten(2).mT
        if self.places is not None:
            h = h + self.places
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, -1)
        patches = self.out(self.norm(h) * (1 + scale) + shift)
        return F.fold(
            patches.unflatten(-1, (self.patch, self.patch, -1)).permute(0, 4, 2, 3, 1).flatten(1, 3),
            self.image[1:],
            self.patch,
            stride=self.patch,
        )


def flow_loss(
    model: nn.Module, images: Images, labels: Int[Tensor, "batch"], generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """`|v(t x + (1 - t) e, t) - (x - e)|^2`, mean over `t` in 0 to 1 and noise `e`.

    Args:
        model: gives velocities.
        images, labels: a batch.
        generator: of times and noise; None for the global one.
    """
    time = torch.rand(len(images), generator=generator).to(images)
    noise = torch.randn(images.shape, generator=generator).to(images)
    t = time.view(-1, 1, 1, 1)
    return (model(t * images + (1 - t) * noise, time, labels) - (images - noise)).square().mean()


def train_flow(
    model: FlowTransformer,
    images: Images,
    labels: Int[Tensor, "batch"],
    *,
    steps: int,
    batch: int = 256,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """Train by AdamW at a constant rate.

    Args:
        model: trained in place, left in eval mode.
        images, labels: values near -1 to 1, and their classes.
        steps, batch: of the training.
        learning_rate, weight_decay: of AdamW.
        seed: of all draws.

    Returns:
        The loss of each step.
    """
    require_at_least(1, steps=steps, batch=batch, items=len(labels))
    stepper = torch.optim.AdamW(decayed(model, weight_decay), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with in_training(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (batch,), generator=generator)
            loss = flow_loss(model, images[chosen], labels[chosen], generator)
            stepper.zero_grad(set_to_none=True)
            loss.backward()
            stepper.step()
            losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def sample_flow(
    model: FlowTransformer, labels: Int[Tensor, "batch"], steps: int = 50, guidance: float = 1.0, seed: int = 0
) -> Images:
    """Images of these classes, from noise, by Heun's method.

    Args:
        model: in eval mode.
        labels: classes.
        steps: of the way; each asks the model twice.
        guidance: how far to go on from the velocity without a class to that with it; 1 for the latter alone.
        seed: of the noise.
    """
    require_at_least(1, steps=steps)
    if model.training:
        raise InputError("model: expected one in eval mode, got one in training; call model.eval()")
    like = model.out.weight
    noise = torch.randn(len(labels), *model.image, generator=torch.Generator().manual_seed(seed))
    x = noise.to(like)

    def velocity(x: Tensor, at: float) -> Tensor:
        time = x.new_full((len(x),), at)
        found = model(x, time, labels)
        if guidance == 1:
            return found
        free = model(x, time, torch.full_like(labels, model.classes))
        return free + guidance * (found - free)

    for step in range(steps):
        now, then = step / steps, (step + 1) / steps
        first = velocity(x, now)
        second = velocity(x + (then - now) * first, then)
        x = x + (then - now) * (first + second) / 2
    return x


def grid_places(dim: int, side: int) -> Float[Tensor, "1 cells dim"]:
    """Sines and cosines of row and column, half of the channels each."""
    cells = torch.arange(side, dtype=torch.float32)
    half = _waves(cells, dim // 2, scale=1.0)
    rows, columns = half.repeat_interleave(side, 0), half.repeat(side, 1)
    return F.pad(torch.cat([rows, columns], 1), (0, dim - 2 * half.shape[1])).unsqueeze(0)


def _waves(values: Tensor, width: int, scale: float = 1000.0) -> Tensor:
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=values.device) / max(width // 2, 1)).to(
        values
    )
    angles = scale * values.unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], 1)
