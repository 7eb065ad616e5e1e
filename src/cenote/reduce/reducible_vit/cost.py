"""Multiply-adds of a vision transformer, from the tokens that its blocks really run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.reduce.reducible_vit.model import ReducibleViT


class Cost(NamedTuple):
    """Multiply-adds of one image, by where they fall: embedding the patches, projections and products of attention, MLPs, the
    last linear layer, and the reducers."""

    patches: int
    projections: int
    products: int
    mlps: int
    head: int
    reducing: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def attention(self) -> int:
        return self.projections + self.products


def vit_cost(
    counts: Sequence[int],
    dim: int,
    *,
    tokens: int,
    hidden: int | None = None,
    patch_numbers: int = 0,
    prefix: int = 1,
    classes: int = 0,
    reducing: Mapping[int, int] | None = None,
) -> Cost:
    """Multiply-adds of a network whose blocks reduce between attention and MLP.

    A block that reads `T` tokens and writes `T'` has `4 T D^2` of projections, `2 T^2 D` of products and `2 T' D H` of its MLP.

    Args:
        counts: tokens that each block writes, [CLS] included.
        dim: `D`.
        tokens: that the first block reads.
        hidden: `H`, None for `4 D`.
        patch_numbers: numbers of one patch, such as 768 for 16 x 16 pixels of three colours; 0 to leave embedding out.
        prefix: tokens that are no patches.
        classes: of the last layer.
        reducing: multiply-adds of the reducer in a block.

    Example:
        >>> plain = vit_cost([197] * 12, 384, tokens=197, patch_numbers=768, classes=1000)
        >>> fewer = vit_cost([197] * 3 + [147] * 3 + [97] * 3 + [47] * 3, 384, tokens=197, patch_numbers=768, classes=1000)
        >>> round(plain.total / 1e9, 2), round(fewer.total / 1e9, 2)
        (4.6, 2.93)
    """
    require_at_least(1, dim=dim, tokens=tokens)
    hidden = 4 * dim if hidden is None else hidden
    read = [tokens, *counts[:-1]]
    if any(after > before for before, after in zip(read, counts, strict=True)):
        raise InputError(f"counts: tokens do not become more, got {list(counts)} of {tokens}")
    return Cost(
        patches=(tokens - prefix) * patch_numbers * dim,
        projections=sum(4 * t * dim**2 for t in read),
        products=sum(2 * t**2 * dim for t in read),
        mlps=sum(2 * t * dim * hidden for t in counts),
        head=dim * classes,
        reducing=sum((reducing or {}).values()),
    )


def cost_of(vit: ReducibleViT, counts: Sequence[int], at: Mapping[int, object] | None = None) -> Cost:
    """Multiply-adds of a network and of what reduces in it.

    Args:
        vit: the network.
        counts: of a `VisionRun`.
        at: what reduces, by block; of those that have a method `multiply_adds(tokens, left, dim)` this is counted.
    """
    tokens, dim = vit.pos_embed.shape[1:]
    read = [tokens, *counts[:-1]]
    reducing = {}
    for block, reducer in (at or {}).items():
        count = getattr(reducer, "multiply_adds", None)
        if count is not None:
            reducing[block] = count(read[block] - vit.prefix, counts[block] - vit.prefix, dim)
    return vit_cost(
        counts,
        dim,
        tokens=tokens,
        hidden=vit.hidden,
        patch_numbers=vit.numbers,
        prefix=vit.prefix,
        classes=vit.head.out_features,
        reducing=reducing,
    )
