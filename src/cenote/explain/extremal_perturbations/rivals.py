"""Other maps of an image, all called alike: `map(scores, image, target) -> [height, width]`.

Those that draw numbers take a `seed` and leave global generators alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.explain.extremal_perturbations.masks import Perturbing, Pyramid
from cenote.explain.images import Scores
from cenote.models.live.passing import passing

Image = Float[Tensor, "channels height width"]
Map = Float[Tensor, "height width"]

MASK_RATE = 0.1
BATCH = 64


def gradient_map(scores: Scores, image: Image, target: int) -> Map:
    """The largest absolute gradient over the channels."""
    x = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scores(x[None])[0, target], x)
    return gradient.abs().amax(0)


def grad_cam(model: nn.Module, layer: str) -> _GradCam:
    """Grad-CAM at a layer: the positive part of its channels, weighted by their mean gradients, made as large as the image.

    Args:
        model: the one whose scores are asked for.
        layer: path of a module with maps `[batch, channels, height, width]`.
    """
    return _GradCam(model, layer)


class _GradCam:
    def __init__(self, model: nn.Module, layer: str) -> None:
        self.model, self.layer = model, layer

    def __call__(self, scores: Scores, image: Image, target: int) -> Map:
        x = image.detach().clone().requires_grad_()
        with torch.enable_grad(), passing(self.model, {self.layer: None}) as seen:
            score = scores(x[None])[0, target]
            maps = seen[self.layer].gave
            if maps.dim() != 4:
                raise InputError(
                    f"layer: {self.layer!r} gives {list(maps.shape)}, expected maps [batch, channels, h, w]"
                )
            (gradient,) = torch.autograd.grad(score, maps)
        found = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
        return F.interpolate(found, image.shape[1:], mode="bilinear", align_corners=False)[0, 0]


@torch.no_grad()
def occlusion_map(scores: Scores, image: Image, target: int, window: int = 8, stride: int = 4) -> Map:
    """The fall of the score with a window of zeros over each place; mean over the windows that cover a pixel."""
    require_at_least(1, window=window, stride=stride)
    height, width = image.shape[1:]
    tops = sorted({*range(0, max(height - window, 0) + 1, stride), max(height - window, 0)})
    lefts = sorted({*range(0, max(width - window, 0) + 1, stride), max(width - window, 0)})
    covers = torch.zeros(len(tops) * len(lefts), 1, height, width, dtype=image.dtype, device=image.device)
    for n, (top, left) in enumerate((t, le) for t in tops for le in lefts):
        covers[n, :, top : top + window, left : left + window] = 1
    fall = scores(image[None])[0, target] - _each(scores, image, 1 - covers, target)
    return (fall[:, None, None] * covers[:, 0]).sum(0) / covers[:, 0].sum(0).clamp(min=1)


@torch.no_grad()
def rise_map(
    scores: Scores, image: Image, target: int, masks: int = 500, cells: int = 7, share: float = 0.5, seed: int = 0
) -> Map:
    """RISE (Petsiuk, Das and Saenko 2018): the mean of random smooth masks, weighted by the target's probability under them."""
    require_at_least(1, masks=masks, cells=cells)
    generator = torch.Generator().manual_seed(seed)
    height, width = image.shape[1:]
    up = (-(-height // cells), -(-width // cells))
    large = ((cells + 1) * up[0], (cells + 1) * up[1])
    kept = (torch.rand(masks, 1, cells, cells, generator=generator) < share).to(image)
    smooth = F.interpolate(kept, large, mode="bilinear", align_corners=False)
    tops = torch.randint(0, up[0], (masks,), generator=generator).tolist()
    lefts = torch.randint(0, up[1], (masks,), generator=generator).tolist()
    cut = [m[:, t : t + height, le : le + width] for m, t, le in zip(smooth, tops, lefts, strict=True)]
    drawn = torch.stack(cut)
    shown = torch.cat([scores(image * part).softmax(1)[:, target] for part in drawn.split(BATCH)])
    return (shown[:, None, None] * drawn[:, 0]).mean(0) / share


def traded_mask(
    scores: Scores,
    image: Image,
    target: int,
    iterations: int = 300,
    weight: float = 0.01,
    variation: float = 0.2,
    cell: int = 4,
    perturbing: Perturbing = "blur",
) -> Map:
    """Meaningful perturbations (Fong and Vedaldi 2017): what must be taken away, its size traded against the score.

    `min_m softmax(z(x, m))_c + weight mean(1 - m) sqrt(n) + variation TV(m)`, over a coarse mask made as large as the image.

    Args:
        scores, image, target: as of every map.
        iterations: of Adam.
        weight: of what is taken away, the trade that extremal perturbations are without.
        variation: weight of the mean squared difference between neighbours.
        cell: pixels per parameter.
        perturbing: see `Pyramid`.
    """
    require_at_least(1, iterations=iterations, cell=cell)
    pyramid = Pyramid(image, perturbing)
    size = [-(-int(s) // cell) for s in image.shape[1:]]
    parameters = torch.full((1, 1, *size), 0.5, dtype=image.dtype, device=image.device, requires_grad=True)
    optimiser = torch.optim.Adam([parameters], lr=MASK_RATE)
    for _ in range(iterations):
        with torch.enable_grad():
            mask = F.interpolate(parameters, image.shape[1:], mode="bilinear", align_corners=False)
            away = (1 - parameters).mean() * parameters.numel() ** 0.5
            rough = parameters.diff(dim=-1).square().mean() + parameters.diff(dim=-2).square().mean()
            loss = scores(pyramid(mask)).softmax(1)[0, target] + weight * away + variation * rough
        (parameters.grad,) = torch.autograd.grad(loss, parameters)
        optimiser.step()
        with torch.no_grad():
            parameters.clamp_(0, 1)
    found = F.interpolate(1 - parameters.detach(), image.shape[1:], mode="bilinear", align_corners=False)
    return found[0, 0]


def random_map(scores: Scores, image: Image, target: int, seed: int = 0) -> Map:  # noqa: ARG001
    """Uniform noise: a control."""
    return torch.rand(image.shape[1:], generator=torch.Generator().manual_seed(seed)).to(image)


def centre_map(scores: Scores, image: Image, target: int) -> Map:  # noqa: ARG001
    """Nearness to the centre: a control."""
    height, width = image.shape[1:]
    rows, columns = ((torch.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    return (1 - rows[:, None] ** 2 - columns[None, :] ** 2).to(image)


def _each(scores: Scores, image: Image, masks: Float[Tensor, "masks 1 height width"], target: int) -> Tensor:
    return torch.cat([scores(image * part)[:, target] for part in masks.split(BATCH)])
