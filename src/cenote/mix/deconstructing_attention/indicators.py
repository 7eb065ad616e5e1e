"""What attention maps are like: eight numbers of a layer.

Source: Xue, Moosavi, Aletras, "Deconstructing Attention", 2025, section 4.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least

DISTANCES = 4


class Indicators(NamedTuple):
    """Of the maps of one layer.

    Attributes:
        entropy: `- sum_ij a_ij log a_ij` of each head.
        concentration: the Frobenius norm of each head's map.
        head_diversity: how far heads differ: the mean, over pairs that may be read, of the deviation over heads.
        sink: the mean weight on the first token, by head.
        local_focus: the mean weight on the token 0, 1, ... before, by head; 0 where the text is that short.
    """

    entropy: Float[Tensor, "*batch heads"]
    concentration: Float[Tensor, "*batch heads"]
    head_diversity: Float[Tensor, "*batch"]
    sink: Float[Tensor, "*batch heads"]
    local_focus: Float[Tensor, "*batch heads distances"]

    def means(self) -> dict[str, float]:
        """One number each: means over batch and heads, by name; local focus by distance."""
        found = {n: float(getattr(self, n).mean()) for n in ("entropy", "concentration", "head_diversity", "sink")}
        focus = self.local_focus.flatten(0, -2).mean(0).tolist()
        return {**found, **{f"local_focus_{i}": value for i, value in enumerate(focus)}}


def indicators(
    maps: Float[Tensor, "*batch heads tokens tokens"], distances: int = DISTANCES, *, population: bool = True
) -> Indicators:
    """Statistics of causal attention maps, of any model.

    Args:
        maps: rows are queries and sum to 1; zeros above the diagonal.
        distances: number of sub-diagonals of the local focus, with the diagonal.
        population: whether the deviation over heads is that of a population, or of a sample.

    Raises:
        InputError: where maps are no squares, or empty, or one head is to be a sample.

    Example:
        >>> uniform = torch.ones(1, 3, 3).tril() / torch.tensor([1.0, 2.0, 3.0])[:, None]
        >>> round(float(indicators(uniform).sink), 4)
        0.6111

    Source:
        Xue et al. 2025, arXiv 2510.11602, section 4.4.

    Note:
        That the deviation over heads is that of a population is inferred.
    """
    if maps.dim() < 3 or maps.shape[-1] != maps.shape[-2] or not maps.shape[-1]:
        raise InputError(f"maps: expected [..., heads, tokens, tokens], got {list(maps.shape)}")
    require_at_least(1, distances=distances)
    if not population and maps.shape[-3] < 2:
        raise InputError("population: expected True where there is one head; one makes no sample")
    n = maps.shape[-1]
    lower = maps.tril()
    focus = [
        maps.diagonal(-i, -2, -1).mean(-1) if i < n else torch.zeros_like(maps[..., 0, 0]) for i in range(distances)
    ]
    return Indicators(
        entropy=torch.special.entr(maps).sum((-1, -2)),
        concentration=maps.square().sum((-1, -2)).sqrt(),
        head_diversity=lower.std(-3, correction=0 if population else 1).sum((-1, -2)) * 2 / (n * (n + 1)),
        sink=maps[..., 0].mean(-1),
        local_focus=torch.stack(focus, -1),
    )


def scaled_for_plots(values: Float[Tensor, "*compared"]) -> Float[Tensor, "*compared"]:
    """From 0 for the smallest of what is compared to 1 for the largest; zeros where all are equal.

    >>> scaled_for_plots(torch.tensor([3.0, 1.0, 2.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    low, high = values.amin(), values.amax()
    return (values - low) / torch.where(high > low, high - low, torch.ones_like(high))
