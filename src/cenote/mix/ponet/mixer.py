"""PoNet's mixer: a global, a segment and a local view of the sequence for each token.

Source: Tan et al., "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.mix.base import Mixer
from cenote.mix.basic.grids import require_odd
from cenote.mix.ponet.segments import fixed_segments

View = Literal["global", "segment", "local"]
VIEWS: tuple[View, ...] = ("global", "segment", "local")


class PooledViews(NamedTuple):
    """What tokens are given of their sequence.

    Attributes:
        output: the fused views.
        weights: of the global view, what it took of each token.
    """

    output: Float[Tensor, "batch tokens dim"]
    weights: Float[Tensor, "batch heads tokens"]


def pooled_views(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch heads tokens width"],
    o: Float[Tensor, "batch heads tokens width"],
    segment: Float[Tensor, "batch tokens dim"],
    local: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"],
    segments: Int[Tensor, "batch tokens"],
    *,
    window: int = 3,
    value: Float[Tensor, "batch heads tokens width"] | None = None,
    special: Bool[Tensor, "batch tokens"] | None = None,
    views: Collection[View] = VIEWS,
    product: bool = True,
    weighted: bool = True,
) -> PooledViews:
    """`y_n = (g + s_n) * o_n + l_n`, by head.

    `g = sum_n a_n v_n` with `a = softmax_n(q . k_n / sqrt(width))` and `q` the mean query; `s_n` the largest of `segment`, by
    channel, in the segment of `n`; `l_n` the largest of `local` in the window around `n`.

    Args:
        q, k, o: maps of the tokens, by head.
        segment, local: maps of the tokens.
        mask: True = a real token.
        segments: the segment of each token; any whole numbers.
        window: number of neighbours with the token, odd.
        value: None for the keys, as in the authors' code.
        special: tokens that neither give nor take local views, and take no segment's.
        views: those that take part; a view that is left out is 0.
        product: False adds `o_n` in place of multiplying by it.
        weighted: False makes `g` the plain mean of the values.

    Returns:
        Zeros where the mask is False, and where a row has no real token.
    """
    require_odd(window=window)
    heads, count = q.shape[1], mask.sum(1).clamp(min=1)[:, None, None]
    q, k, o, v = (cleared(y, mask.unsqueeze(1)) for y in (q, k, o, k if value is None else value))
    segment, local = cleared(segment, mask), cleared(local, mask)
    low = torch.finfo(q.dtype).min
    if weighted:
        query = (q.sum(2, dtype=accumulation_dtype(q.dtype)) / count).to(q.dtype)
        scores = torch.einsum("bhd,bhnd->bhn", query, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask.unsqueeze(1), low).softmax(-1) * mask.unsqueeze(1)
    else:
        weights = (mask.unsqueeze(1) / count).to(q.dtype).expand(-1, heads, -1)
    pooled = torch.einsum("bhn,bhnd->bhd", weights, v).unsqueeze(2)

    def by_head(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    taken = pooled if "global" in views else torch.zeros_like(pooled)
    if "segment" in views:
        most = _largest_of_segment(segment, mask, segments)
        if special is not None:
            most = most.masked_fill(special.unsqueeze(-1), 0.0)
        taken = taken + by_head(most)
    fused = taken * o if product else taken + o
    if "local" in views:
        apart = mask if special is None else mask & ~special
        near = local.masked_fill(~apart.unsqueeze(-1), low)
        near = F.max_pool1d(near.transpose(1, 2), window, 1, window // 2).transpose(1, 2)
        fused = fused + by_head(near.masked_fill(~apart.unsqueeze(-1), 0.0))
    return PooledViews(fused.transpose(1, 2).flatten(2) * mask.unsqueeze(-1), weights)


def _largest_of_segment(x: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """Of each token the largest of its segment, by channel; 0 at padding."""
    n = x.shape[1]
    # numbered anew from 0, so that any numbers do
    numbers, order = segments.sort(dim=1, stable=True)
    rank = F.pad((numbers.diff(dim=1) != 0).long(), (1, 0)).cumsum(1)
    index = torch.empty_like(rank).scatter(1, order, rank).masked_fill(~mask, n)
    index = index.unsqueeze(-1).expand_as(x)
    low = x.new_full((len(x), n + 1, x.shape[2]), torch.finfo(x.dtype).min)
    return low.scatter_reduce(1, index, x, "amax").gather(1, index) * mask.unsqueeze(-1)


class PoNetMixer(Mixer):
    """`y_n = (g + s_n) * O x_n + l_n`: a global, a segment and a local view, in time linear in the tokens.

    `g = sum_n a_n K x_n` by head, `a = softmax_n(mean_m(Q x_m) . K x_n / sqrt(width))`; `s_n` the largest of `S x` in the
    segment of `n`, `l_n` the largest of `L x` in the window around `n`, by channel.

    Args:
        dim: width of a token.
        heads: number of heads.
        segments: number of segments of equal length that a sequence is cut into.
        window: number of neighbours with the token, odd.
        separate_value: whether the global view sums values with a map of their own, as the paper's text has it, and not keys,
            as the authors' code and weights.
        out: whether a last linear map stands behind the views, as in the place of attention.
        views: `"global"`, `"segment"`, `"local"`: those that take part.
        product: False adds `O x_n` in place of multiplying by it.
        weighted: False takes the plain mean of keys for `g`.

    Raises:
        InputError: for an even window, or heads that do not divide the width.

    Example:
        >>> PoNetMixer(8, heads=2, segments=4)(torch.randn(2, 21, 8)).shape
        torch.Size([2, 21, 8])

    Source:
        Tan et al. 2022, arXiv 2110.02442, section 3.

    Note:
        The global and the segment view look ahead: it cannot stand in a causal model.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 2,
        segments: int = 64,
        *,
        window: int = 3,
        separate_value: bool = False,
        out: bool = True,
        views: Collection[View] = VIEWS,
        product: bool = True,
        weighted: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, segments=segments)
        require_odd(window=window)
        if dim % heads:
            raise InputError(f"heads: expected a divisor of dim = {dim}, got {heads}")
        for view in views:
            require_one_of(VIEWS, views=view)
        self.dim, self.heads, self.segments, self.window = dim, heads, segments, window
        self.views, self.product, self.weighted = tuple(views), product, weighted
        self.dense_q = nn.Linear(dim, dim)
        self.dense_k = nn.Linear(dim, dim)
        self.dense_o = nn.Linear(dim, dim)
        self.dense_segment = nn.Linear(dim, dim)
        self.dense_local = nn.Linear(dim, dim)
        self.dense_v = nn.Linear(dim, dim) if separate_value else None
        self.proj = nn.Linear(dim, dim) if out else nn.Identity()
        self.inert_parameters = self._inert()

    def _inert(self) -> tuple[str, ...]:
        """Names of the parameters that the views leave unread."""
        unread = [f"dense_{view}" for view in ("segment", "local") if view not in self.views]
        if "global" not in self.views:
            unread += ["dense_q", "dense_k", "dense_v"]
        elif not self.weighted:
            unread += ["dense_q"] + ["dense_k"] * (self.dense_v is not None)
        if self.product and not {"global", "segment"} & set(self.views):
            unread += ["dense_o"]
        found = [n for n, _ in self.named_parameters() if n.split(".")[0] in unread]
        if self.dense_v is not None and "dense_k" not in unread:
            # what is the same for all tokens drops out of the softmax
            found += ["dense_k.bias"]
        return tuple(found + ["proj.weight"] * (not self.views and self.product and isinstance(self.proj, nn.Linear)))

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.view(x, mask).output

    def view(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        segments: Int[Tensor, "batch tokens"] | None = None,
        special: Bool[Tensor, "batch tokens"] | None = None,
    ) -> PooledViews:
        """The mixed tokens, and the weights of the global view.

        Args:
            x: the tokens.
            mask: True = a real token, None for all.
            segments: the segment of each token; None for those of equal length.
            special: tokens that neither give nor take local views, and take no segment's.
        """
        mask, _ = self._checked(x, mask, None)
        for name, given in (("segments", segments), ("special", special)):
            if given is not None and given.shape != mask.shape:
                raise InputError(f"{name}: expected {list(mask.shape)} as the tokens, got {list(given.shape)}")
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        q, k, o = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.dense_q, self.dense_k, self.dense_o)
        )
        value = None if self.dense_v is None else self.dense_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        found = pooled_views(
            q,
            k,
            o,
            self.dense_segment(x),
            self.dense_local(x),
            mask,
            fixed_segments(mask, self.segments) if segments is None else segments,
            window=self.window,
            value=value,
            special=special,
            views=self.views,
            product=self.product,
            weighted=self.weighted,
        )
        return PooledViews(self.proj(found.output) * mask.unsqueeze(-1), found.weights)
