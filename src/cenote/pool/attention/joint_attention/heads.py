"""Heads that predict a small map at once, the rivals of the field, with as many parameters as it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of

MapKind = Literal["fc", "deconv"]


class MapHead(nn.Module):
    """A map from a vector, all of its pixels at once, enlarged bilinearly to the size that is wanted.

    `"fc"`: `W_2 ReLU(W_1 z + b_1) + b_2`; `"deconv"`: a linear layer to a quarter of the grid in each direction, then two
    transposed convolutions of 4 x 4 with stride 2 and a ReLU between.

    Args:
        dim: width of a vector.
        grid: height and width of the small map; for `"deconv"` multiples of 4.
        kind: as above.
        hidden: width of the hidden layer, or number of channels.

    Raises:
        InputError: where the kind is unknown, or the grid does not fit.

    Example:
        >>> MapHead(16, (8, 16), "deconv", hidden=4)(torch.randn(2, 5, 16), (32, 64)).shape
        torch.Size([2, 5, 32, 64])

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023; the
    layers of these two rivals are not known to us.
    """

    def __init__(self, dim: int, grid: tuple[int, int], kind: MapKind = "fc", hidden: int = 16) -> None:
        super().__init__()
        require_one_of(("fc", "deconv"), kind=kind)
        height, width = grid
        step = 4 if kind == "deconv" else 1
        if height < 1 or width < 1 or height % step or width % step:
            raise InputError(f"grid: expected (height, width), multiples of {step}, got {grid}")
        if kind == "fc":
            self.net = nn.Sequential(
                nn.Linear(dim, hidden),
                nn.ReLU(),
                nn.Linear(hidden, height * width),
                nn.Unflatten(1, (1, height, width)),
            )
        else:
            small = (hidden, height // 4, width // 4)
            self.net = nn.Sequential(
                nn.Linear(dim, hidden * small[1] * small[2]),
                nn.Unflatten(1, small),
                nn.ReLU(),
                nn.ConvTranspose2d(hidden, hidden, 4, 2, 1),
                nn.ReLU(),
                nn.ConvTranspose2d(hidden, 1, 4, 2, 1),
            )

    def forward(
        self, z: Float[Tensor, "batch vectors dim"], size: tuple[int, int]
    ) -> Float[Tensor, "batch vectors height width"]:
        """One map of `size = (height, width)` per vector."""
        small = self.net(z.flatten(0, 1))
        return F.interpolate(small, size=size, mode="bilinear").squeeze(1).unflatten(0, z.shape[:2])


def equally_large(build: Callable[[int], nn.Module], parameters: int, most: int = 1024) -> nn.Module:
    """Of `build(1)`, `build(2)`, ... the one whose number of parameters is nearest to what is wanted.

    >>> head = equally_large(lambda hidden: MapHead(16, (8, 16), "fc", hidden), 865)
    >>> sum(p.numel() for p in head.parameters())
    853
    """
    best, nearest = build(1), float("inf")
    for hidden in range(1, most + 1):
        module = build(hidden)
        off = abs(sum(p.numel() for p in module.parameters()) - parameters)
        if off >= nearest:
            break
        best, nearest = module, off
    return best
