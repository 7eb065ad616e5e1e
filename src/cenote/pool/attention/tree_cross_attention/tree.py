"""A balanced tree over the tokens of each set: which token stands in which leaf, and what every node holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.errors import InputError


class Tree(NamedTuple):
    """The nodes of a batch of trees, level by level; the children of node `i` are `i * c ... i * c + c - 1`.

    Attributes:
        nodes: of level 0 (the root) to the last (the leaves), `[batch, nodes of the level, dim]`.
        real: which of them stand for at least one token.
        tokens: `[batch, leaves]`, the token in each leaf, -1 in an empty one.
        depth: `[batch]`, number of choices between the root of a set's own tree and its leaves.

    A set with fewer tokens than others of its batch has a shallower tree. It hangs below a chain of nodes with a single
    real child each, where there is nothing to choose, so that its results do not depend on its batch mates.
    """

    nodes: tuple[Float[Tensor, "batch _ dim"], ...]
    real: tuple[Bool[Tensor, "batch _"], ...]
    tokens: Int[Tensor, "batch leaves"]
    depth: Int[Tensor, "batch"]

    @property
    def levels(self) -> int:
        """Number of choices on the way from the root to a group of leaves."""
        return len(self.nodes) - 2


def tree_shape(tokens: int, branch_factor: int) -> tuple[int, int]:
    """`(k, P)`: the largest `k` with `b^k <= tokens - 1`, and `P = ceil(tokens / b^k)` leaves in each of `b^k` groups.

    >>> tree_shape(256, 2), tree_shape(11, 3), tree_shape(3, 4)
    ((7, 2), (2, 2), (0, 3))
    """
    if branch_factor < 2:
        raise InputError(f"branch_factor: expected at least 2, got {branch_factor}")
    k = 0
    while branch_factor ** (k + 1) <= tokens - 1:
        k += 1
    return k, max(1, -(-tokens // branch_factor**k))


def leaf_tokens(
    tokens: int, branch_factor: int, order: Int[Tensor, "batch tokens"], lengths: Int[Tensor, "batch"] | None
) -> tuple[Int[Tensor, "batch leaves"], Int[Tensor, "batch"]]:
    """The token in each leaf (-1: none) and the depth of each set's own tree.

    Args:
        tokens: number of token slots.
        branch_factor: children of an inner node.
        order: the tokens of each set in the order of its leaves, padded slots last.
        lengths: number of real tokens; `None`: all.
    """
    k, group = tree_shape(tokens, branch_factor)
    if lengths is None:
        lengths = torch.full((len(order),), tokens, device=order.device)
    else:
        group = branch_factor
    powers = torch.tensor([branch_factor**i for i in range(1, k + 1)], device=order.device, dtype=torch.long)
    depth = (powers <= lengths.unsqueeze(1) - 1).sum(1)
    groups = torch.ones_like(depth)
    for i in range(1, k + 1):
        groups = torch.where(depth == i, branch_factor**i, groups)
    own = (lengths + groups - 1) // groups
    leaf = torch.arange(branch_factor**k * group, device=order.device)
    place, inside = leaf // group * own.unsqueeze(1) + leaf % group, leaf % group < own.unsqueeze(1)
    filled = inside & (place < lengths.unsqueeze(1))
    if tokens == 0:
        return torch.full_like(place, -1), depth
    token = order.gather(1, place.clamp(max=tokens - 1))
    return token.masked_fill(~filled, -1), depth
