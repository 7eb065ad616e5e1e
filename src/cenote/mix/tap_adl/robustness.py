"""How a classifier of images stands what is done to them: corruptions at five strengths, and small shifts.

Source: Hendrycks and Dietterich 2019, arXiv 1903.12261, whose measures these follow; the corruptions are simple ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of

Images = Float[Tensor, "batch channels height width"]
STRENGTHS = (1, 2, 3, 4, 5)


def _blurred(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    taps = torch.tensor([0.25, 0.5, 0.25]).to(x)
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 3, 3)
    for _ in range(strength):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
    return x


def _noisy(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    return x + 0.1 * strength * torch.randn(x.shape, generator=generator).to(x)


def _occluded(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    x = x.clone()
    height, width = x.shape[2:]
    tall, wide = (max(round(n * 0.12 * strength), 1) for n in (height, width))
    for image in x:
        top = int(torch.randint(height - tall + 1, (), generator=generator))
        left = int(torch.randint(width - wide + 1, (), generator=generator))
        image[:, top : top + tall, left : left + wide] = 0
    return x


def _paler(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (1 - 0.17 * strength)


def _brighter(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    return x + 0.1 * strength


def _coarser(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    height, width = (max(round(n * (1 - 0.15 * strength)), 1) for n in x.shape[2:])
    return F.interpolate(F.adaptive_avg_pool2d(x, (height, width)), x.shape[2:])


CORRUPTIONS: Mapping[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "blur": _blurred,
    "noise": _noisy,
    "occlusion": _occluded,
    "contrast": _paler,
    "brightness": _brighter,
    "pixels": _coarser,
}


def corrupted(images: Images, kind: str, strength: int = 3, seed: int = 0) -> Images:
    """Images that something was done to.

    Args:
        images: values near 0 to 1.
        kind: `"blur"`, `"noise"`, `"occlusion"`, `"contrast"`, `"brightness"` or `"pixels"`.
        strength: 1 to 5.
        seed: of what is drawn.
    """
    require_one_of(CORRUPTIONS, kind=kind)
    require_one_of(STRENGTHS, strength=strength)
    return CORRUPTIONS[kind](images, strength, torch.Generator().manual_seed(seed))


@torch.no_grad()
def errors_under(
    net: nn.Module,
    images: Images,
    labels: Int[Tensor, "batch"],
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    strengths: Sequence[int] = STRENGTHS,
    batch: int = 256,
) -> dict[str, list[float]]:
    """The share of images that are classified wrongly, by corruption and strength."""
    return {
        kind: [_error(net, corrupted(images, kind, strength), labels, batch) for strength in strengths]
        for kind in kinds
    }


def mean_corruption_error(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    """The mean over corruptions of the sum of errors over strengths, divided by the baseline's; 1 for the baseline itself.

    Args:
        errors: as `errors_under` gives them.
        baseline: of another network, the same corruptions.

    Raises:
        InputError: where corruptions differ, or the baseline makes no error under one.

    >>> mean_corruption_error({"blur": [0.1, 0.3]}, {"blur": [0.2, 0.6]})
    0.5
    """
    if errors.keys() != baseline.keys() or not errors:
        raise InputError(f"baseline: expected errors under {sorted(errors)}, got {sorted(baseline)}")
    if free := [kind for kind in baseline if not sum(baseline[kind])]:
        raise InputError(
            f"baseline: makes no error under {free[0]!r}, so that nothing can be divided by it; leave it out"
        )
    return sum(sum(errors[kind]) / sum(baseline[kind]) for kind in errors) / len(errors)


@torch.no_grad()
def flip_rate(net: nn.Module, images: Images, steps: int = 4, batch: int = 256) -> float:
    """How often the predicted class changes as an image moves by a pixel, to the right and back in.

    Args:
        net: gives logits.
        images: that are moved.
        steps: pixels that they move in all.
        batch: images at once.

    Returns:
        The share of moves that change the class.
    """
    found = [_predicted(net, images.roll(step, -1), batch) for step in range(steps + 1)]
    return float(torch.stack([a != b for a, b in itertools.pairwise(found)]).float().mean())


def _predicted(net: nn.Module, images: Tensor, batch: int) -> Tensor:
    return torch.cat([net(x).argmax(-1) for x in images.split(batch)])


def _error(net: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    return float((_predicted(net, images, batch) != labels).float().mean())
