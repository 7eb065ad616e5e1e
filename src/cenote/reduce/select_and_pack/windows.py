"""Blocks of Swin: attention within windows of a map, every second one with its windows moved by half their side.

Source: Liu et al. (2021), arXiv 2103.14030.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.reduce.select_and_pack.block import network


class WindowBlock(nn.Module):
    """`y = x + attention(LN(x))` within windows, with a bias by distance; then a network of two layers on every token.

    Args:
        dim: of the tokens.
        heads: of the attention; divides `dim`.
        side: of a window.
        shift: by how many rows and columns the windows are moved; what comes in over the edge of the map is not read.
        ratio: hidden width of the network, in widths of a token.

    Example:
        >>> WindowBlock(8, heads=2, side=2, shift=1)(torch.randn(1, 12, 8), (3, 4)).shape
        torch.Size([1, 12, 8])

    Source: Liu et al. (2021), arXiv 2103.14030.
    """

    def __init__(self, dim: int, heads: int, side: int = 7, shift: int = 0, ratio: float = 4.0) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, side=side)
        if dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}")
        if not 0 <= shift < side:
            raise InputError(f"shift: expected from 0 to below side={side}, got {shift}")
        self.heads, self.side, self.shift = heads, side, shift
        self.norm, self.qkv, self.output = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, (2 * side - 1) ** 2))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.network = network(dim, ratio)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        """Attend on a map of so many rows and columns."""
        if grid[0] * grid[1] != x.shape[1]:
            raise InputError(f"grid: {grid[0]} x {grid[1]} are not the {x.shape[1]} tokens")
        qkv = self._windows(self.qkv(self.norm(x)), grid)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        region = self._windows(self._regions(grid, x.device)[None, :, None].float(), grid)[..., 0]
        read = (region[:, :, None] == region[:, None]).repeat(len(x), 1, 1)
        bias = self.bias[:, self._distances(x.device)].to(x.dtype)
        found = F.scaled_dot_product_attention(q, k, v, torch.where(read[:, None], bias, -torch.inf))
        x = x + self.output(self._back(found.transpose(1, 2).flatten(2), grid))
        return x + self.network(x)

    def _windows(self, x: Float[Tensor, "batch tokens channels"], grid: tuple[int, int]) -> Tensor:
        side = self.side
        height, width = self._padded(grid)
        maps = F.pad(x.unflatten(1, grid), (0, 0, 0, width - grid[1], 0, height - grid[0]))
        maps = maps.roll((-self.shift, -self.shift), (1, 2))
        cut = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return cut.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def _back(self, windows: Tensor, grid: tuple[int, int]) -> Tensor:
        side = self.side
        height, width = self._padded(grid)
        cut = windows.view(-1, height // side, width // side, side, side, windows.shape[-1])
        maps = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        maps = maps.roll((self.shift, self.shift), (1, 2))
        return maps[:, : grid[0], : grid[1]].flatten(1, 2)

    def _padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        height, width = (-(-n // self.side) * self.side for n in grid)
        return height, width

    def _regions(self, grid: tuple[int, int], device: torch.device) -> Int[Tensor, "tokens"]:
        """Numbers of what may be read together: what comes in over an edge is apart, and padding, 0, too."""
        rows, columns = ((torch.arange(n, device=device) < self.shift).long() for n in grid)
        return (1 + 2 * rows[:, None] + columns).flatten()

    def _distances(self, device: torch.device) -> Int[Tensor, "length length"]:
        at = torch.arange(self.side, device=device)
        rows, columns = (t.flatten() for t in torch.meshgrid(at, at, indexing="ij"))
        apart = [(t[:, None] - t + self.side - 1) for t in (rows, columns)]
        return apart[0] * (2 * self.side - 1) + apart[1]
