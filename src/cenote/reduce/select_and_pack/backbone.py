"""SPT: the first stages of Swin, then stages in which only selected tokens attend.

Source: Zhang, Li, Seo and Cao (2024), arXiv 2410.23608.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.reduce.select_and_pack.block import Selected, SPABlock
from cenote.reduce.select_and_pack.gate import SelectionGate, labels_of_masks, resampled
from cenote.reduce.select_and_pack.packing import PackInfo, Packing
from cenote.reduce.select_and_pack.windows import WindowBlock

Size = Literal["tiny", "small", "base"]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 96, "depths": (2, 2, 10, 2), "heads": (3, 6, 12, 24)},
    "small": {"dim": 96, "depths": (2, 2, 22, 2), "heads": (3, 6, 12, 24)},
    "base": {"dim": 128, "depths": (2, 2, 22, 2), "heads": (4, 8, 16, 32)},
}
"""Swin's, with 4 blocks more in the third stage."""


class Seen(NamedTuple):
    """What an `SPT` makes of images.

    Attributes:
        logits: of the classes.
        maps: the features behind each stage.
        scores, keeps, infos: of each selecting block.
        grids: rows and columns of each of them.
        selection_loss: summed over them; `None` without labels.
    """

    logits: Float[Tensor, "batch classes"]
    maps: tuple[Float[Tensor, "batch _channels _height _width"], ...]
    scores: tuple[Float[Tensor, "batch _tokens 1"], ...]
    keeps: tuple[Bool[Tensor, "batch _tokens"], ...]
    infos: tuple[PackInfo, ...]
    grids: tuple[tuple[int, int], ...]
    selection_loss: Float[Tensor, ""] | None


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width; an odd map gets a row or a column of zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch merged wide"]:
        """Merge a map of so many rows and columns."""
        maps = nn.functional.pad(x.unflatten(1, grid), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        cut = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
        return self.reduction(self.norm(cut.flatten(3).flatten(1, 2)))


class SPT(nn.Module):
    """A network of stages, each of half the rows and columns of the one before, with a head that names classes.

    Args:
        classes: of the head, each by a logit of its own; 0: no head, `logits` are the mean of the last tokens.
        dim: width of the first stage.
        depths: blocks of each stage.
        heads: of each stage.
        start: the stage, from 1, from which on blocks select.
        side: of a window; a container has its square.
        patch: side of a patch.
        channels: of the images.
        packing: see `pack_plan`.
        gate: settings of the gates, see `SelectionGate`.

    Example:
        >>> model = SPT(3, dim=8, depths=(1, 1), heads=(1, 2), start=2, side=2, patch=2).eval()
        >>> [tuple(m.shape[1:]) for m in model(torch.zeros(1, 3, 16, 16)).maps]
        [(8, 8, 8), (16, 4, 4)]

    Source: Zhang et al. (2024), arXiv 2410.23608; Swin: Liu et al. (2021), arXiv 2103.14030.
    """

    def __init__(
        self,
        classes: int,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 10, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        start: int = 3,
        side: int = 7,
        patch: int = 4,
        channels: int = 3,
        packing: Packing = "stream",
        gate: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, start=start, side=side, patch=patch, channels=channels)
        require_at_least(0, classes=classes)
        if not depths or len(depths) != len(heads) or min(depths) < 1:
            raise InputError(f"depths: expected as many as heads={tuple(heads)}, at least 1 each, got {tuple(depths)}")
        self.start = start
        self.embedding = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)
        widths = [dim * 2**n for n in range(len(depths))]
        self.merges = nn.ModuleList(PatchMerging(w) for w in widths[:-1])
        self.stages = nn.ModuleList()
        for n, (depth, count, width) in enumerate(zip(depths, heads, widths, strict=True)):
            blocks = nn.ModuleList()
            for i in range(depth):
                shift = side // 2 if i % 2 else 0
                if n + 1 < start:
                    blocks.append(WindowBlock(width, count, side, shift))
                else:
                    blocks.append(SPABlock(width, count, side**2, packing, SelectionGate(width, **(gate or {})), shift))
            self.stages.append(blocks)
        self.last_norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], classes) if classes else nn.Identity()

    @classmethod
    def of(cls, size: Size, classes: int, **settings: Any) -> SPT:
        """SPT-T, SPT-S or SPT-B."""
        require_one_of(SIZES, size=size)
        return cls(classes, **(SIZES[size] | settings))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        masks: Bool[Tensor, "batch height width"] | None = None,
    ) -> Seen:
        """See images.

        Args:
            images: of a size that is a multiple of the patch.
            masks: the pixels of objects, from which the scores are taught at every scale.
        """
        patch = self.embedding.kernel_size[0]
        if images.shape[2] % patch or images.shape[3] % patch:
            raise InputError(f"images: expected sides that are multiples of {patch}, got {list(images.shape[2:])}")
        if masks is not None and masks.shape != (len(images), *images.shape[2:]):
            raise InputError(f"masks: expected {[len(images), *images.shape[2:]]} as images, got {list(masks.shape)}")
        x = self.embedding(images)
        grid = (x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).transpose(1, 2))
        maps: list[Tensor] = []
        found: list[Selected] = []
        grids: list[tuple[int, int]] = []
        for n, stage in enumerate(self.stages):
            if n:
                x, grid = self.merges[n - 1](x, grid), (-(-grid[0] // 2), -(-grid[1] // 2))
            label = None if masks is None else labels_of_masks(masks, grid)
            for block in stage.children():
                if isinstance(block, WindowBlock):
                    x = block(x, grid)
                    continue
                up = resampled(found[-1].score, grids[-1], grid) if found else None
                found.append(block(x, up, label, grid))
                grids.append(grid)
                x = found[-1].y
            maps.append(x.transpose(1, 2).unflatten(-1, grid))
        logits = self.head(self.last_norm(x).mean(1))
        losses = [f.loss for f in found if f.loss is not None]
        return Seen(
            logits,
            tuple(maps),
            tuple(f.score for f in found),
            tuple(f.keep for f in found),
            tuple(f.info for f in found),
            tuple(grids),
            torch.stack(losses).sum() if losses else None,
        )
