"""Gaussian filtering in several dimensions at a cost linear in the number of points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError


class PermutohedralLattice:
    """Approximate sums `y_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j`, for all points at once.

    Features are embedded in the plane `sum_k z_k = 0` of one dimension more, which is tiled by simplices. Each point spreads
    its value to the corners of its simplex by barycentric weights (splat), every corner is blurred with weights 1/2, 1, 1/2
    along each of the plane's axes, and each point reads back from its corners (slice). With `d` dimensions the cost is
    `O(d^2 N)` however far the Gaussian reaches.

    The corners depend on the features alone: build once per image, apply at every step.

    Args:
        features: `[points, dims]`, each dimension in units of its standard deviation.

    Raises:
        InputError: where the features are no finite `[points, dims]`, or span too many corners to be numbered.

    Example:
        >>> lattice = PermutohedralLattice(torch.linspace(0, 3, 50).unsqueeze(1))
        >>> lattice(torch.ones(50, 1)).shape
        torch.Size([50, 1])

    Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010.
    """

    def __init__(self, features: Float[Tensor, "points dims"]) -> None:
        if features.dim() != 2 or 0 in features.shape or not bool(features.isfinite().all()):
            raise InputError(f"features: expected finite numbers [points, dims], got shape {tuple(features.shape)}")
        self.dims = features.shape[1]
        near, rank, barycentric = _simplices(features.detach())
        self.weights = barycentric
        self.corners, self.neighbours = self._corners(near, rank)
        # every corner with the points that it belongs to, one after the other
        flat = self.corners.flatten()
        order = flat.argsort(stable=True)
        self.of_corner = order // (self.dims + 1)
        self.splat_weights = barycentric.flatten()[order]
        self.starts = torch.searchsorted(flat[order], torch.arange(len(self.neighbours[0]), device=flat.device))

    def __call__(self, values: Float[Tensor, "points channels"]) -> Float[Tensor, "points channels"]:
        """Filter `values`; linear, and differentiable in them."""
        weights, half = self.weights.to(values.dtype), values.new_tensor([1.0, 0.5, 0.5])
        z = F.embedding_bag(
            self.of_corner, values, self.starts, mode="sum", per_sample_weights=self.splat_weights.to(values.dtype)
        )
        for axis in self.neighbours:
            # the last row stands for corners that nobody touches
            padded = F.pad(z, (0, 0, 0, 1))
            z = F.embedding_bag(axis, padded, mode="sum", per_sample_weights=half.expand(len(axis), 3))
        return F.embedding_bag(self.corners, z, mode="sum", per_sample_weights=weights) / (1 + 2.0**-self.dims)

    def _corners(
        self, near: Int[Tensor, "points dims1"], rank: Int[Tensor, "points dims1"]
    ) -> tuple[Int[Tensor, "points dims1"], list[Int[Tensor, "corners 3"]]]:
        """The number of each point's corners, and for each axis every corner with its two neighbours."""
        d = self.dims
        # the corner of remainder r lies r steps along (1, ..., 1, -d, ..., -d): theirs are the last r in rank
        remainders = torch.arange(d + 1, device=near.device).unsqueeze(1)
        steps = remainders - (d + 1) * (rank[:, None, :d] > d - remainders)
        keys = near[:, None, :d] + steps
        low, high = keys.amin((0, 1)) - (d + 1), keys.amax((0, 1)) + (d + 1)
        spans = (high - low + 1).tolist()
        places, size = [], 1
        for span in spans:
            places.append(size)
            size *= int(span)
        if size >= 2**62:
            raise InputError(
                f"features: {d} dimensions that span {spans} corners cannot be numbered; take larger standard deviations"
            )
        place = torch.tensor(places, device=near.device)
        codes, corners = torch.unique(((keys - low) * place).sum(-1), return_inverse=True)
        neighbours = []
        for axis in range(d + 1):
            step = -place.sum() + ((d + 1) * place[axis] if axis < d else 0)
            at = [torch.arange(len(codes), device=near.device)]
            for wanted in (codes + step, codes - step):
                i = torch.searchsorted(codes, wanted).clamp(max=len(codes) - 1)
                at.append(torch.where(codes[i] == wanted, i, len(codes)))
            neighbours.append(torch.stack(at, 1))
        return corners, neighbours


def _simplices(
    f: Float[Tensor, "points dims"],
) -> tuple[Int[Tensor, "points dims1"], Int[Tensor, "points dims1"], Float[Tensor, "points dims1"]]:
    """Nearest corner of remainder 0, rank of each coordinate's distance to it, and barycentric weights."""
    points, d = f.shape
    k = torch.arange(1, d + 1, device=f.device, dtype=f.dtype)
    # 2/3 (d + 1)^2 is the variance of splat, blur and slice together
    scaled = f * ((2 / 3) ** 0.5 * (d + 1) / (k * (k + 1)).sqrt())
    after = scaled.flip(1).cumsum(1).flip(1)
    elevated = torch.cat([after, after.new_zeros(points, 1)], 1)
    elevated[:, 1:] -= k * scaled
    near = (elevated / (d + 1)).round() * (d + 1)
    excess = (near.sum(1, keepdim=True) / (d + 1)).round()
    order = (elevated - near).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1) + excess
    # the sum must be 0: coordinates that ranked beyond an end move by one period
    low, high = rank < 0, rank > d
    near = near + (d + 1) * (low.to(f.dtype) - high.to(f.dtype))
    rank = rank + (d + 1) * (low.to(f.dtype) - high.to(f.dtype))
    share = (elevated - near) / (d + 1)
    by_rank = share.gather(1, rank.long().argsort(1))
    # by_rank falls; weight r is the step between neighbours in rank, the first closes the circle
    falls = by_rank - torch.cat([by_rank[:, 1:], by_rank[:, :1] - 1], 1)
    return near.long(), rank.long(), falls.flip(1)
