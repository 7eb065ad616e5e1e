"""`A(q, K, V) = sum_i p(a(k_i, q)) v_i`, with everything chosen by name, and the survey's axes.

Source: Chaudhari, Mithal, Polatkan and Ramanath, "An Attentive Survey of Attention Models" (2021), arXiv 1904.02874.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.attention_survey.alignments import alignment as alignment_named
from cenote.mix.base import Normaliser
from cenote.mix.normalisers import normaliser, softmax

Near = Literal["monotonic", "predictive"]
Coarse = Literal["max", "mean"]


class Attended(NamedTuple):
    """What attention gives.

    Attributes:
        context: `[batch, queries, dim]`.
        weights: of each query and head.
    """

    context: Float[Tensor, "batch queries dim"]
    weights: Float[Tensor, "batch heads queries keys"]


class LocalPositions(nn.Module):
    """Where a query looks: weights around a place, `exp(-(s - p)^2 / (2 sigma^2))` in `[p - D, p + D]`, 0 elsewhere.

    Args:
        kind: `"monotonic"`: `p_t = t`, the query's own number, which counts the real tokens alone where keys ask;
            `"predictive"`: `p_t = S sigmoid(v . tanh(W q))`, S the number of keys.
        around: D.
        query_dim: of the queries, for `"predictive"`.
        sigma: `D / 2` for predictive places, infinite for monotonic ones, unless given.
        hidden: width of the prediction.

    Source: Luong, Pham and Manning (2015), arXiv 1508.04025.
    """

    def __init__(
        self,
        kind: Near,
        around: int,
        query_dim: int | None = None,
        sigma: float | None = None,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        require_one_of(get_args(Near), kind=kind)
        require_at_least(1, around=around)
        if sigma is not None:
            require_positive(sigma=sigma)
        self.kind, self.around = kind, around
        self.sigma = sigma if sigma is not None else around / 2 if kind == "predictive" else math.inf
        self.predict = None
        if kind == "predictive":
            if query_dim is None:
                raise InputError("query_dim: predictive places are made of queries; give their width")
            self.predict = nn.Sequential(
                nn.Linear(query_dim, hidden, bias=False), nn.Tanh(), nn.Linear(hidden, 1, bias=False)
            )

    def forward(
        self, q: Float[Tensor, "batch queries dim"], mask: Bool[Tensor, "batch keys"], of_keys: bool = False
    ) -> Float[Tensor, "batch queries keys"]:
        """The factor of each weight.

        Args:
            q: queries.
            mask: True = a real key.
            of_keys: the queries are those of the keys, so that the mask is theirs too.
        """
        place = mask.cumsum(1).sub(1)
        if self.predict is None and of_keys:
            centre = place.to(q.dtype)
        elif self.predict is None:
            centre = torch.arange(q.shape[1], device=q.device, dtype=q.dtype).expand(q.shape[0], -1)
        else:
            centre = mask.sum(1, keepdim=True) * self.predict(q).squeeze(-1).sigmoid()
        away = place[:, None, :] - centre.unsqueeze(-1)
        near = (-away.square() / (2 * self.sigma**2)).exp()
        return near.masked_fill(away.abs() > self.around, 0.0)


class GeneralAttention(nn.Module):
    """One layer for every alignment and distribution.

        c_t = sum_i p(a(k_i, q_t)) v_i

    Args:
        dim: of keys and values.
        alignment: one of `cenote.mix.attention_survey.alignments.ALIGNMENTS`.
        distribution: one of `cenote.mix.normalisers.NORMALISERS`, or an object.
        query_dim: of queries; as the keys by default.
        heads: above 1, queries, keys and values are mapped and split, and heads mapped back to `dim`; the alignment's
            parameters are those of all heads.
        learned_queries: so many queries of its own, for inner attention; 0 for queries that are given.
        local: where queries look; everywhere by default.
        settings: of the alignment: `hidden`, `activation`, `layers`, `most`, ...

    Example:
        >>> layer = GeneralAttention(8, "additive", "sparsemax", learned_queries=1)
        >>> found = layer(torch.randn(2, 5, 8))
        >>> found.context.shape, found.weights.shape
        (torch.Size([2, 1, 8]), torch.Size([2, 1, 1, 5]))

    Source: Chaudhari et al. (2021), arXiv 1904.02874.
    """

    def __init__(
        self,
        dim: int,
        alignment: str = "scaled dot",
        distribution: str | Normaliser = "softmax",
        query_dim: int | None = None,
        heads: int = 1,
        learned_queries: int = 0,
        local: LocalPositions | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads)
        require_at_least(0, learned_queries=learned_queries)
        if dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}")
        width = dim if query_dim is None else query_dim
        self.dim, self.query_dim, self.heads = dim, width, heads
        self.projections: nn.ModuleDict | None = None
        query_width = width
        if heads > 1:
            wide = {"q": width, "k": dim, "v": dim, "out": dim}
            self.projections = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in wide.items()})
            query_width = dim // heads
        self.alignment = alignment_named(alignment, query_width, dim // heads, **(settings or {}))
        self.distribution = normaliser(distribution)
        self.local = local
        self.queries = nn.Parameter(torch.randn(learned_queries, width) / math.sqrt(width)) if learned_queries else None

    def forward(
        self,
        keys: Float[Tensor, "batch keys dim"],
        queries: Float[Tensor, "batch queries query_dim"] | None = None,
        values: Float[Tensor, "batch keys value_dim"] | None = None,
        mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Attended:
        """Attend.

        Args:
            keys: what is looked at.
            queries: of another sequence; the layer's own where it has some, else the keys themselves (self-attention).
            values: what is summed; the keys by default.
            mask: True = a real key; an item without one gives zeros.

        Raises:
            InputError: where queries are given to a layer that has its own.
        """
        if queries is not None and self.queries is not None:
            raise InputError("queries: this layer has queries of its own; build it with learned_queries=0")
        of_keys = queries is None and self.queries is None
        values = cleared(keys if values is None else values, mask)
        keys = cleared(keys, mask)
        if queries is None:
            queries = keys if self.queries is None else self.queries.expand(len(keys), -1, -1)
        real = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device) if mask is None else mask
        q, k, v = (self._split(name, x) for name, x in (("q", queries), ("k", keys), ("v", values)))
        seen = real[:, None, None, :].expand(-1, 1, q.shape[2], -1)
        near = None if self.local is None else self.local(queries, real, of_keys).unsqueeze(1)
        if near is not None:
            seen = seen & (near > 0)
        place = real.cumsum(1).sub(1).clamp(min=0)
        asked = torch.arange(q.shape[2], device=keys.device).expand(len(keys), -1)
        weights = self.distribution(self.alignment(q, k, seen, (place if of_keys else asked, place)), seen)
        if near is not None:
            weights = weights * near
        context = (weights @ v).transpose(1, 2).flatten(2)
        if self.projections is not None:
            context = self.projections["out"](context) * real.any(1)[:, None, None]
        return Attended(context, weights)

    def _split(self, name: str, x: Tensor) -> Float[Tensor, "batch heads tokens width"]:
        if self.projections is None:
            return x.unsqueeze(1)
        return self.projections[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CoAttended(NamedTuple):
    """Of two sequences that weigh each other; rows of weights sum to 1.

    Attributes:
        x, y: one vector each where attention is coarse, else one for each token of the other.
        x_weights, y_weights: of the tokens of x and y.
    """

    x: Float[Tensor, "batch of_x dim"]
    y: Float[Tensor, "batch of_y other_dim"]
    x_weights: Float[Tensor, "batch of_x x_tokens"]
    y_weights: Float[Tensor, "batch of_y y_tokens"]


class CoAttention(nn.Module):
    """Two sequences weigh each other by `C = tanh(X W Y^T)`.

    Args:
        dim, other_dim: of x and y.
        coarse: one weight per token, by the `"max"` or the `"mean"` over the other's tokens; None: fine, a softmax per pair, so
            that each token of one is given a sum of the other's.

    Source: Lu, Yang, Batra and Parikh (2016), arXiv 1606.00061.
    """

    def __init__(self, dim: int, other_dim: int | None = None, coarse: Coarse | None = "max") -> None:
        super().__init__()
        if coarse is not None:
            require_one_of(get_args(Coarse), coarse=coarse)
        self.coarse = coarse
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim if other_dim is None else other_dim)))

    def forward(
        self,
        x: Float[Tensor, "batch x_tokens dim"],
        y: Float[Tensor, "batch y_tokens other_dim"],
        x_mask: Bool[Tensor, "batch x_tokens"] | None = None,
        y_mask: Bool[Tensor, "batch y_tokens"] | None = None,
    ) -> CoAttended:
        """Weigh both; True in a mask = a real token."""
        x_real, y_real = (
            torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if m is None else m
            for t, m in ((x, x_mask), (y, y_mask))
        )
        x, y = cleared(x, x_mask), cleared(y, y_mask)
        affinity = torch.tanh(x @ self.weight @ y.mT)
        if self.coarse is None:
            of_y = softmax(affinity, y_real.unsqueeze(1))
            of_x = softmax(affinity.mT, x_real.unsqueeze(1))
        else:
            of_x = softmax(self._over(affinity, y_real), x_real).unsqueeze(1)
            of_y = softmax(self._over(affinity.mT, x_real), y_real).unsqueeze(1)
        return CoAttended(of_x @ x, of_y @ y, of_x, of_y)

    def _over(
        self, affinity: Float[Tensor, "batch tokens others"], real: Bool[Tensor, "batch others"]
    ) -> Float[Tensor, "batch tokens"]:
        if self.coarse == "max":
            return affinity.masked_fill(~real.unsqueeze(1), -1.0).amax(-1)
        return (affinity * real.unsqueeze(1)).sum(-1) / real.sum(-1, keepdim=True).clamp(min=1)


class MultiDimensionalAttention(nn.Module):
    """A score for every channel: `r = sum_i a_i * h_i`, `a = softmax over positions of W_2 act(W_1 h_i + b_1) + b_2`.

    Args:
        dim: of the tokens.
        hidden: width in between.
        tied: one score for all channels, which is ordinary attention.

    Source: Shen et al. (2018), arXiv 1709.04696.
    """

    def __init__(self, dim: int, hidden: int = 32, tied: bool = False) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, 1 if tied else dim))

    def forward(
        self, h: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens dim"]]:
        """The sum, and the weights of every channel."""
        h = cleared(h, mask)
        seen = None if mask is None else mask.unsqueeze(1)
        weights = softmax(self.scores(h).mT, seen).mT.expand_as(h)
        return (weights * h).sum(1), weights


class MultiRepresentationalAttention(nn.Module):
    """Several embeddings of the same token, weighed by a softmax over them and summed.

    Args:
        dims: of the embeddings.
        dim: to which all are mapped.

    Source: Kiela, Wang and Cho (2018), arXiv 1804.07983.
    """

    def __init__(self, dims: Sequence[int], dim: int) -> None:
        super().__init__()
        require_at_least(1, dims=len(dims))
        self.maps = nn.ModuleList(nn.Linear(d, dim) for d in dims)
        self.score = nn.Linear(dim, 1)

    def forward(
        self, sources: Sequence[Float[Tensor, "batch tokens _dim"]]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens sources"]]:
        """The sum, and the weights of the sources of each token."""
        if len(sources) != len(self.maps):
            raise InputError(f"sources: expected {len(self.maps)} embeddings of each token, got {len(sources)}")
        mapped = torch.stack([m(x) for m, x in zip(self.maps, sources, strict=True)], -2)
        weights = self.score(mapped).squeeze(-1).softmax(-1)
        return (weights.unsqueeze(-1) * mapped).sum(-2), weights
