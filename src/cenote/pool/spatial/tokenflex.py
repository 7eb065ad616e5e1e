from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.sets import as_tokens

NumTokens = int | tuple[int, int]

COUNTS = (64, 144, 256)


class TokenFlex(nn.Module):
    """Vision features to any number of language model tokens with the same weights: pool on a grid, then a gated map.

    `P = AdaptiveAvgPool(X)` to `n x n`, row by row; `Y = W_down (SiLU(W_gate P) * (W_up P))`. A drop-in for the projector of
    a vision-language model: set `num_tokens`, or give it per call, and have the text hold as many placeholders per image
    (see `check_placeholders`).

    Args:
        dim: width of the vision features.
        out_dim: width of the language model.
        num_tokens: `N`, a square number `n^2`, or a grid `(rows, columns)`.
        hidden_dim: width between the maps; default `out_dim`.
        norm: whether pooled features pass a LayerNorm first.

    Example:
        >>> project = TokenFlex(32, 64, num_tokens=16)
        >>> features = torch.randn(2, 256, 32)
        >>> project(features).shape, project(features, num_tokens=64).shape, project(features, num_tokens=(4, 8)).shape
        (torch.Size([2, 16, 64]), torch.Size([2, 64, 64]), torch.Size([2, 32, 64]))

    Source: "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", 2025.

    Note:
        No code of the authors was found. From the paper: adaptive average pooling to `N = n^2` and SwiGLU. Ours: no biases,
        `hidden_dim = out_dim`, weights drawn with standard deviation 0.02, LayerNorm and oblong grids as options.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_tokens: NumTokens = 256,
        hidden_dim: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        for name, width in (("dim", dim), ("out_dim", out_dim), ("hidden_dim", hidden_dim)):
            if width is not None and width < 1:
                raise InputError(f"{name}: expected a positive width, got {width}")
        grid_of(num_tokens)
        self.dim = dim
        self.out_dim = out_dim
        self.num_tokens = num_tokens
        hidden = out_dim if hidden_dim is None else hidden_dim
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, out_dim, bias=False)
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "batch cells dim"] | Float[Tensor, "batch dim height width"],
        num_tokens: NumTokens | None = None,
    ) -> Float[Tensor, "batch tokens out_dim"]:
        """Project `x` to `num_tokens` tokens (default: the module's).

        Args:
            x: features of a square grid row by row without a class token, or a map.
            num_tokens: as in the constructor.

        Raises:
            InputError: where `x` stands on no square grid or has another width, or `num_tokens` is no square.
        """
        rows, columns = grid_of(self.num_tokens if num_tokens is None else num_tokens)
        maps = as_map(x, self.dim)
        if (rows > maps.shape[2] or columns > maps.shape[3]) and not torch.compiler.is_compiling():
            warnings.warn(
                f"num_tokens: a grid of {rows} x {columns} is finer than the features' {maps.shape[2]} x {maps.shape[3]}, "
                f"so that cells are repeated",
                stacklevel=2,
            )
        z = self.norm(F.adaptive_avg_pool2d(maps, (rows, columns)).flatten(2).transpose(1, 2))
        return self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))


class TokenCountSampler:
    """Draws how many visual tokens an optimiser step uses, the same for all of its samples.

    The draw depends on `seed` and the number of the step alone: all ranks agree without talking, and a resumed training goes
    on as it would have.

    Args:
        counts: what may be drawn.
        probs: how often, one number per count; default all alike.
        seed: of the draws.

    Example:
        >>> sampler = TokenCountSampler()
        >>> sampler.at(0) in (64, 144, 256), round(sampler.expected, 1)
        (True, 154.7)
        >>> steps = zip(range(3), sampler)  # an endless iterator, from step 0

    Source: as `TokenFlex`.

    Note:
        The paper tunes the probabilities but its values are not available; all alike is taken here.
    """

    def __init__(self, counts: Sequence[int] = COUNTS, probs: Sequence[float] | None = None, seed: int = 0) -> None:
        p = [1.0] * len(counts) if probs is None else list(probs)
        if not counts or len(p) != len(counts) or min(p) < 0 or sum(p) <= 0:
            raise InputError(
                f"probs: expected one non-negative number per count, not all 0, got {p} for counts {list(counts)}"
            )
        for count in counts:
            grid_of(count)
        self.counts = tuple(counts)
        self.probs = tuple(q / sum(p) for q in p)
        self.seed = seed

    @property
    def expected(self) -> float:
        """Mean number of tokens per step."""
        return sum(p * n for p, n in zip(self.probs, self.counts, strict=True))

    def at(self, step: int) -> int:
        """The count of that step."""
        return int(np.random.default_rng([self.seed, step]).choice(self.counts, p=self.probs))

    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield self.at(step)
            step += 1


def grid_of(num_tokens: NumTokens) -> tuple[int, int]:
    """`(rows, columns)` of so many tokens.

    >>> grid_of(144), grid_of((4, 8))
    ((12, 12), (4, 8))
    """
    if isinstance(num_tokens, int):
        side = math.isqrt(max(num_tokens, 0))
        if num_tokens < 1 or side * side != num_tokens:
            raise InputError(
                f"num_tokens: expected a square number, got {num_tokens}; the nearest below is {side * side}, "
                f"or give a grid (rows, columns)"
            )
        return side, side
    if len(num_tokens) != 2 or min(num_tokens) < 1:
        raise InputError(f"num_tokens: expected a square number or a grid (rows, columns), got {num_tokens}")
    return num_tokens


def as_map(
    x: Float[Tensor, "batch cells dim"] | Float[Tensor, "batch dim height width"], dim: int
) -> Float[Tensor, "batch dim height width"]:
    """Features of a square grid, row by row, as a map; a map as it is."""
    cells = as_tokens(x, None, dim).values
    if x.dim() == 4:
        return x
    side = math.isqrt(cells.shape[1])
    if side * side != cells.shape[1] or side == 0:
        raise InputError(
            f"x: {cells.shape[1]} cells are no square grid; leave out the class token, or give a "
            f"[batch, {dim}, height, width] map"
        )
    return x.transpose(1, 2).unflatten(2, (side, side))


def check_placeholders(
    input_ids: Int[Tensor, "batch length"],
    placeholder: int,
    num_tokens: NumTokens,
    images: int | Sequence[int] | Int[Tensor, "batch"] = 1,
) -> None:
    """Check that each text holds `num_tokens` placeholders for each of its images (or tiles).

    Args:
        input_ids: token ids of the texts.
        placeholder: id of the image token.
        num_tokens: what the projector gives per image.
        images: number of images, for all texts or for each.

    Raises:
        InputError: naming the first text that does not fit.

    Source: as `TokenFlex`, which needs it.

    >>> check_placeholders(torch.tensor([[7, 7, 7, 7, 1, 2]]), placeholder=7, num_tokens=4)
    """
    rows, columns = grid_of(num_tokens)
    found = (input_ids == placeholder).sum(1)
    wanted = rows * columns * torch.as_tensor(images, device=found.device).expand_as(found)
    if not torch.equal(found, wanted):
        i = int((found != wanted).nonzero()[0])
        raise InputError(
            f"input_ids: text {i} has {int(found[i])} image placeholders, expected {int(wanted[i])}; expand each image token "
            f"to {rows * columns}, the number that the projector gives"
        )


def expand_placeholders(
    input_ids: Int[Tensor, "length"], placeholder: int, num_tokens: NumTokens, tiles: int | Sequence[int] = 1
) -> Int[Tensor, "longer"]:
    """A text with one placeholder per image -> the same with `num_tokens` for each tile of each image.

    Args:
        input_ids: token ids of one text.
        placeholder: id of the image token.
        num_tokens: what the projector gives per tile.
        tiles: of every image, or of each.

    Raises:
        InputError: where tiles are named for another number of images, or an image has none.

    Source: as `TokenFlex`, which needs it.

    >>> expand_placeholders(torch.tensor([1, 7, 2]), placeholder=7, num_tokens=4).tolist()
    [1, 7, 7, 7, 7, 2]
    """
    rows, columns = grid_of(num_tokens)
    is_image = input_ids == placeholder
    images = int(is_image.sum())
    of_image = [tiles] * images if isinstance(tiles, int) else list(tiles)
    if len(of_image) != images or any(n < 1 for n in of_image):
        raise InputError(f"tiles: expected at least one for each of the text's {images} images, got {tiles}")
    times = torch.ones_like(input_ids)
    times[is_image] = torch.tensor(of_image, dtype=times.dtype, device=times.device) * rows * columns
    return input_ids.repeat_interleave(times)
