from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from cenote.core.errors import InputError

DEPTHS = (1, 5, 10)


class Retrieved(NamedTuple):
    """How well queries find their own item.

    Attributes:
        recall: share of the queries whose item is among the first 1, 5 and 10.
        median_rank, mean_rank: of the own item, from 1.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float


class BothWays(NamedTuple):
    """Retrieval in both directions.

    Attributes:
        text_to_video, video_to_text: of each direction.
    """

    text_to_video: Retrieved
    video_to_text: Retrieved


def retrieved(similarity: Float[Tensor, "pairs pairs"]) -> BothWays:
    """Recall and ranks where text `i` belongs to video `i`; of equal similarities half count as better.

    Raises:
        InputError: where there are not as many texts as videos, or none.

    Example:
        >>> found = retrieved(torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.1, 0.2], [0.0, 0.1, 0.5]]))
        >>> round(found.text_to_video.recall[1], 3), found.text_to_video.mean_rank
        (0.667, 1.6666666666666667)

    Source: the measures of Jin et al., "Text-Video Retrieval with Disentangled Conceptualization and Set-to-Set Alignment",
    IJCAI 2023.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or not len(similarity):
        raise InputError(
            f"similarity: expected [pairs, pairs], text i with video i, at least one, got shape {tuple(similarity.shape)}"
        )
    return BothWays(_one_way(similarity), _one_way(similarity.T))


def multiply_adds_per_pair(dim: int, blocks: int, frames: int) -> int:
    """Multiply-adds of one text with one video in `DiCoSA`, the text's part of the factors left out, for it serves all videos.

    Weights and sum of the frames `2 V D`, cosines `2 D`, factors `K (4 d^2 + 4 d)` with blocks of width `d = D / K`.

    Example:
        >>> multiply_adds_per_pair(512, blocks=8, frames=12)
        146432
    """
    width = dim // blocks
    return 2 * frames * dim + 2 * dim + blocks * (4 * width**2 + 4 * width)


def _one_way(similarity: Float[Tensor, "queries items"]) -> Retrieved:
    own = similarity.diagonal().unsqueeze(1)
    above, equal = (similarity > own).sum(1), (similarity == own).sum(1) - 1
    ranks = 1 + above.double() + equal.double() / 2
    recall = {k: float((ranks <= k).double().mean()) for k in DEPTHS}
    return Retrieved(recall, float(ranks.quantile(0.5)), float(ranks.mean()))
