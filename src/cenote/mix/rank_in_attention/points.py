"""The task that needs rank: of points on the sphere the one nearest to a query, or the one farthest from each point.

Source: Amsel, Yehudai and Bruna, "On the Benefits of Rank in Attention Layers" (2024), arXiv 2407.16153.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of

Kind = Literal["uniform", "orthogonal", "antipodal"]


class Points(NamedTuple):
    """Points, queries, and the point that each query asks for."""

    x: Float[Tensor, "batch points dim"]
    y: Float[Tensor, "batch queries dim"]
    target: Float[Tensor, "batch queries dim"]


def nearest_points(
    batch: int,
    dim: int,
    points: int,
    queries: int = 1,
    kind: Kind = "uniform",
    farthest: bool = False,
    plane: int | None = None,
    generator: torch.Generator | None = None,
) -> Points:
    """Points and queries on the unit sphere; the target is the nearest point, or the farthest.

    Args:
        kind: `"uniform"`; `"orthogonal"`: to each other, in a random basis; `"antipodal"`: pairs of a point and its opposite.
        plane: near is judged in the first so many dimensions alone, for which a rank of that many is enough.

    Raises:
        InputError: for more orthogonal points than dimensions, or an odd number of antipodal ones.

    >>> found = nearest_points(2, 4, points=3, generator=torch.Generator().manual_seed(0))
    >>> found.x.shape, found.target.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 1, 4]))
    """
    require_at_least(1, batch=batch, dim=dim, points=points, queries=queries)
    x = _drawn(batch, dim, points, kind, generator)
    y = normalize(torch.randn(batch, queries, dim, generator=generator), dim=-1)
    return Points(x, y, _asked(x, y, farthest, plane))


def farthest_in_set(
    batch: int, dim: int, points: int, kind: Kind = "uniform", generator: torch.Generator | None = None
) -> Points:
    """Self-attention's form: every point asks for the one farthest from it; queries are the points."""
    require_at_least(1, batch=batch, dim=dim, points=points)
    x = _drawn(batch, dim, points, kind, generator)
    return Points(x, x, _asked(x, x, True, None))


def scaled_error(
    prediction: Float[Tensor, "batch queries dim"], target: Float[Tensor, "batch queries dim"], rescaled: bool = False
) -> Float[Tensor, ""]:
    """Mean squared error times the dimension: the mean of `|prediction - target|^2`.

    Args:
        rescaled: predictions are multiplied by the number that makes it smallest.
    """
    if rescaled:
        prediction = prediction * ((prediction * target).sum() / prediction.square().sum().clamp(min=1e-12))
    return (prediction - target).square().sum(-1).mean()


def _drawn(batch: int, dim: int, points: int, kind: Kind, generator: torch.Generator | None) -> Tensor:
    require_one_of(get_args(Kind), kind=kind)
    if kind == "uniform":
        return normalize(torch.randn(batch, points, dim, generator=generator), dim=-1)
    if kind == "orthogonal":
        if points > dim:
            raise InputError(f"points: at most {dim} are orthogonal in {dim} dimensions, got {points}")
        return torch.linalg.qr(torch.randn(batch, dim, dim, generator=generator))[0][:, :points]
    if points % 2:
        raise InputError(f"points: antipodal ones come in pairs, got {points}")
    half = normalize(torch.randn(batch, points // 2, dim, generator=generator), dim=-1)
    return torch.stack([half, -half], 2).flatten(1, 2)


def _asked(x: Tensor, y: Tensor, farthest: bool, plane: int | None) -> Tensor:
    products = y[..., :plane] @ x[..., :plane].mT
    at = products.argmin(-1) if farthest else products.argmax(-1)
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
