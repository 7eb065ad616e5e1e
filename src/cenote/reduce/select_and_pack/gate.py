"""Which tokens attend: a score per token, a choice that can be drawn and differentiated, and what the scores are taught.

Source: Zhang, Li, Seo and Cao (2024), arXiv 2410.23608.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive

Choice = Literal["learned", "top", "all"]


class Gated(NamedTuple):
    """Of a gate.

    Attributes:
        x: the tokens times their gates, and times 1, with the gradient of the choice.
        score: s.
        keep: the choice.
    """

    x: Float[Tensor, "batch tokens dim"]
    score: Float[Tensor, "batch tokens 1"]
    keep: Bool[Tensor, "batch tokens"]


class SelectionGate(nn.Module):
    """`s = max(f(r), s_up)`, `r_g = sigmoid(s) r`, and a token is kept or not.

    In training the choice is drawn by Gumbel-Softmax over `(log sigmoid(s), log sigmoid(-s))`, hard, with the gradient
    of the soft one; in eval mode `keep = sigmoid(s) > threshold`.

    Args:
        dim: of the tokens.
        deep: two layers, `dim -> dim / 4 -> 1`, and not one.
        temperature: of the draw.
        threshold: in eval mode; lower keeps more.
        choice: `"learned"`; `"top"`: the `share` of the tokens of each image that scores most; `"all"`.
        share: of `"top"`.

    Source: Zhang et al. (2024), arXiv 2410.23608; the threshold's value is not published.
    """

    def __init__(
        self,
        dim: int,
        deep: bool = False,
        temperature: float = 1.0,
        threshold: float = 0.5,
        choice: Choice = "learned",
        share: float = 0.5,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        require_positive(temperature=temperature)
        require_one_of(get_args(Choice), choice=choice)
        for name, value in (("threshold", threshold), ("share", share)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}: expected a share from 0 to 1, got {value}")
        self.temperature, self.threshold, self.choice, self.share = temperature, threshold, choice, share
        inner = max(1, dim // 4)
        self.scorer = (
            nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, 1)) if deep else nn.Linear(dim, 1)
        )

    def forward(
        self,
        r: Float[Tensor, "batch tokens dim"],
        score_up: Float[Tensor, "batch tokens 1"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        noise: Float[Tensor, "batch tokens 1"] | None = None,
    ) -> Gated:
        """Score and choose.

        Args:
            r: tokens.
            score_up: the scores of the block before, on these tokens.
            mask: True = a real token; others are never kept.
            noise: uniform, from 0 to 1; drawn by default.
        """
        score = self.scorer(r)
        if score_up is not None:
            if score_up.shape != score.shape:
                raise InputError(f"score_up: expected {list(score.shape)}, got {list(score_up.shape)}; call resampled")
            score = torch.maximum(score, score_up)
        drawn = self.drawn(score, noise)
        keep = drawn[..., 0] > 0.5
        keep = keep if mask is None else keep & mask
        return Gated(drawn * score.sigmoid() * r, score, keep)

    def drawn(
        self, score: Float[Tensor, "batch tokens 1"], noise: Float[Tensor, "batch tokens 1"] | None = None
    ) -> Float[Tensor, "batch tokens 1"]:
        """1 for a token that is kept, 0 for others; the gradient is that of the soft choice where one is drawn."""
        if self.choice == "all":
            return torch.ones_like(score)
        if self.choice == "top":
            count = round(self.share * score.shape[1])
            order = score.detach().sort(dim=1, descending=True, stable=True).indices[:, :count]
            return torch.zeros_like(score).scatter(1, order, 1.0)
        if not self.training and noise is None:
            return (score.sigmoid() > self.threshold).to(score)
        tiny = torch.finfo(score.dtype).eps
        u = (torch.rand_like(score) if noise is None else noise).clamp(tiny, 1 - tiny)
        # the difference of two Gumbel draws is logistic, and that of the two logits is s
        soft = ((score + u.log() - (-u).log1p()) / self.temperature).sigmoid()
        return ((soft > 0.5).to(soft) - soft.detach()) + soft


def resampled(
    score: Float[Tensor, "batch tokens 1"], grid: tuple[int, int], to: tuple[int, int]
) -> Float[Tensor, "batch to_tokens 1"]:
    """A map of scores on another grid: the largest of each cell where that is coarser, the nearest where it is finer.

    >>> resampled(torch.arange(4.0).view(1, 4, 1), (2, 2), (1, 1)).flatten().tolist()
    [3.0]
    """
    if score.shape[1] != grid[0] * grid[1]:
        raise InputError(f"grid: {grid[0]} x {grid[1]} are not the {score.shape[1]} scores")
    if grid == to:
        return score
    maps = score.transpose(1, 2).unflatten(-1, grid)
    # axis by axis: a map may be coarser in one and finer in the other
    rows, columns = (min(a, b) for a, b in zip(grid, to, strict=True))
    maps = F.adaptive_max_pool2d(maps, (rows, columns))
    return F.interpolate(maps, to, mode="nearest").flatten(2).transpose(1, 2)


def selection_loss(
    scores: Sequence[Float[Tensor, "batch _tokens 1"]], labels: Sequence[Bool[Tensor, "batch _tokens"]]
) -> Float[Tensor, ""]:
    """`-sum_blocks mean(y log sigmoid(s) + (1 - y) log(1 - sigmoid(s)))`.

    Args:
        scores: of each block.
        labels: of each block, on its own grid.

    >>> round(float(selection_loss([torch.zeros(1, 2, 1)], [torch.tensor([[True, False]])])), 4)
    0.6931
    """
    if not scores or len(scores) != len(labels):
        raise InputError(f"labels: expected one map for each of {len(scores)} blocks, got {len(labels)}")
    each = [F.binary_cross_entropy_with_logits(s[..., 0], y.to(s)) for s, y in zip(scores, labels, strict=True)]
    return torch.stack(each).sum()


def labels_of_masks(masks: Bool[Tensor, "batch height width"], grid: tuple[int, int]) -> Bool[Tensor, "batch tokens"]:
    """Cells that any pixel of an object is in.

    >>> labels_of_masks(torch.eye(4, dtype=torch.bool)[None], (2, 2)).int().tolist()
    [[1, 0, 0, 1]]
    """
    return F.adaptive_max_pool2d(masks[:, None].float(), grid).flatten(1) > 0


def labels_of_boxes(
    boxes: Sequence[Float[Tensor, "_boxes 4"]], size: tuple[int, int], grid: tuple[int, int]
) -> Bool[Tensor, "batch tokens"]:
    """Cells that any box overlaps.

    Args:
        boxes: of each image, `x1, y1, x2, y2` in pixels; none is `[0, 4]`.
        size: height and width of the images.
        grid: rows and columns of cells.

    >>> labels_of_boxes([torch.tensor([[1.0, 0.0, 3.0, 1.0]])], (4, 4), (2, 2)).int().tolist()
    [[1, 1, 0, 0]]
    """
    found = []
    for of_image in boxes:
        if of_image.dim() != 2 or of_image.shape[1] != 4 or bool((of_image[:, 2:] < of_image[:, :2]).any()):
            raise InputError("boxes: expected [boxes, 4] of each image, x1 <= x2 and y1 <= y2")
        # a box that has no extent overlaps nothing
        solid = (of_image[:, 2:] > of_image[:, :2]).all(1)
        x1, y1, x2, y2 = of_image[solid].double().unbind(1)
        hits = []
        for low, high, extent, cells in ((y1, y2, size[0], grid[0]), (x1, x2, size[1], grid[1])):
            edges = torch.arange(cells + 1, device=of_image.device).double() * extent / cells
            hits.append((low[:, None] < edges[1:]) & (high[:, None] > edges[:-1]))
        found.append((hits[0][:, :, None] & hits[1][:, None]).flatten(1).any(0))
    if not found:
        raise InputError("boxes: expected those of at least one image")
    return torch.stack(found)
