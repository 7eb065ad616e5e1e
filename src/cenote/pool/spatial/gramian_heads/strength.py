"""How strong the heads of an ensemble are, how alike, and what follows of their vote: as random forests are judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from cenote.core.errors import InputError


class Strength(NamedTuple):
    """Of an ensemble's heads on some items.

    Attributes:
        strength: mean margin `s`: the share of the heads that vote right minus the largest share of a wrong class.
        correlation: mean correlation `r` of the heads' raw margins; NaN for a single head.
        bound: `r (1 - s^2) / s^2`, above which the error of the vote cannot lie; infinite where `s` is not positive.
        residual_correlation: mean over pairs of heads of the correlation of softmax minus truth; NaN for a single head.
        gain: accuracy of the mean of the logits minus the mean accuracy of the heads.
    """

    strength: float
    correlation: float
    bound: float
    residual_correlation: float
    gain: float


@torch.no_grad()
def strength_and_correlation(logits: Float[Tensor, "items heads classes"], y: Int[Tensor, "items"]) -> Strength:
    """Strength and correlation of the heads.

    With the vote `v_j`, the share of heads that say `j`, and `w` the wrong class of most votes: margin `m = v_y - v_w`,
    `s = E m`; of a head the raw margin `I(h = y) - I(h = w)`, with deviation `sd_h`; `r = var(m) / (mean_h sd_h)^2`.

    Args:
        logits: of each head, as `GramianHeads.logits` gives them.
        y: the true classes.

    Raises:
        InputError: where there is no item, or one class alone.

    Example:
        >>> agreed = torch.eye(3)[[0, 1, 2]].unsqueeze(1).expand(-1, 4, -1)
        >>> strength_and_correlation(agreed, torch.tensor([0, 1, 0])).strength
        0.3333333333333333

    Source: Breiman, "Random Forests", Machine Learning 2001; as in Ryu, Han, Lim, "Gramian Attention Heads are Strong yet
    Efficient Vision Learners", ICCV 2023.
    """
    items, heads, classes = logits.shape
    if items == 0 or heads == 0 or classes < 2:
        raise InputError(f"logits: expected items, heads and two classes at least, got shape {tuple(logits.shape)}")
    said = one_hot(logits.argmax(-1), classes).double()
    true = one_hot(y, classes).double()
    votes = said.mean(1)
    wrong = one_hot(votes.masked_fill(true.bool(), -1).argmax(-1), classes).double()
    raw = (said * (true - wrong).unsqueeze(1)).sum(-1)
    margin = raw.mean(1)
    s = float(margin.mean())
    spread = float(raw.std(0, correction=0).mean())
    correlation = float(margin.var(correction=0)) / spread**2 if heads > 1 and spread > 0 else float("nan")
    residual = (logits.double().softmax(-1) - true.unsqueeze(1)).transpose(0, 1).flatten(1)
    right = (said * true.unsqueeze(1)).sum(-1)
    together = (logits.mean(1).argmax(-1) == y).double().mean()
    return Strength(
        s,
        correlation,
        correlation * (1 - s**2) / s**2 if s > 0 else float("inf"),
        _between_pairs(residual),
        float(together - right.mean()),
    )


def _between_pairs(rows: Float[Tensor, "heads numbers"]) -> float:
    if len(rows) < 2:
        return float("nan")
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    return float(torch.corrcoef(rows)[i, j].mean())
