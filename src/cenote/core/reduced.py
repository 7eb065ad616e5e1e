"""What is left of tokens after a reduction, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Reduced(NamedTuple):
    """Fewer tokens.

    `tokens` `[batch, left, dim]`; `sizes` `[batch, left]`, how many originals each stands for; `assignment`
    `[batch, tokens]`, the reduced token that an original went to, -1 where it was dropped; `mask` `[batch, left]`, True = a
    real token, None for all.
    """

    tokens: Float[Tensor, "batch left dim"]
    sizes: Float[Tensor, "batch left"]
    assignment: Int[Tensor, "batch tokens"]
    mask: Bool[Tensor, "batch left"] | None = None

    def expand(self, scores: Float[Tensor, "batch left *channels"]) -> Float[Tensor, "batch tokens *channels"]:
        """Scores or states of the reduced tokens, on the originals; zeros where these were dropped."""
        return expanded(scores, self.assignment)


def expanded(
    scores: Float[Tensor, "batch left *channels"], assignment: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens *channels"]:
    """For each original what its reduced token has; zeros for -1."""
    item = torch.arange(len(assignment), device=assignment.device)[:, None]
    found = scores[item, assignment.clamp(min=0)]
    kept = (assignment >= 0).view(*assignment.shape, *[1] * (scores.dim() - 2))
    return torch.where(kept, found, torch.zeros_like(found))
