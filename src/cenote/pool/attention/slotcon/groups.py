"""What a trained grouping has found: how much of an image each group is, and what else a prototype stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.pool.attention.slotcon.grouping import Grouped


class Nearest(NamedTuple):
    """Images whose slot of a prototype is nearest to it: their numbers, and the cosines, best first."""

    images: Int[Tensor, "count"]
    cosines: Float[Tensor, "count"]


def shares_of_image(dots: Float[Tensor, "batch slots height width"]) -> Float[Tensor, "batch slots"]:
    """Share of the places of each image whose best prototype each one is.

    >>> shares_of_image(torch.tensor([[0.1, 0.9, 0.8, 0.7], [0.5, 0.2, 0.1, 0.1]]).view(1, 2, 2, 2)).tolist()
    [[0.75, 0.25]]
    """
    best = F.one_hot(dots.flatten(2).argmax(1), dots.shape[1])
    return best.to(dots.dtype).mean(1)


def nearest_slots(
    prototypes: Float[Tensor, "slots dim"], grouped: Grouped, prototype: int, count: int = 5, least: float = 0.0
) -> Nearest:
    """The images that show best what a prototype stands for, among those of which it is the best of some place.

    Args:
        prototypes: `SemanticGrouping.slot_embed`.
        grouped: slots and cosines of the images of a data set, as `SlotCon.teach` gives them.
        prototype: its number.
        count: of images at most.
        least: share of an image that the group must have.

    Raises:
        InputError: where there is no such prototype.

    Source: Wen et al., "Self-Supervised Visual Representation Learning with Semantic Grouping", NeurIPS 2022.
    """
    if not 0 <= prototype < len(prototypes):
        raise InputError(f"prototype: expected a number from 0 to {len(prototypes) - 1}, got {prototype}")
    share = shares_of_image(grouped.dots)[:, prototype]
    shown = ((share > 0) & (share >= least)).nonzero().squeeze(1)
    cosines = F.cosine_similarity(grouped.slots[shown, prototype], prototypes[prototype].unsqueeze(0), dim=-1)
    order = cosines.argsort(descending=True)[:count]
    return Nearest(shown[order], cosines[order])
