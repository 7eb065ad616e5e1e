"""What a map of a pair is worth, and how it is shown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.explain.deep_similarity.maps import Terms

Scaling = Literal["min-max", "symmetric"]
WARM, COLD = (0.85, 0.15, 0.1), (0.1, 0.3, 0.85)


def mass_in(scores: Float[Tensor, "items places"], region: Bool[Tensor, "places"]) -> Float[Tensor, "items"]:
    """The share of a map's positive mass that lies in a region; 0 where nothing is positive.

    >>> mass_in(torch.tensor([[3.0, -5.0, 1.0]]), torch.tensor([True, True, False])).tolist()
    [0.75]
    """
    positive = scores.clamp(min=0)
    total = positive.sum(1)
    return positive[:, region].sum(1) / total.masked_fill(total == 0, 1.0)


def removal_curve(a: Terms, b: Terms, scores: Float[Tensor, "pairs places"]) -> Float[Tensor, "pairs steps"]:
    """The cosine of each pair as places of the first item go, those with the largest scores first; the last is never removed.

    Terms are summed over what is left, as pooling by the average would, whose divisor no cosine sees.

    Args:
        a, b: the items.
        scores: an order of the places of `a`; padding goes last and changes nothing.
    """
    order = scores.masked_fill(~a.mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    ordered = a.values.gather(1, order.unsqueeze(-1).expand_as(a.values))
    left = ordered.flip(1).cumsum(1).flip(1)
    return torch.nn.functional.cosine_similarity(left, b.embedding.unsqueeze(1), dim=-1)


def precision_at(order: Int[Tensor, "found"] | Sequence[int], relevant: Bool[Tensor, "items"], k: int = 5) -> float:
    """The share of the first k found that are relevant.

    >>> precision_at([2, 0, 1], torch.tensor([True, False, True]), 2)
    1.0
    """
    chosen = torch.as_tensor(order)[:k]
    if not len(chosen):
        raise InputError("order: nothing was found")
    return float(relevant[chosen].float().mean())


def overlaid(
    image: Float[Tensor, "3 height width"],
    scores: Float[Tensor, "h w"],
    scaling: Scaling = "symmetric",
    strength: float = 0.6,
) -> Float[Tensor, "3 height width"]:
    """A map over its image, made as large: warm where it speaks for the pair, cold where against it.

    Args:
        image: from 0 to 1.
        scores: of its places.
        scaling: `"symmetric"`: by the largest absolute score, signs kept; `"min-max"`: from the smallest to the largest.
        strength: of the colour where the score is largest.
    """
    require_one_of(get_args(Scaling), scaling=scaling)
    large = F.interpolate(scores[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    share = strength * _scaled(large, scaling)
    colours = torch.tensor([WARM, COLD]).to(image)[:, :, None, None]
    colour = torch.where(share >= 0, colours[0], colours[1])
    return (1 - share.abs()) * image + share.abs() * colour


def side_by_side(
    images: Sequence[Float[Tensor, "3 _ _"]], maps: Sequence[Float[Tensor, "_ _"]], scaling: Scaling = "symmetric"
) -> Float[Tensor, "3 height width"]:
    """Both images of a pair with their maps, the second made as high as the first."""
    first, second = (overlaid(image, scores, scaling) for image, scores in zip(images, maps, strict=True))
    width = round(second.shape[2] * first.shape[1] / second.shape[1])
    size = (int(first.shape[1]), max(1, width))
    large = F.interpolate(second[None], size, mode="bilinear", align_corners=False)[0]
    return torch.cat([first, large], 2)


def shaded(words: Sequence[str], scores: Float[Tensor, "words"]) -> str:
    """Words of one item of a pair as HTML, shaded by their scores.

    >>> shaded(["a", "<b>"], torch.tensor([1.0, -0.5]))
    '<span style="background:rgba(217,38,26,0.60)">a</span> <span style="background:rgba(26,76,217,0.30)">&lt;b&gt;</span>'
    """
    if len(words) != len(scores):
        raise InputError(f"words: expected {len(scores)} as the scores, got {len(words)}")
    shares = (0.6 * _scaled(scores, "symmetric")).tolist()
    return " ".join(
        f'<span style="background:rgba({_rgb(WARM if s >= 0 else COLD)},{abs(s):.2f})">{html.escape(word)}</span>'
        for word, s in zip(words, shares, strict=True)
    )


def _scaled(scores: Tensor, scaling: Scaling) -> Tensor:
    least, most = scores.min(), scores.max()
    if scaling == "symmetric":
        return scores / scores.abs().max().clamp(min=torch.finfo(scores.dtype).tiny)
    return (scores - least) / (most - least).clamp(min=torch.finfo(scores.dtype).tiny)


def _rgb(colour: tuple[float, float, float]) -> str:
    return ",".join(str(round(255 * c)) for c in colour)
