from __future__ import annotations

from collections.abc import Sequence

import torch

from cenote.pool.spatial.crops import Labelled, train_on_crops
from cenote.pool.spatial.deeplab.model import DeepLab
from cenote.pool.spatial.segmentation import poly_schedule
from cenote.pool.training import History


def train_deeplab(
    net: DeepLab,
    images: Sequence[Labelled],
    *,
    steps: int = 20_000,
    batch: int = 10,
    crop: int = 321,
    scale: tuple[float, float] = (0.5, 1.5),
    flip: bool = True,
    lr: float = 1e-3,
    times: float = 10.0,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    power: float = 0.9,
    ignore: int = 255,
    seed: int = 0,
) -> History:
    """DeepLab's recipe: crops scaled and mirrored at random, the loss on the small map, class scores at ten times the rate.

    Args:
        net: what is trained; in eval mode afterwards.
        images: `(image, labels)`, as the net takes them; sizes may differ.
        steps, batch: of the training.
        crop, scale, flip, ignore: see `random_crop`.
        lr: of all but the layers that give class scores, which have `times` of it; it falls by `poly_schedule` with `power`.
        momentum, weight_decay: of the descent.
        seed: of the draws.

    Returns:
        How it went; one mean loss for each hundred steps.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = DeepLab(torch.nn.Conv2d(3, 8, 3, 8, 1), 8, classes=2, rates=(1, 2), scales=(0.5, 1.0))
        >>> images = [(torch.randn(3, 40, 50) + c, torch.full((40, 50), c)) for c in (0, 1)]
        >>> history = train_deeplab(net, images, steps=120, batch=4, crop=33, lr=0.01)
        >>> history.losses[1] < history.losses[0]
        True

    Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
        Connected CRFs", TPAMI 2018.
    """
    sgd = torch.optim.SGD(net.parameter_groups(lr, times), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return train_on_crops(
        net,
        images,
        lambda x, labels: net.loss(x, labels, ignore),
        sgd,
        poly_schedule(sgd, steps, power),
        steps=steps,
        batch=batch,
        crop=crop,
        scale=scale,
        flip=flip,
        ignore=ignore,
        seed=seed,
    )
