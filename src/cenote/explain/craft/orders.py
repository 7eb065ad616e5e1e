"""Other ways to rank concepts, all `[concepts]`, the largest first to matter.

Gradients are those of a class's score at the reconstruction `U W`, along the concepts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.explain.craft.craft import Concepts, Given

Images = Float[Tensor, "images ..."]
Ranking = Float[Tensor, "concepts"]


def mean_coefficients(concepts: Concepts, images: Images, given: Given = "images") -> Ranking:
    """How much of each concept is in the images: an order that does not ask the model's second half."""
    u = concepts.transform(images, given)
    return u.flatten(0, -2).mean(0)


def gradients(concepts: Concepts, images: Images, target: int, given: Given = "images") -> Ranking:
    """The mean over images of `|d y / d U_i|`, summed over places."""
    return _directional(concepts, images, target, given).abs().mean(0)


def tcav(concepts: Concepts, images: Images, target: int, given: Given = "images") -> Ranking:
    """The share of images whose score rises along a concept (Kim et al. 2018)."""
    return (_directional(concepts, images, target, given) > 0).to(concepts.w).mean(0)


def at_random(concepts: Concepts, seed: int) -> Ranking:
    """Uniform numbers: a control."""
    return torch.rand(concepts.count, generator=torch.Generator().manual_seed(seed))


def _directional(concepts: Concepts, images: Images, target: int, given: Given) -> Float[Tensor, "images concepts"]:
    if concepts.h is None:
        raise InputError("h: these concepts have no second half of the model; load them with g and h")
    u = concepts.transform(images, given).requires_grad_()
    with torch.enable_grad():
        scores = concepts.h((u @ concepts.w).movedim(-1, 1))[:, target]
        (gradient,) = torch.autograd.grad(scores.sum(), u)
    return gradient.flatten(1, -2).sum(1) if gradient.dim() > 2 else gradient
