"""Concept tokens that look on, scores of words against pixels, and heat maps of them.

Source: Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features" (2025), arXiv
2502.04320.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of, require_positive

Reads = Literal["both", "image", "concepts", "none"]
Order = Literal["per layer", "after mean"]


def concept_rows(
    q: Float[Tensor, "batch heads concepts width"],
    k: Float[Tensor, "batch heads concepts width"],
    v: Float[Tensor, "batch heads concepts width"],
    image_k: Float[Tensor, "batch heads pixels width"],
    image_v: Float[Tensor, "batch heads pixels width"],
    reads: Reads = "both",
) -> Float[Tensor, "batch heads concepts width"]:
    """`o_c = softmax(q_c [k_c; k_x]^T / sqrt(d)) [v_c; v_x]`: concepts read concepts and the image, never the prompt.

    Only these rows are computed; they equal those of a joint attention in which nothing else reads the concepts.

    Args:
        q, k, v: of the concepts, normed, at position zero.
        image_k, image_v: of the image, after positions.
        reads: `"both"`, `"image"`, `"concepts"`, or `"none"`: `o_c = v_c`.
    """
    require_one_of(get_args(Reads), reads=reads)
    if q.shape[0] != image_k.shape[0]:
        raise InputError(f"q: expected concepts of {image_k.shape[0]} items as the image, got {q.shape[0]}")
    if reads == "none":
        return v
    keys = {"both": [k, image_k], "image": [image_k], "concepts": [k]}[reads]
    values = {"both": [v, image_v], "image": [image_v], "concepts": [v]}[reads]
    return F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))


def similarities(
    concepts: Float[Tensor, "batch heads concepts width"], image: Float[Tensor, "batch heads pixels width"]
) -> Float[Tensor, "batch concepts pixels"]:
    """Dot products over all heads together, without a scale: of attention outputs, or of queries, or of values."""
    return torch.einsum("bhcd,bhpd->bcp", concepts, image)


def heat_maps(
    scores: Sequence[Float[Tensor, "batch concepts pixels"]] | Float[Tensor, "layers batch concepts pixels"],
    order: Order = "per layer",
    temperature: float = 1.0,
) -> Float[Tensor, "batch concepts pixels"]:
    """A map of each concept: a softmax over the concepts at each pixel, and the mean over layers and steps.

    Args:
        scores: of each layer and step.
        order: `"per layer"`: softmax, then mean; `"after mean"`: mean, then softmax. The authors' code has both.
        temperature: of the softmax.

    >>> heat_maps(torch.zeros(3, 1, 4, 2)).unique().tolist()
    [0.25]
    """
    require_one_of(get_args(Order), order=order)
    require_positive(temperature=temperature)
    if not len(scores):
        raise InputError("scores: expected those of at least one layer, got none")
    stack = torch.stack(list(scores))
    if order == "after mean":
        return (stack.mean(0) / temperature).softmax(1)
    return (stack / temperature).softmax(2).mean(0)


def over_its_mean(maps: Float[Tensor, "*batch pixels"]) -> Bool[Tensor, "*batch pixels"]:
    """Where each map lies above its own mean over pixels: its mask."""
    return maps > maps.mean(-1, keepdim=True)


def segmented(maps: Float[Tensor, "batch concepts pixels"], background: int = 0) -> Int[Tensor, "batch pixels"]:
    """The concept with the largest map at each pixel; -1 where it is one of the background's.

    Args:
        maps: of the concepts.
        background: how many of the last concepts are background (the authors': background, floor, tree, person, grass, face).
    """
    concepts = maps.shape[1]
    if not 0 <= background < concepts:
        raise InputError(f"background: expected fewer than {concepts} concepts, got {background}")
    found = maps.argmax(1)
    return torch.where(found < concepts - background, found, -1)


def objectness(maps: Float[Tensor, "batch concepts pixels"]) -> Float[Tensor, "batch pixels"]:
    """The mean of several words' maps: where there is any of them."""
    return maps.mean(1)
