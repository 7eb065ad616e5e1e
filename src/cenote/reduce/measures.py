"""What a reduction keeps of its tokens, without a task: of any reducer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.reduced import Reduced
from cenote.core.segments import accumulation_dtype


def reconstruction_loss(
    x: Float[Tensor, "batch tokens dim"],
    reduced: Reduced,
    weights: Float[Tensor, "batch tokens"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch"]:
    """How badly the tokens are rebuilt from what is left: `sum_i w_i min_k |x_i - y_k|^2`.

    Args:
        x: the tokens before.
        reduced: what is left of them.
        weights: `w`, None for 1.
        mask: True = a real token, None for all.

    Returns:
        The loss of each set; infinite where nothing is left of something.

    Example:
        >>> from cenote.reduce import FirstTokens
        >>> x = torch.tensor([[[0.0], [2.0], [3.0]]])
        >>> reconstruction_loss(x, FirstTokens(tokens=2)(x)).tolist()
        [1.0]

    Source:
        Marin et al. 2021, arXiv 2110.03860: the asymmetric Chamfer distance, that k-means descends.
    """
    wide = accumulation_dtype(x.dtype)
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    x = torch.where(real.unsqueeze(-1), x, torch.zeros_like(x)).to(wide)
    # products would cancel where a token is its own
    distances = torch.cdist(x, reduced.tokens.to(wide), compute_mode="donot_use_mm_for_euclid_dist").square()
    distances = torch.nn.functional.pad(
        distances.masked_fill(~reduced.real[:, None], torch.inf), (0, 1), value=torch.inf
    )
    near = torch.where(real, distances.amin(-1), 0.0)
    return near.sum(1) if weights is None else torch.where(real, near * weights.to(wide), 0.0).sum(1)


def mean_cosine(reduced: Reduced, protected: int = 0) -> Float[Tensor, "batch"]:
    """The mean cosine of pairs of tokens that are left: the less, the more diverse they are; 0 of fewer than two.

    Args:
        reduced: what is left.
        protected: the first so many are left out, such as [CLS].

    Example:
        >>> two = torch.ones(1, 2)
        >>> equal = Reduced(torch.ones(1, 2, 4), two, torch.tensor([[0, 1]]))
        >>> orthogonal = Reduced(torch.eye(2)[None], two, torch.tensor([[0, 1]]))
        >>> round(mean_cosine(equal).item(), 6), mean_cosine(orthogonal).item()
        (1.0, 0.0)

    Source:
        Long et al. 2023, arXiv 2211.11315.
    """
    real = reduced.real & (reduced.real.cumsum(1) > protected)
    unit = torch.nn.functional.normalize(reduced.tokens.to(accumulation_dtype(reduced.tokens.dtype)), dim=-1)
    unit = torch.where(real.unsqueeze(-1), unit, 0.0)
    counts = real.sum(1)
    # the sum over all pairs is the square of the sum; a token with itself is no pair
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return pairs / (counts * (counts - 1)).clamp(min=1)


def on_grid(reduced: Reduced, width: int, prefix: int = 1) -> Int[Tensor, "batch height width"]:
    """Which token each patch went to, as a picture: -1 where it was dropped.

    Args:
        reduced: of tokens that are `prefix` others and then the patches, row by row.
        width: patches of a row.
        prefix: tokens before the patches.

    Example:
        >>> from cenote.reduce import EvenlySpacedTokens
        >>> on_grid(EvenlySpacedTokens(tokens=2)(torch.rand(1, 5, 3), protect=1), width=2).tolist()
        [[[-1, 1], [-1, 2]]]
    """
    patches = reduced.assignment[:, prefix:]
    if patches.shape[1] % width:
        raise InputError(f"width: {width} does not divide {patches.shape[1]} patches")
    return patches.unflatten(1, (-1, width))
