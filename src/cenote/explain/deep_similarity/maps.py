"""Pooled features as sums over places, and what follows from it.

An embedding that pools places is a sum of one term per place, `e = sum_i e_i`; so
`cos(a, b) = sum_i <a_i, b> / (|a| |b|)`. All kinds of pooling here differ in their terms alone.

Source: Stylianou, Souvenir and Pless, "Visualizing Deep Similarity Networks" (2019), arXiv 1901.00536.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.explain.pairs import Grid, PairMap

Pooling = Literal["average", "max", "flatten"]
Normalising = Literal["whole", "region"]


@dataclass(frozen=True, eq=False)
class Terms:
    """What each place adds to the embedding of its item.

    Attributes:
        values: zeros where a place is padding.
        mask: True = a real place.
        grid: rows and columns, where places lie on a grid.
        units: what places are, see `Attribution`.
    """

    values: Float[Tensor, "items places dim"]
    mask: Bool[Tensor, "items places"]
    grid: Grid | None = None
    units: str = "tokens"

    @property
    def embedding(self) -> Float[Tensor, "items dim"]:
        """Their sum."""
        return self.values.sum(1)

    def item(self, number: int) -> Terms:
        """One item."""
        return Terms(self.values[number : number + 1], self.mask[number : number + 1], self.grid, self.units)


def terms(
    x: Float[Tensor, "items places channels"],
    mask: Bool[Tensor, "items places"] | None = None,
    pooling: Pooling = "average",
    head: nn.Module | None = None,
    grid: Grid | None = None,
    units: str = "tokens",
) -> Terms:
    """The terms of features under a pooling, and a linear layer behind it.

    `"average"`: `x_i / Z`; `"max"`: a channel keeps its value only where it is largest, split equally among ties;
    `"flatten"`: each place has columns of its own in the head, `W_i x_i`. Behind the pooling `W e_i + b / Z`.

    Args:
        x: features of places.
        mask: True = a real place.
        pooling: see above.
        head: a `torch.nn.Linear` behind the pooling; `"flatten"` needs one.
        grid: rows and columns of the places.
        units: what places are.

    Raises:
        InputError: for a head that is not linear or of another width, and for items without a place.

    >>> terms(torch.tensor([[[1.0, 4.0], [3.0, 4.0]]]), pooling="max").values.tolist()
    [[[0.0, 2.0], [3.0, 2.0]]]
    """
    require_one_of(get_args(Pooling), pooling=pooling)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    count = real.sum(1)
    if not bool(count.all()):
        raise InputError("mask: an item has no place")
    if head is not None and not isinstance(head, nn.Linear):
        raise InputError(
            f"head: expected a torch.nn.Linear, got {type(head).__name__}; what is not linear has no terms"
        )
    inside = real.unsqueeze(-1)
    x = x.masked_fill(~inside, 0.0)
    if pooling == "flatten":
        values = _own_columns(x, head)
    elif pooling == "average":
        values = x / count.view(-1, 1, 1).to(x)
    else:
        largest = x.masked_fill(~inside, -torch.inf).amax(1, keepdim=True)
        attains = (x == largest) & inside
        values = x * attains / attains.sum(1, keepdim=True).to(x)
    if head is not None:
        values = values if pooling == "flatten" else _through(values, head)
        if head.bias is not None:
            values = values + head.bias / count.view(-1, 1, 1).to(x)
        values = values.masked_fill(~inside, 0.0)
    return Terms(values, real, grid, units)


def _through(values: Tensor, head: nn.Linear) -> Tensor:
    if head.in_features != values.shape[-1]:
        raise InputError(f"head: takes {head.in_features} channels, and the features have {values.shape[-1]}")
    return values @ head.weight.T


def _own_columns(x: Tensor, head: nn.Linear | None) -> Tensor:
    places, channels = x.shape[1:]
    if head is None or head.in_features != places * channels:
        needs = "none" if head is None else str(head.in_features)
        raise InputError(f"head: 'flatten' needs one of {places} x {channels} inputs, places first, got {needs}")
    return torch.einsum("npc,opc->npo", x, head.weight.view(-1, places, channels))


def pair_map(a: Terms, b: Terms) -> PairMap:
    """The map of each pair: `<a_i, b> / (|a| |b|)` and `<b_j, a> / (|a| |b|)`, never the matrix between them.

    Args:
        a: terms of one side, which sum to its embeddings.
        b: of the other. Pairs are items of the same number; one item of either side goes with all of the other.
    """
    ea, eb = a.embedding, b.embedding
    scale = _inverse(ea.norm(dim=1) * eb.norm(dim=1))
    found_a, found_b = (a.values * eb.unsqueeze(1)).sum(-1), (b.values * ea.unsqueeze(1)).sum(-1)
    pairs = len(scale)
    return PairMap(
        found_a * scale[:, None],
        found_b * scale[:, None],
        a.mask.expand(pairs, -1),
        b.mask.expand(pairs, -1),
        (ea * eb).sum(1) * scale,
        a.units,
        a.grid,
        b.grid,
    )


def pair_matrix(a: Terms, b: Terms) -> Float[Tensor, "pairs places_a places_b"]:
    """What each pair of places adds to the cosine: `<a_i, b_j> / (|a| |b|)`; its rows and columns sum to the map."""
    scale = _inverse(a.embedding.norm(dim=1) * b.embedding.norm(dim=1))
    return a.values @ b.values.mT * scale.view(-1, 1, 1)


def channel_parts(a: Terms, b: Terms) -> Float[Tensor, "pairs dim"]:
    """What each channel of the embeddings adds to the cosine."""
    ea, eb = a.embedding, b.embedding
    return ea * eb * _inverse(ea.norm(dim=1) * eb.norm(dim=1))[:, None]


def channel_map(a: Terms, b: Terms, channel: int) -> Float[Tensor, "pairs places_a"]:
    """The map of the first items by one channel; over the channels they sum to the whole map."""
    ea, eb = a.embedding, b.embedding
    return a.values[..., channel] * (eb[:, channel] * _inverse(ea.norm(dim=1) * eb.norm(dim=1)))[:, None]


def norm_map(a: Terms) -> Float[Tensor, "items places"]:
    """The norm of each term, scaled to sum to one: what stands out in an item by itself, as a control."""
    norms = a.values.norm(dim=-1)
    return norms * _inverse(norms.sum(1))[:, None]


def grad_cam(
    x: Float[Tensor, "items places channels"], b: Terms, pooling: Pooling = "average"
) -> Float[Tensor, "items places"]:
    """Grad-CAM, without its ReLU, of the dot product with other embeddings; of averaged features, the map up to scale."""
    features = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = (terms(features, pooling=pooling).embedding * b.embedding).sum()
        (gradient,) = torch.autograd.grad(value, features)
    return (features.detach() * gradient.mean(1, keepdim=True)).sum(-1)


def region_scores(
    query: Terms,
    region: Bool[Tensor, "places"],
    gallery: Float[Tensor, "items dim"],
    normalise: Normalising = "whole",
) -> Float[Tensor, "items"]:
    """How similar a part of a query is to each embedding of a gallery; no maps of the gallery are needed.

    `<e_R, g> / (|e| |g|)`, `e_R` the sum of the region's terms: scores of disjoint regions add up to the cosine. With
    `"region"` divided by `|e_R|` instead: the cosine of the region by itself.

    Args:
        query: one item.
        region: True = a place of the region.
        gallery: embeddings.
        normalise: see above.
    """
    require_one_of(get_args(Normalising), normalise=normalise)
    if len(query.values) != 1 or region.shape != query.mask.shape[1:]:
        raise InputError(
            f"region: expected one query and a region of its {query.mask.shape[1]} places, got {len(query.values)} and "
            f"{list(region.shape)}"
        )
    part = query.values[0, region].sum(0)
    whole = query.embedding[0] if normalise == "whole" else part
    return gallery @ part * _inverse(whole.norm() * gallery.norm(dim=1))


def region_search(
    query: Terms,
    region: Bool[Tensor, "places"],
    gallery: Float[Tensor, "items dim"],
    k: int = 5,
    normalise: Normalising = "whole",
) -> Int[Tensor, "k"]:
    """The numbers of the gallery's items most similar to a part of the query, the first most.

    Args:
        query: terms of one item.
        region: True = a place that is searched for.
        gallery: embeddings.
        k: how many, at most.
        normalise: what the part's embedding is divided by, see `region_scores`.
    """
    scores = region_scores(query, region, gallery, normalise)
    return scores.sort(descending=True, stable=True).indices[: min(k, len(scores))]


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0: the map of an embedding of zeros is zeros."""
    return torch.where(x > 0, 1 / x.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
