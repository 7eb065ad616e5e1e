"""Visual tokens of a frame merged to a few, and the map into a decoder's width.

Source: Yan, Han, Tsai, Xue, Fang, Hong, Guo, Zhang, "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual
Cross-Attention Mechanisms" (2025), arXiv 2505.17020.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of

Mode = Literal["avg", "bilinear"]


def token_merge(
    x: Float[Tensor, "*batch tokens dim"], side: int, mode: Mode = "avg"
) -> Float[Tensor, "*batch merged dim"]:
    """A square grid of tokens, row by row, to `side x side` of them, without parameters.

    From 27 x 27 to 3 x 3 each is the mean of 9 x 9 tokens. (The paper's text says N / 9, its table 9 tokens of 729.)

    Args:
        x: tokens of frames.
        side: of the merged grid.
        mode: `"avg"`: means of adaptive windows; `"bilinear"`: resized, with weights that fall over the window's neighbours.

    Raises:
        InputError: where the tokens are no square grid, or fewer than asked for.

    Example:
        >>> token_merge(torch.arange(16.0).view(16, 1), 2)[:, 0].tolist()
        [2.5, 4.5, 10.5, 12.5]
    """
    require_at_least(1, side=side)
    require_one_of(get_args(Mode), mode=mode)
    tokens, dim = x.shape[-2:]
    whole = math.isqrt(tokens)
    if whole * whole != tokens or whole < side:
        raise InputError(
            f"x: expected a square grid of at least {side} x {side} tokens, got {tokens}; leave [CLS] and registers out"
        )
    grid = x.reshape(-1, whole, whole, dim).permute(0, 3, 1, 2)
    if mode == "avg":
        merged = F.adaptive_avg_pool2d(grid, side)
    else:
        merged = F.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)
    return merged.flatten(2).transpose(1, 2).reshape(*x.shape[:-2], side * side, dim)


class VisualProjector(nn.Module):
    """`W_2 gelu(W_1 norm(x))`, of merged and of original tokens alike.

    Args:
        dim: of the tokens.
        out_dim: of the decoder.
        hidden: between; that of the decoder by default.

    Note: that merged and original tokens share it, and where its norm stands, is inferred.

    Example:
        >>> VisualProjector(8, 16)(torch.randn(2, 9, 8)).shape
        torch.Size([2, 9, 16])
    """

    def __init__(self, dim: int, out_dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = out_dim if hidden is None else hidden
        require_at_least(1, dim=dim, out_dim=out_dim, hidden=hidden)
        self.norm = nn.LayerNorm(dim)
        self.wide, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, out_dim)

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens out"]:
        return self.out(F.gelu(self.wide(self.norm(x))))
