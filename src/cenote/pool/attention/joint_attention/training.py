"""Training in two stages: the people alone, then both branches and their fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.pool.attention.joint_attention.estimator import Group, JointAttentionEstimator, JointEstimate
from cenote.pool.attention.joint_attention.measure import detection_curve, distance
from cenote.pool.attention.joint_attention.targets import gaussian_target
from cenote.pool.training import History, in_batches, train

Loss = Literal["joint", "people", "scene", "fused"]
"""Which map is brought to its target: that of the people's branch, each person's own, the image branch's, the fused one."""


class Stages(NamedTuple):
    """How both stages went; the scores are mean distances on the development scenes, negative, in pixels.

    Attributes:
        people: of the people's branch alone.
        both: of both branches, or `None` where there is no image.
    """

    people: History
    both: History | None


class Found(NamedTuple):
    """How near the points are.

    Attributes:
        mean_distance: in pixels.
        within: share of the scenes within each share of the width.
    """

    mean_distance: float
    within: dict[float, float]


def map_loss(
    found: JointEstimate, group: Group, losses: Sequence[Loss], sigma: float, sigmoid: bool = False
) -> Float[Tensor, ""]:
    """Sum of the losses that are on: mean squared error, or cross-entropy of maps that passed a sigmoid.

    Args:
        found: what the estimator says.
        group: with what each loss needs: `target`, for `"people"` `targets`.
        losses: which are on.
        sigma: of the hills around the points, in pixels.
        sigmoid: whether the maps passed one.

    Raises:
        InputError: where no loss is on, or the target of one is missing.
    """
    if not losses:
        raise InputError(f"losses: expected some of {', '.join(get_args(Loss))}, got none")
    height, width = found.joint.shape[-2:]
    size = (height, width)
    measure = F.binary_cross_entropy if sigmoid else F.mse_loss
    total = found.joint.new_zeros(())
    for name in losses:
        require_one_of(get_args(Loss), losses=name)
        if name == "people":
            if group.targets is None:
                raise InputError("targets: the loss of each person's map needs the point that each looks at")
            hills = torch.cat([gaussian_target(own.unsqueeze(1), size, sigma) for own in group.targets.unbind(1)], 1)
            real = torch.ones_like(hills[..., 0, 0], dtype=torch.bool) if group.mask is None else group.mask
            total = total + measure(found.people[real], hills[real])
            continue
        if group.target is None:
            raise InputError("target: expected the point that each group looks at, got none")
        maps = getattr(found, name)
        if maps is None:
            raise InputError(f"scene: the loss {name!r} needs an image, and there is none")
        total = total + measure(maps, gaussian_target(group.target.unsqueeze(1), size, sigma))
    return total


def train_in_stages(
    estimator: JointAttentionEstimator,
    scenes: Group,
    development: Group,
    *,
    sigma: float = 10.0,
    losses: tuple[Sequence[Loss], Sequence[Loss]] = (("joint",), ("fused",)),
    passes: tuple[int, int] = (100, 100),
    batch: int = 8,
    lr: float = 1e-3,
    patience: int = 10,
    seed: int = 0,
) -> Stages:
    """Train the people's branch alone; then, where the scenes have images, both branches and the fusion, with Adam.

    Each stage ends when the mean distance on the development scenes has not fallen for `patience` passes, and its best state is
    kept.

    Args:
        estimator: both branches.
        scenes: with targets.
        development: likewise, other scenes.
        sigma: of the hills around the points, in pixels; 10 at 320 x 640.
        losses: of either stage.
        passes: of either stage, at most.
        batch: scenes in a step.
        lr: rate of Adam.
        patience: passes without a nearer point.
        seed: of the order of the scenes.

    Raises:
        InputError: where a loss has no target.

    Example:
        >>> from cenote.pool import JointAttentionConfig, JointAttentionEstimator
        >>> def scenes(count):
        ...     ball, people = torch.rand(count, 2), torch.rand(count, 4, 2)
        ...     gaze = torch.nn.functional.normalize((ball.unsqueeze(1) - people) * torch.tensor([2.0, 1.0]), dim=-1)
        ...     return Group(people, gaze, torch.zeros(count, 4, 0), target=ball)
        >>> _ = torch.manual_seed(0)
        >>> estimator = JointAttentionEstimator(JointAttentionConfig(actions=0, use=("position", "gaze"), size=(8, 16)))
        >>> train, development = scenes(64), scenes(32)
        >>> stages = train_in_stages(estimator, train, development, sigma=1.5, passes=(3, 3))
        >>> len(stages.people.losses), stages.both
        (3, None)
        >>> found = found_points(estimator, development)

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023.
    """
    generator = torch.Generator().manual_seed(seed)

    def stage(on: Sequence[Loss], parameters: list[Tensor], most: int, seen: Group, judged: Group) -> History:
        return train(
            estimator,
            lambda: in_batches(len(seen.position), batch, generator),
            lambda chosen: map_loss(
                estimator(seen.select(chosen)), seen.select(chosen), on, sigma, estimator.config.sigmoid
            ),
            torch.optim.Adam(parameters, lr=lr),
            passes=most,
            score=lambda: -found_points(estimator, judged).mean_distance,
            patience=patience,
        )

    alone = (scenes._replace(scene=None), development._replace(scene=None))
    people = stage(losses[0], list(estimator.people.parameters()), passes[0], *alone)
    if scenes.scene is None:
        return Stages(people, None)
    return Stages(people, stage(losses[1], list(estimator.parameters()), passes[1], scenes, development))


def found_points(
    estimator: JointAttentionEstimator, scenes: Group, within: Sequence[float] = (0.05, 0.1, 0.2), batch: int = 64
) -> Found:
    """Mean distance of the points to the true ones, and the shares within some shares of the width; 0.1 is the paper's.

    Args:
        estimator: both branches.
        scenes: with targets.
        within: shares of the width of the maps.
        batch: scenes at once.

    Raises:
        InputError: where the targets are missing.
    """
    if scenes.target is None:
        raise InputError("target: expected the point that each group looks at, got none")
    height, width = estimator.config.size
    scale = torch.tensor([width, height], dtype=scenes.target.dtype, device=scenes.target.device)
    training = estimator.training
    estimator.eval()
    with torch.no_grad():
        parts = torch.arange(len(scenes.target)).split(batch)
        points = torch.cat([estimator(scenes.select(part)).point() for part in parts])
    estimator.train(training)
    far = distance(points / scale, scenes.target, (height, width))
    shares = detection_curve(far, [share * width for share in within]).tolist()
    return Found(float(far.mean()), dict(zip(within, shares, strict=True)))
