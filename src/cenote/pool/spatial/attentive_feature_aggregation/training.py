from __future__ import annotations

from collections.abc import Sequence

import torch

from cenote.pool.spatial.attentive_feature_aggregation.dla import AFASegmenter
from cenote.pool.spatial.crops import Labelled, train_on_crops
from cenote.pool.spatial.segmentation import poly_schedule
from cenote.pool.training import History


def train_afa(
    net: AFASegmenter,
    images: Sequence[Labelled],
    *,
    steps: int,
    batch: int = 8,
    crop: int = 1024,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    rmi: bool = False,
    by_scale: float = 0.05,
    auxiliary: float = 0.05,
    lr: float = 0.015,
    warm_up: int = 1000,
    power: float = 0.9,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    ignore: int = 255,
    seed: int = 0,
) -> History:
    """The authors' recipe: the loss with its three terms on random crops, at a rate that rises, then falls by a power.

    Args:
        net: what is trained, at its own scales, (0.5, 1) in the paper; in eval mode afterwards.
        images: `(image, labels)`, as the net takes them; sizes may differ.
        steps: 275 to 375 passes over Cityscapes in the paper.
        batch: crops in a step.
        crop, scale, flip, ignore: see `random_crop`.
        rmi: whether the main loss is `rmi_loss`.
        by_scale, auxiliary: weights of the other terms.
        lr: highest rate.
        warm_up: steps in which it rises.
        power: of `poly_schedule`.
        momentum, weight_decay: of the descent.
        seed: of the draws.

    Returns:
        How it went; one mean loss for each hundred steps.

    Example:
        >>> class Backbone(torch.nn.Module):
        ...     def forward(self, x):
        ...         return [torch.nn.functional.avg_pool2d(x, s) for s in (1, 2)]
        >>> _ = torch.manual_seed(0)
        >>> net = AFASegmenter(Backbone(), (16, 16), classes=2, scales=(1.0,))
        >>> images = [(torch.randn(16, 20, 24) + c, torch.full((20, 24), c)) for c in (0, 1)]
        >>> history = train_afa(net, images, steps=3, batch=2, crop=16, warm_up=2)
        >>> len(history.losses)
        1

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.

    Note:
        Their crops are 1024 x 2048; here they are squares. Momentum and weight decay were not found out.
    """
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    return train_on_crops(
        net,
        images,
        lambda x, labels: net.loss(net.at_scales(x), labels, by_scale, auxiliary, ignore, rmi),
        sgd,
        poly_schedule(sgd, steps, power, warm_up),
        steps=steps,
        batch=batch,
        crop=crop,
        scale=scale,
        flip=flip,
        ignore=ignore,
        seed=seed,
    )
