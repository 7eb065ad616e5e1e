from __future__ import annotations

from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import segments
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Bags, PaddedTokens, Tokens
from cenote.pool.base import Pool, Pooled

Branches = Literal["both", "coarse", "fine"]
Fusion = Literal["scalars", "sigmoid", "concat"]
Variant = Literal["tap", "tsp", "sap", "asp", "gsap", "gasp", "drap", "drsp"]

_BRANCHES: dict[str, Branches] = {"t": "coarse", "s": "fine", "a": "fine", "g": "fine", "d": "both"}


class DraspPool(Pool):
    """Statistics of all frames plus attention-weighted statistics of short segments.

    Coarse: `[mu ; sigma]` with `mu = mean_t x_t`, `sigma = sqrt(max(mean_t x_t^2 - mu^2, eps))`.
    Fine: `p_n` the mean of the frames of segment `n`, `w = softmax_n(v . tanh(W p_n + b))`,
    `[mu' ; sigma']` with `mu' = sum_n w_n p_n`, `sigma' = sqrt(max(sum_n w_n p_n^2 - mu'^2, eps))`.
    `y = alpha coarse + beta fine`, at first the coarse branch alone (`alpha = 1, beta = 0`).

    Args:
        dim: width of a frame.
        segment: number of frames in a segment; the last one of a set may have fewer.
        statistics: `"mean_std"`, or `"mean"` for the means alone.
        branches: both, or one alone: coarse is mean (and deviation) pooling, fine with `segment=1` is attentive pooling.
        fusion: `"scalars"`: `alpha`, `beta` as above; `"sigmoid"`: `a coarse + (1 - a) fine` with `a = sigmoid(alpha)`;
            `"concat"`: side by side.
        project: whether a linear map brings the result back to `dim`, so that it fits the head of a mean.
        eps: floor of the variances.

    Raises:
        InputError: where an argument is out of range.

    Example:
        >>> pool = DraspPool(8, segment=4)
        >>> output, weights = pool.attend(torch.randn(2, 11, 8))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 2, 11]))

    Source: "DRASP: A Dual-Resolution Attentive Statistics Pooling Framework for Automatic MOS Prediction", APSIPA ASC 2025.

    Note:
        Without a mask the authors' code fills the last segment up with zeros and averages them in, so that a clip's result
        depends on whether a mask was given; here a segment is always the mean of its real frames.
        With a mask, segments are cut by slots: masked frames inside a clip still take time. In `Bags` there are none.
        The weights shown are those of the branches, coarse first, before `alpha` and `beta`.
        Second moments are taken around the mean of the set, which changes nothing but the rounding.
    """

    def __init__(
        self,
        dim: int,
        segment: int = 1,
        statistics: Literal["mean", "mean_std"] = "mean_std",
        branches: Branches = "both",
        fusion: Fusion = "scalars",
        project: bool = False,
        eps: float = 1e-5,
    ) -> None:
        require_one_of(("mean", "mean_std"), statistics=statistics)
        require_one_of(("both", "coarse", "fine"), branches=branches)
        require_one_of(("scalars", "sigmoid", "concat"), fusion=fusion)
        require_at_least(1, segment=segment)
        require_positive(eps=eps)
        width = dim if statistics == "mean" else 2 * dim
        joined = 2 * width if branches == "both" and fusion == "concat" else width
        super().__init__(dim, dim if project else joined)
        self.segment = segment
        self.statistics = statistics
        self.branches = branches
        self.fusion = fusion
        self.eps = eps
        self.permutation_invariant = segment == 1 or branches == "coarse"
        if branches != "coarse":
            self.sap_linear = nn.Linear(dim, dim)
            self.attention = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, 1)))
        if branches == "both" and fusion != "concat":
            self.alpha = nn.Parameter(torch.tensor(1.0 if fusion == "scalars" else 0.0))
        if branches == "both" and fusion == "scalars":
            self.beta = nn.Parameter(torch.tensor(0.0))
        self.projection = nn.Linear(joined, dim) if project else None

    @classmethod
    def variant(cls, name: Variant, dim: int, segment: int = 1, **settings: Any) -> Self:
        """The pooling of that name in the authors' code.

        `tap`, `tsp`: mean, mean and deviation; `sap`, `asp`: the same under attention to frames; `gsap`, `gasp`: to segments;
        `drap`, `drsp`: both branches, and so DRASP.

        Args:
            name: as above.
            dim: width of a frame.
            segment: number of frames in a segment, where the variant has segments.
            settings: further ones of the class.

        >>> DraspPool.variant("gasp", 8, segment=4).segment, DraspPool.variant("tap", 8).out_dim
        (4, 8)
        """
        require_one_of(get_args(Variant), name=name)
        means = name in ("tap", "sap", "gsap", "drap")
        return cls(
            dim,
            segment if name[0] in "gd" else 1,
            "mean" if means else "mean_std",
            _BRANCHES[name[0]],
            **settings,
        )

    def pool(self, tokens: Tokens) -> Pooled:
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        if self.branches != "fine":
            uniform = tokens.uniform()
            outputs.append(self.moments(tokens, uniform))
            weights.append(uniform)
        if self.branches != "coarse":
            cut, place = self.cut(tokens)
            attention = cut.softmax(torch.tanh(self.sap_linear(cut.values)) @ self.attention)
            outputs.append(self.moments(cut, attention))
            weights.append(tokens.replace(_frames_of(attention, place)).values)
        output = self.fused(outputs)
        return Pooled(output if self.projection is None else self.projection(output), torch.cat(weights, -1))

    def fused(self, outputs: list[Float[Tensor, "batch width"]]) -> Float[Tensor, "batch joined"]:
        """The branches as one vector."""
        if len(outputs) == 1:
            return outputs[0]
        coarse, fine = outputs
        if self.fusion == "concat":
            return torch.cat(outputs, -1)
        if self.fusion == "sigmoid":
            return fine + torch.sigmoid(self.alpha) * (coarse - fine)
        return self.alpha * coarse + self.beta * fine

    def moments(self, tokens: Tokens, weights: Float[Tensor, "*rows 1"]) -> Float[Tensor, "batch width"]:
        """Weighted mean, and where wanted deviation, of each channel."""
        dtype = tokens.values.dtype
        wide = accumulation_dtype(dtype)
        x, w = tokens.values.to(wide), weights.to(wide)
        mean = tokens.weighted_sum(w, x).squeeze(1)
        if self.statistics == "mean":
            return mean.to(dtype)
        variance = tokens.weighted_sum(w, (x - tokens.spread(mean)).square()).squeeze(1)
        return torch.cat([mean, variance.clamp(min=self.eps).sqrt()], -1).to(dtype)

    def cut(self, tokens: Tokens) -> tuple[Tokens, tuple[Int[Tensor, "_frames"], Float[Tensor, "*rows 1"]]]:
        """The means of the segments as sets, and where each frame went: its segment, and its share of the mean."""
        if isinstance(tokens, Bags):
            return self._cut_bags(tokens)
        assert isinstance(tokens, PaddedTokens)
        x, size = tokens.values, self.segment
        slots = x.shape[1]
        missing = -slots % size
        real = torch.ones_like(x[..., :1]) if tokens.mask is None else tokens.mask.unsqueeze(-1).to(x.dtype)
        x, counted = (nn.functional.pad(v, (0, 0, 0, missing)).unflatten(1, (-1, size)) for v in (x, real))
        counts = counted.sum(2)
        mask = None if tokens.mask is None else counts.squeeze(-1) > 0
        segment = torch.arange(slots, device=x.device).div(size, rounding_mode="floor")
        share = real / counts.clamp(min=1).index_select(1, segment)
        means = (x.sum(2, dtype=accumulation_dtype(x.dtype)) / counts.clamp(min=1)).to(x.dtype)
        return PaddedTokens(means, mask), (segment, share)

    def _cut_bags(self, tokens: Bags) -> tuple[Tokens, tuple[Int[Tensor, "total"], Float[Tensor, "total 1"]]]:
        frames = torch.arange(tokens.values.shape[0], device=tokens.values.device)
        sets = tokens.set_index()
        position = frames - tokens.offsets.index_select(0, sets)
        numbers = (tokens.lengths() + self.segment - 1).div(self.segment, rounding_mode="floor")
        offsets = nn.functional.pad(numbers.cumsum(0), (1, 0))
        segment = offsets.index_select(0, sets) + position.div(self.segment, rounding_mode="floor")
        sizes = torch.bincount(segment, minlength=int(offsets[-1]))
        means = segments.segment_mean(tokens.values, nn.functional.pad(sizes.cumsum(0), (1, 0)))
        share = sizes.index_select(0, segment).to(means.dtype).reciprocal().unsqueeze(-1)
        return Bags(means, offsets), (segment, share)


def _frames_of(
    weights: Float[Tensor, "*segments 1"], place: tuple[Int[Tensor, "_frames"], Float[Tensor, "*rows 1"]]
) -> Float[Tensor, "*rows 1"]:
    """What a weighted mean of segments took from each frame."""
    segment, share = place
    return weights.index_select(-2, segment) * share
