"""Training of segmentation nets on crops of images that are scaled, cut and mirrored anew at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_at_least
from cenote.pool.training import History, train_steps

Labelled = tuple[Tensor, Tensor]
"""An image `[channels, height, width]` and its labels `[height, width]`."""


def random_crop(
    image: Float[Tensor, "channels height width"],
    labels: Int[Tensor, "height width"],
    crop: int,
    scale: tuple[float, float] = (0.5, 1.5),
    flip: bool = True,
    ignore: int = 255,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "channels crop crop"], Int[Tensor, "crop crop"]]:
    """An image and its labels, enlarged or shrunk, cut and mirrored at random, both alike.

    Args:
        image: bilinear where it is scaled, and 0 beyond its border.
        labels: those of the nearest pixels, and `ignore` beyond the border.
        crop: side of the result.
        scale: between these the factor is drawn.
        flip: whether one in two is mirrored.
        ignore: the label that counts nothing.
        generator: of the draws.

    Raises:
        InputError: where image and labels differ in size, or a number makes no sense.

    >>> image, labels = random_crop(torch.zeros(3, 9, 12), torch.zeros(9, 12, dtype=torch.long), crop=8)
    >>> image.shape, labels.shape
    (torch.Size([3, 8, 8]), torch.Size([8, 8]))
    """
    if image.shape[1:] != labels.shape:
        raise InputError(f"labels: expected the size of the image, {tuple(image.shape[1:])}, got {tuple(labels.shape)}")
    require_at_least(1, crop=crop)
    require_all_positive(scale=scale)
    low, high = scale
    if low > high:
        raise InputError(f"scale: expected the smaller factor first, got {scale}")
    factor = low + (high - low) * float(torch.rand((), generator=generator))
    size = [max(1, round(n * factor)) for n in labels.shape]
    x = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    # floats hold every class exactly
    y = F.interpolate(labels[None, None].double(), size, mode="nearest-exact")[0, 0].to(labels.dtype)
    beyond = [max(0, crop - n) for n in size]
    x = F.pad(x, (0, beyond[1], 0, beyond[0]))
    y = F.pad(y, (0, beyond[1], 0, beyond[0]), value=ignore)
    top, left = (int(torch.randint(n - crop + 1, (), generator=generator)) for n in y.shape)
    x, y = x[:, top : top + crop, left : left + crop], y[top : top + crop, left : left + crop]
    if flip and float(torch.rand((), generator=generator)) < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    return x, y


def train_on_crops(
    net: nn.Module,
    images: Sequence[Labelled],
    loss: Callable[[Float[Tensor, "batch channels crop crop"], Int[Tensor, "batch crop crop"]], Tensor],
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    steps: int,
    batch: int,
    crop: int,
    scale: tuple[float, float],
    flip: bool = True,
    ignore: int = 255,
    seed: int = 0,
) -> History:
    """So many steps, each on a batch of crops of images drawn at random.

    Args:
        net: what is trained.
        images: with their labels; they may differ in size.
        loss: of a batch of crops.
        optimizer, schedule: of the net's parameters.
        steps, batch: of the training.
        crop, scale, flip, ignore: see `random_crop`.
        seed: of the draws.

    Raises:
        InputError: where there is no image, or one and its labels differ in size.
    """
    require_at_least(1, images=len(images), batch=batch)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (batch,), generator=generator).tolist()
        drawn = [images[i] for i in chosen]
        crops = [random_crop(x, y, crop, scale, flip, ignore, generator) for x, y in drawn]
        return torch.stack([x for x, _ in crops]), torch.stack([y for _, y in crops])

    return train_steps(net, draw, lambda drawn: loss(*drawn), optimizer, steps=steps, schedule=schedule)
