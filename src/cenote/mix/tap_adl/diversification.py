"""The attention diversification loss: no row of attention may be what all rows are on average.

Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype

EPS = 1e-6


def attention_diversification(
    attentions: Sequence[Float[Tensor, "batch heads tokens tokens"]],
    threshold: float = 2.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The mean cosine of a row of attention with the mean row, of strong entries only, over layers.

    With `A` the mean over heads, `s` the mean of its rows and `tau = threshold / N`:

        ADL_l = mean_q cos(s [s > tau], A_q [A_q > tau]),   ADL = sum_l ADL_l / (L + 1e-6)

    Args:
        attentions: weights of each layer, rows are queries; behind dropout where there is any.
        threshold: how many times the uniform weight an entry has to be above to count.
        mask: True = a real token; rows and keys of others take no part, and `N` counts the real ones. None for all.

    Returns:
        From 0 to 1; 0 for uniform attention, 1 where every row looks at the same single token.

    Raises:
        InputError: for no layer, or shapes that do not fit.

    Example:
        >>> attention_diversification([torch.full((1, 2, 4, 4), 0.25)])
        tensor(0.)

    Source:
        Guo et al. 2023, arXiv 2303.11126, section 4.2, as the authors' code computes it: each row against the mean row, where
        the abstract speaks of pairs of rows.

    Note:
        That masked queries leave both means is inferred.
    """
    if not attentions:
        raise InputError("attentions: expected at least one layer")
    require_at_least(0, threshold=threshold)
    for i, a in enumerate(attentions):
        if a.dim() != 4 or a.shape[2] != a.shape[3]:
            raise InputError(f"attentions[{i}]: expected [batch, heads, tokens, tokens], got {list(a.shape)}")
        if mask is not None and mask.shape != (a.shape[0], a.shape[2]):
            raise InputError(f"mask: expected {[a.shape[0], a.shape[2]]} as the attention, got {list(mask.shape)}")
    losses = [_of_layer(a.mean(1), threshold, mask).to(a.dtype) for a in attentions]
    return torch.stack(losses).sum() / (len(losses) + EPS)


def _of_layer(rows: Tensor, threshold: float, mask: Tensor | None) -> Tensor:
    batch, n = rows.shape[:2]
    if mask is None:
        mask = torch.ones(batch, n, dtype=torch.bool, device=rows.device)
    rows = rows.masked_fill(~mask.unsqueeze(1) | ~mask.unsqueeze(2), 0.0).to(accumulation_dtype(rows.dtype))
    count = mask.sum(1).clamp(min=1)
    mean = rows.sum(1, keepdim=True) / count[:, None, None]
    tau = (threshold / count)[:, None, None]
    cosine = F.cosine_similarity(mean * (mean > tau), rows * (rows > tau), dim=-1)
    return (cosine.masked_fill(~mask, 0.0).sum(1) / count).sum() / (mask.any(1).sum().clamp(min=1))
