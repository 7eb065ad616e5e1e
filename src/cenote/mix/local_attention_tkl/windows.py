"""Kernels of similarity, summed in windows that saturate, and the best regions of a document.

Source: Hofstätter et al. (2020), arXiv 2005.04908.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.requirements import require_all_positive, require_at_least, require_one_of

Saturation = Literal["embedding", "linear", "log"]
MEANS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
EMPTY = -9900.0
"""Marks a window without terms."""
TAKEN = -10001.0
LEAST = 1e-10
TINY = 1e-13
STRIDE = 2
REACH = 2
"""Neighbours of a top on each side that count."""


def cosine(
    query: Float[Tensor, "batch queries dim"], document: Float[Tensor, "batch terms dim"]
) -> Float[Tensor, "batch queries terms"]:
    """Cosines of all pairs, `x / (|x| + 1e-13)`."""
    unit = [x / (x.norm(dim=-1, keepdim=True) + at_least(TINY, x)) for x in (query, document)]
    return unit[0] @ unit[1].mT


def at_least(number: float, x: Tensor) -> float:
    """The number, or the least that does not become 0 in half precision.

    >>> at_least(1e-10, torch.zeros(1)), at_least(1e-10, torch.zeros(1, dtype=torch.float16))
    (1e-10, 6.103515625e-05)
    """
    return max(number, torch.finfo(x.dtype).tiny)


def kernels(
    similarity: Float[Tensor, "batch queries terms"],
    means: Float[Tensor, "kernels"],
    deviations: Float[Tensor, "kernels"],
) -> Float[Tensor, "batch queries terms kernels"]:
    """`exp(-(s - mean)^2 / (2 deviation^2))`.

    >>> kernels(torch.ones(1, 1, 1), torch.tensor([1.0]), torch.tensor([0.1])).item()
    1.0
    """
    return torch.exp(-(similarity.unsqueeze(-1) - means).square() / (2 * deviations.square()))


class Windows(NamedTuple):
    """Sums of kernels in windows, `[batch, queries, windows, kernels]`, and of how many terms, `[batch, windows]`."""

    sums: Float[Tensor, "batch queries windows kernels"]
    lengths: Float[Tensor, "batch windows"]


def windowed(
    activation: Float[Tensor, "batch queries terms kernels"],
    mask: Bool[Tensor, "batch terms"],
    size: int = 30,
    stride: int = STRIDE,
    published: bool = False,
) -> Windows:
    """Sums over windows of `size` terms; what is shorter than a window is filled up.

    Args:
        activation: zeros where there is no term.
        mask: True on real terms.
        size, stride: of the windows.
        published: those windows alone that fit into the terms, padding included, so that which there are at the end depends on
            the batch; else all that hold a term, and empty neighbours behind them.
    """
    require_at_least(1, size=size, stride=stride)
    short = max(size - mask.shape[1], 0) if published else size + (REACH - 1) * stride
    sums = F.pad(activation, (0, 0, 0, short)).unfold(2, size, stride).sum(-1)
    lengths = F.pad(mask, (0, short), value=False).unfold(1, size, stride).sum(-1)
    return Windows(sums, lengths.to(activation.dtype))


class SaturatedWindows(nn.Module):
    """Scores of windows: `dense . sum_q value`, `value = a max(S, 1e-10)^(1 / b) - c`, where `a, b, c` are linear in
    `LayerNorm([w . query term, terms in the window])`.

    Args:
        dim: width of a query term.
        means: of the kernels.
        deviations: of the kernels, one for all or one each.
        saturation: `"embedding"` as published; `"linear"`, `"log"`: the sums, or the logarithm of their learned multiples. (The
            `"linear"` of the authors' code is `a max(S, 1e-10) + b` of idfs that this code is never given, and cannot run.)
        robust: no norm of these two numbers (which leaves of them only which is larger), and the length over that of a window
            (inferred).
        window: terms in a window.

    Source: Hofstätter et al. (2020), arXiv 2005.04908, and matchmaker's `sigir20_tkl.py`.
    """

    means: Float[Tensor, "kernels"]
    deviations: Float[Tensor, "kernels"]

    def __init__(
        self,
        dim: int,
        *,
        means: Sequence[float] = MEANS,
        deviations: float | Sequence[float] = 0.1,
        saturation: Saturation = "embedding",
        robust: bool = False,
        window: int = 30,
    ) -> None:
        super().__init__()
        require_one_of(get_args(Saturation), saturation=saturation)
        each = [deviations] * len(means) if isinstance(deviations, (int, float)) else list(deviations)
        require_all_positive(deviations=each)
        self.register_buffer("means", torch.tensor(list(means)))
        self.register_buffer("deviations", torch.tensor(each))
        self.saturation, self.robust, self.window = saturation, robust, window
        self.dense = nn.Linear(len(means), 1, bias=False)
        nn.init.uniform_(self.dense.weight, -0.014, 0.014)
        if saturation == "log":
            self.gain = nn.Parameter(torch.ones(len(means)))
        if saturation == "embedding":
            self.reduce = nn.Linear(dim, 1, bias=False)
            self.norm = nn.Identity() if robust else nn.LayerNorm(2)
            self.factor, self.root, self.offset = (nn.Linear(2, 1) for _ in range(3))
            for module in (self.factor, self.root, self.offset):
                nn.init.uniform_(module.weight, -0.014, 0.014)
                nn.init.constant_(module.bias, 100.0)

    def forward(
        self, windows: Windows, query: Float[Tensor, "batch queries dim"], mask: Bool[Tensor, "batch queries"]
    ) -> Float[Tensor, "batch windows"]:
        """A score of each window, 0 where it has no term.

        Args:
            windows: sums of kernels.
            query: its terms, in context.
            mask: True on real ones.
        """
        values = self.values(windows, query)
        counts = mask[:, :, None] & (windows.lengths > 0)[:, None]
        return self.dense((values * counts.unsqueeze(-1)).sum(1)).squeeze(-1)

    def values(
        self, windows: Windows, query: Float[Tensor, "batch queries dim"]
    ) -> Float[Tensor, "batch queries windows kernels"]:
        """The sums, saturated."""
        sums = windows.sums
        if self.saturation == "linear":
            return sums
        if self.saturation == "log":
            return torch.log((sums * self.gain).clamp(min=at_least(LEAST, sums)))
        length = windows.lengths / self.window if self.robust else windows.lengths
        known = self.reduce(query)[:, :, None].expand(-1, -1, sums.shape[2], -1)
        told = self.norm(torch.cat([known, length[:, None, :, None].expand(known.shape)], -1))
        raised: Tensor = sums.clamp(min=at_least(LEAST, sums)) ** (1 / self.root(told))
        return self.factor(told) * raised - self.offset(told)


class TopRegions(nn.Module):
    """The score of a document: its best windows and their neighbours, `sum_i c_i z_i`.

    Windows are taken greedily, each bans those that share terms with it. A window that scores exactly 0 counts as empty. Where
    nothing is left to choose, -1 is chosen, and counts nothing with its neighbours.

    Args:
        regions: how many windows.
        window, stride: of the windows: what is nearer than `window / stride` is banned.
        published: as in the authors' code: where nothing is left, empty or banned windows are chosen, whose neighbours count
            once more; neighbours over the edge are those at the edge.

    Source: Hofstätter et al. (2020), arXiv 2005.04908, and matchmaker's `sigir20_tkl.py`.
    """

    def __init__(self, regions: int = 3, *, window: int = 30, stride: int = STRIDE, published: bool = False) -> None:
        super().__init__()
        require_at_least(1, regions=regions, window=window, stride=stride)
        self.regions, self.apart, self.published = regions, window / stride, published
        self.weights = nn.Parameter(torch.ones((1 + 2 * REACH) * regions))

    def forward(self, scores: Float[Tensor, "batch windows"]) -> Regions:
        """Of scores of windows that of the document, and which windows made it."""
        scores = F.pad(scores, (0, max(self.regions - scores.shape[1], 0)))
        tops = self.tops(scores)
        steps = torch.tensor(_steps(REACH), device=scores.device)[:, None]
        around = tops[:, None] + steps
        values = scores.gather(1, around.flatten(1).clamp(0, scores.shape[1] - 1))
        if not self.published:
            inside = (around >= 0) & (around < scores.shape[1]) & (tops[:, None] >= 0)
            values = values.masked_fill(~inside.flatten(1), 0.0)
        values = values.masked_fill(values <= EMPTY, 0.0)
        return Regions((values * self.weights).sum(1), scores, tops, values)

    def tops(self, scores: Float[Tensor, "batch windows"]) -> Int[Tensor, "batch regions"]:
        """The windows that are chosen, best first."""
        left = scores.detach().masked_fill(scores == 0, EMPTY)
        number = torch.arange(left.shape[1], device=left.device)
        found = []
        for turn in range(self.regions):
            best = left.argmax(1, keepdim=True)
            nothing = left.gather(1, best) <= EMPTY
            found.append(best if self.published else best.masked_fill(nothing, -1))
            left = left.masked_fill((number - best).abs() < self.apart, TAKEN - turn)
        return torch.cat(found, 1)


class Regions(NamedTuple):
    """What `TopRegions` found.

    Attributes:
        score: of each document.
        windows: scores of all windows, at least as many as regions; 0 where one is empty.
        tops: the chosen ones, best first; -1 where none is left.
        values: theirs, then those of the windows before and behind each, nearest first; 0 where one is empty.
    """

    score: Float[Tensor, "batch"]
    windows: Float[Tensor, "batch windows"]
    tops: Int[Tensor, "batch regions"]
    values: Float[Tensor, "batch chosen"]


def _steps(reach: int) -> list[int]:
    """0, then -1, 1, -2, 2, ...

    >>> _steps(2)
    [0, -1, 1, -2, 2]
    """
    return [0, *(side * step for step in range(1, reach + 1) for side in (-1, 1))]
