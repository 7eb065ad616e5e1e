"""Rotary positions: pairs of channels `(c, c + width / 2)`, turned by an angle that grows with the position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from cenote.core.errors import InputError


class Angles(NamedTuple):
    """Cosines and sines of positions, both halves of the channels alike, `[batch or 1, tokens, width]`."""

    cos: Float[Tensor, "_batch tokens width"]
    sin: Float[Tensor, "_batch tokens width"]

    def at(self, tokens: Int[Tensor, "_batch chosen"]) -> Angles:
        """Those of some tokens, by their numbers."""
        batch = max(len(tokens), len(self.cos))
        index = tokens.expand(batch, -1)[..., None].expand(-1, -1, self.cos.shape[-1])
        return Angles(*(x.expand(batch, -1, -1).gather(1, index) for x in self))


def angles(positions: Real[Tensor, "_batch tokens"], width: int, base: float = 10_000.0) -> Angles:
    """`p / base^(2c / width)` for the pair of channels c at position p.

    Raises:
        InputError: for an odd width.

    Example:
        >>> angles(torch.tensor([[0, 1]]), 2).cos.float()
        tensor([[[1.0000, 1.0000],
                 [0.5403, 0.5403]]])
    """
    if width < 2 or width % 2:
        raise InputError(f"width: expected an even number of channels, got {width}")
    # far positions lose their angles in float32
    speed = base ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / width)
    turned = (positions.double()[..., None] * speed).repeat(1, 1, 2)
    return Angles(turned.cos(), turned.sin())


def rotated(x: Float[Tensor, "batch heads tokens width"], by: Angles) -> Float[Tensor, "batch heads tokens width"]:
    """Each token turned by its angles; channels beyond those that the angles have stay.

    Example:
        >>> x, by = torch.randn(1, 2, 3, 4), angles(torch.arange(3)[None], 4)
        >>> torch.allclose(unrotated(rotated(x, by), by), x, atol=1e-6)
        True
    """
    cos, sin = (part.to(x.dtype).unsqueeze(1) for part in by)
    return _turned(x, cos, sin)


def unrotated(x: Float[Tensor, "batch heads tokens width"], by: Angles) -> Float[Tensor, "batch heads tokens width"]:
    """What `rotated` made this of; where angles carry a factor, as those of YaRN do, it is divided out."""
    cos, sin = (part.to(x.dtype).unsqueeze(1) for part in by)
    power = cos.square() + sin.square()
    return _turned(x, cos / power, -sin / power)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    if width > x.shape[-1]:
        raise InputError(f"angles: are of {width} channels, and what they turn has {x.shape[-1]}")
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
