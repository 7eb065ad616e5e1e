"""What is asked of pooled vectors: how much their groups of channels depend on each other, and what they retrieve."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.widths import require_divides


def group_dependence(pooled: Float[Tensor, "items dim"], groups: int) -> Float[Tensor, "groups groups"]:
    """Linear CKA between contiguous groups of channels over a data set: 1 on the diagonal, 0 where nothing is shared.

    `CKA(a, b) = |Y_a^T Y_b|^2 / (|Y_a^T Y_a| |Y_b^T Y_b|)`, with `Y_g` the centred channels of group `g`.

    Args:
        pooled: one vector per item.
        groups: of a `GGeM`; divides `dim`.

    Returns:
        The matrix; a group that does not vary depends on nothing, itself included.

    Example:
        >>> y = torch.randn(50, 1)
        >>> group_dependence(torch.cat([y, -2 * y], 1), 2).round(decimals=4).tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    Source: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022, claims that dependence falls; the measure
    is ours.
    """
    require_divides("groups", groups, pooled.shape[1])
    centred = pooled - pooled.mean(0)
    products = torch.einsum("nai,nbj->abij", *[centred.unflatten(1, (groups, -1))] * 2).square().sum((2, 3))
    own = products.diagonal().sqrt()
    return products / (own.unsqueeze(0) * own.unsqueeze(1)).clamp(min=torch.finfo(products.dtype).tiny)


def recall_at_one(descriptors: Float[Tensor, "items width"], y: Int[Tensor, "items"]) -> float:
    """Share of the items whose nearest other item, by inner product, is of their class.

    >>> recall_at_one(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 0]))
    0.5
    """
    if len(descriptors) < 2:
        raise InputError(f"descriptors: expected two items at least, got {len(descriptors)}")
    similar = (descriptors @ descriptors.T).fill_diagonal_(-torch.inf)
    return float((y[similar.argmax(1)] == y).double().mean())
