from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least

EPS = 5e-4
LEAST = 1e-6


def rmi_loss(
    probabilities: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    radius: int = 3,
    pool: int = 3,
    weight: float = 0.5,
    ignore: int = 255,
) -> Float[Tensor, ""]:
    """Region mutual information: pixels are compared together with their neighbours, beside cross-entropy pixel by pixel.

    Of each class, the `radius^2` pixels of every window are one vector, of the truth `y` and of the prediction `p`. With the
    covariances `S` over the windows of an image, `M = S_yy - S_yp (S_pp + e)^-1 S_yp^T` is what of the truth the prediction
    leaves unknown, were they normal; the loss is `(1 - w) BCE + w sum_classes log det(M + e) / (2 radius^2)`.

    Args:
        probabilities: of every pixel; they need not sum to 1.
        labels: of every pixel.
        radius: side of a window.
        pool: side of the squares of which means are taken first, so that a window sees more; 1 takes none.
        weight: `w`.
        ignore: the label that counts nothing.

    Raises:
        InputError: where the maps are smaller than a window, or differ in size.

    Example:
        >>> labels = torch.tensor([[[0, 1], [1, 0]]]).repeat_interleave(6, 1).repeat_interleave(6, 2)
        >>> right = torch.nn.functional.one_hot(labels, 2).movedim(-1, 1).float()
        >>> bool(rmi_loss(right, labels) < rmi_loss(0.5 * torch.ones_like(right), labels))
        True

    Source: Zhao, Wang, Yang, Cai, "Region Mutual Information Loss for Semantic Segmentation", NeurIPS 2019, as the main loss
        of Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.

    Note:
        Computed in float64, with 5e-4 on the diagonals. It is not bounded below by 0: a determinant can be below 1.
    """
    require_at_least(1, radius=radius, pool=pool)
    if labels.shape != (len(probabilities), *probabilities.shape[2:]):
        raise InputError(
            f"labels: expected the size of the predictions, {tuple(probabilities.shape[2:])}, got {tuple(labels.shape[1:])}"
        )
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a share from 0 to 1, got {weight}")
    real = labels != ignore
    classes = probabilities.shape[1]
    truth = F.one_hot(labels.where(real, 0).long(), classes).movedim(-1, 1).to(probabilities.dtype) * real[:, None]
    p = probabilities.clamp(LEAST, 1 - LEAST)
    each = F.binary_cross_entropy(p, truth, reduction="none") * real[:, None]
    pixelwise = each.sum() / real.sum().clamp(min=1)
    y, found = (_windows(v, radius, pool) for v in (truth, p * real[:, None]))
    regions = y.shape[-1]
    if regions < 1:
        raise InputError(
            f"probabilities: a window of {radius} x {radius} squares of {pool} x {pool} pixels does not fit into "
            f"{tuple(probabilities.shape[2:])}; give larger maps or a smaller radius or pool"
        )
    damped = EPS * torch.eye(radius**2, dtype=y.dtype, device=y.device)
    across = y @ found.mT
    unknown = y @ y.mT - across @ torch.linalg.solve(found @ found.mT + damped, across.mT)
    # symmetric but for rounding, which the factorisation does not forgive
    factor = torch.linalg.cholesky((unknown + unknown.mT) / 2 + damped)
    regional = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean(0).sum() / radius**2
    return (1 - weight) * pixelwise + weight * regional.to(pixelwise.dtype)


def _windows(
    maps: Float[Tensor, "batch classes height width"], radius: int, pool: int
) -> Float[Tensor, "batch classes pixels windows"]:
    """Every window as a vector, around the mean of all."""
    if pool > 1:
        maps = F.avg_pool2d(maps, pool, pool, pool // 2)
    maps = maps.double()
    if min(maps.shape[2:]) < radius:
        return maps.new_zeros(*maps.shape[:2], radius**2, 0)
    rows = F.unfold(maps.flatten(0, 1)[:, None], radius)
    rows = rows.unflatten(0, maps.shape[:2])
    return rows - rows.mean(-1, keepdim=True)
