"""What each alignment costs, in multiplications and in parameters.

Source: Chaudhari et al. (2021), arXiv 1904.02874.
"""

from __future__ import annotations

from typing import NamedTuple

from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.attention_survey.alignments import ALIGNMENTS


class AlignmentCost(NamedTuple):
    """Of scores of some queries and keys.

    Attributes:
        products: multiply-adds of matrix products; activations and norms are not counted.
        parameters: learned numbers.
        order: how a score grows, in words.
    """

    products: int
    parameters: int
    order: str


def alignment_cost(
    name: str,
    width: int,
    queries: int = 1,
    keys: int = 1,
    hidden: int = 32,
    layers: int = 3,
    most: int = 64,
    linear: bool = False,
) -> AlignmentCost:
    """Of an alignment of queries and keys of one width.

    Args:
        name: one of `cenote.mix.attention_survey.alignments.ALIGNMENTS`.
        width: d.
        queries, keys: how many.
        hidden, layers, most: h, and of deep and location-based alignments.
        linear: of `"kernel"`: what `KernelAlignment.attend` takes, sum of values included, for values of the same width.

    >>> alignment_cost("dot", 64, 10, 100).products, alignment_cost("additive", 64, 10, 100).products
    (64000, 257280)
    """
    require_one_of(ALIGNMENTS, name=name)
    require_at_least(1, width=width, queries=queries, keys=keys)
    pairs, d, h = queries * keys, width, hidden
    mapped = (queries + keys) * d * h
    if name in ("similarity", "dot", "scaled dot"):
        return AlignmentCost(pairs * d, 0, "O(d)")
    if name == "kernel":
        if linear:
            return AlignmentCost(
                keys * d * d + queries * d * d + queries * d, 0, "O(d^2) per token, linear in their number"
            )
        return AlignmentCost(pairs * d, 0, "O(d)")
    if name in ("general", "biased general", "activated general"):
        extra = {"general": 0, "biased general": d, "activated general": 1}[name]
        return AlignmentCost(queries * d * d + pairs * d, d * d + extra, "O(d^2) per query, O(d) per key")
    if name in ("additive", "concat"):
        return AlignmentCost(mapped + pairs * h, 2 * d * h + 2 * h, "O(d h) per token, O(h) per pair")
    if name == "deep":
        inner = layers - 2
        return AlignmentCost(
            mapped + pairs * (inner * h * h + h),
            2 * d * h + 2 * h + inner * (h * h + h) + 1,
            "O(d h) per token, O(h^2) per pair",
        )
    if name == "location-based":
        return AlignmentCost(pairs * d, most * d, "O(d)")
    return AlignmentCost(2 * keys * d * h + keys * h, 2 * d * h + 2 * h, "O(d h) per key, whatever the queries")


def cost_table(width: int = 64, queries: int = 1, keys: int = 128, hidden: int = 32) -> str:
    """Of all alignments, tabs between columns."""
    lines = ["alignment\tmultiply-adds\tparameters\torder"]
    for name in ALIGNMENTS:
        cost = alignment_cost(name, width, queries, keys, hidden)
        lines.append(f"{name}\t{cost.products}\t{cost.parameters}\t{cost.order}")
    return "\n".join(lines)
