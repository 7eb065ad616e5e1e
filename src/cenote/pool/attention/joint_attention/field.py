from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.core.tokenwise import ROWS_AT_ONCE, tokenwise

Depth = Literal["shallow", "middle", "deep"]
HIDDEN_LAYERS: dict[Depth, int] = {"shallow": 0, "middle": 2, "deep": 4}


class FieldHead(nn.Module):
    """Paint a map from a vector, one pixel at a time: a network reads the vector and the pixel's coordinates.

    `m(x, y) = MLP([z; x; y])`, with `x = column / width`, `y = row / height`, from the top left corner. The first layer splits
    exactly, `W [z; x; y] = W_z z + W_xy (x, y)`, so that it runs once per vector and once per pixel.

    Args:
        dim: width of a vector.
        hidden: width inside; default `dim`.
        depth: hidden layers after the first: `"shallow"` 0, `"middle"` 2, `"deep"` 4.

    Raises:
        InputError: where the depth is unknown or a map has no pixels.

    Example:
        >>> FieldHead(16)(torch.randn(2, 5, 16), (32, 64)).shape
        torch.Size([2, 5, 32, 64])

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023.
    """

    def __init__(self, dim: int, hidden: int | None = None, depth: Depth = "middle") -> None:
        super().__init__()
        require_one_of(HIDDEN_LAYERS, depth=depth)
        hidden = dim if hidden is None else hidden
        self.first = nn.Linear(dim + 2, hidden)
        self.middle = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(HIDDEN_LAYERS[depth]))
        self.last = nn.Linear(hidden, 1)

    def forward(
        self, z: Float[Tensor, "batch vectors dim"], size: tuple[int, int]
    ) -> Float[Tensor, "batch vectors height width"]:
        """One map of `size = (height, width)` per vector."""
        height, width = size
        if height < 1 or width < 1:
            raise InputError(f"size: expected (height, width) of at least one pixel, got {size}")
        return self.at(z, coordinates(size).to(z)).unflatten(2, size)

    def at(
        self, z: Float[Tensor, "batch vectors dim"], points: Float[Tensor, "points 2"]
    ) -> Float[Tensor, "batch vectors points"]:
        """The values at `(x, y)` in `[0, 1)`, any places: training can do with a few of them."""
        for_vector, for_point = self.first.weight.split([self.first.in_features - 2, 2], 1)
        from_vector = F.linear(z.flatten(0, 1), for_vector, self.first.bias)

        def values(from_point: Float[Tensor, "_ hidden"]) -> Float[Tensor, "_ vectors"]:
            h = torch.relu(from_vector + from_point.unsqueeze(1))
            for layer in self.middle:
                h = torch.relu(layer(h))
            return self.last(h).squeeze(-1)

        rows = max(1, 16 * ROWS_AT_ONCE // max(1, len(from_vector)))
        return tokenwise(values, F.linear(points, for_point), rows).T.unflatten(0, z.shape[:2])


def coordinates(size: tuple[int, int]) -> Float[Tensor, "pixels 2"]:
    """`(x, y)` of every pixel, row by row, in `[0, 1)`.

    >>> coordinates((1, 2)).tolist()
    [[0.0, 0.0], [0.5, 0.0]]
    """
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def mean_map(
    maps: Float[Tensor, "batch people height width"], mask: Bool[Tensor, "batch people"] | None = None
) -> Float[Tensor, "batch 1 height width"]:
    """The mean of the maps of the real people; zeros where there is nobody."""
    if mask is None:
        return maps.mean(1, keepdim=True)
    shown = mask[..., None, None]
    return maps.masked_fill(~shown, 0).sum(1, keepdim=True) / shown.sum(1, keepdim=True).clamp(min=1)
