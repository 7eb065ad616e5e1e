"""Attention rollout and attention flow, of attention matrices that are there.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), arXiv 2005.00928.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of

Heads = Literal["mean", "max", "min", "sum"]
CAPACITY = 2**30
"""Of an edge of weight 1 in whole numbers: what scipy's maximum flow counts in."""


def augmented(
    attention: Float[Tensor, "*batch tokens tokens"], residual: float = 0.5
) -> Float[Tensor, "*batch tokens tokens"]:
    """`A = (1 - r) W + r I`, rows made to sum to one; a row without attention is the residual's.

    Args:
        attention: `W`, mean over the heads; row = query.
        residual: share of the residual connection `r`, from 0 to 1.

    >>> augmented(torch.tensor([[0.5, 0.5], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    if not 0 <= residual <= 1:
        raise InputError(f"residual: expected a share from 0 to 1, got {residual}")
    a = (1 - residual) * attention + residual * torch.eye(attention.shape[-1]).to(attention)
    total = a.sum(-1, keepdim=True)
    return a / total.masked_fill(total == 0, 1.0)


def over_heads(
    attention: Sequence[Float[Tensor, "batch heads tokens tokens"]] | Float[Tensor, "layers batch heads tokens tokens"],
    heads: Heads = "mean",
) -> Float[Tensor, "batch layers tokens tokens"]:
    """Attention of all layers, heads made one; as models return it."""
    require_one_of(get_args(Heads), heads=heads)
    stack = torch.stack(list(attention), 1)
    if heads == "mean":
        return stack.mean(2)
    if heads == "sum":
        return stack.sum(2)
    return stack.amax(2) if heads == "max" else stack.amin(2)


def rollout(
    attention: Float[Tensor, "*batch layers tokens tokens"], residual: float = 0.5, start_layer: int = 0
) -> Float[Tensor, "*batch layers tokens tokens"]:
    """`R_1 = A_1, R_l = A_l R_(l-1)`: what each token of each layer's output holds of each token of the input.

    Args:
        attention: mean over the heads, from the lowest layer up.
        residual: see `augmented`; 0 takes the matrices as they are.
        start_layer: the lowest layer that counts; those below give the identity.

    Returns:
        `R` of every layer; rows sum to one where those of the attention do.

    Raises:
        InputError: for other shapes or layers.

    >>> w = torch.full((2, 3, 3), 1 / 3)
    >>> rollout(w, residual=0.0)[-1].sum(-1).tolist()
    [1.0, 1.0, 1.0]
    """
    layers = _require_stack(attention)
    if not 0 <= start_layer < layers:
        raise InputError(f"start_layer: expected 0 to {layers - 1}, got {start_layer}")
    a = augmented(attention, residual) if residual else attention
    identity = torch.eye(attention.shape[-1]).to(attention).expand_as(a[..., 0, :, :])
    found, below = [], identity
    for layer in range(layers):
        below = a[..., layer, :, :] @ below if layer >= start_layer else identity
        found.append(below)
    return torch.stack(found, -3)


def max_flow(
    attention: Float[Tensor, "layers tokens tokens"],
    residual: float = 0.5,
    *,
    queries: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "chosen queries tokens"]:
    """The largest flow from each query, through the layers, to each input token alone; rows then sum to one.

    Token i of layer l's output is joined to token j of its input by an edge of capacity `A_l[i, j]`. One layer is its row, two
    are `sum_k min(A_2[i, k], A_1[k, j])`; more are solved by scipy in whole numbers, and the cut that it finds is summed in
    the attention's own precision.

    Args:
        attention: of one input, mean over the heads, from the lowest layer up.
        residual: see `augmented`.
        queries: tokens of the upper layer; all by default.
        layers: numbers of upper layers, from 0; all by default.

    Raises:
        InputError: for other shapes, queries or layers.

    >>> w = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    >>> max_flow(w, residual=0.0).tolist()
    [[[0.5, 0.5], [0.0, 1.0]]]
    """
    count, tokens = _require_stack(attention), attention.shape[-1]
    chosen = list(range(tokens)) if queries is None else list(queries)
    tops = list(range(count)) if layers is None else list(layers)
    if attention.dim() != 3:
        raise InputError(f"attention: expected [layers, tokens, tokens] of one input, got {list(attention.shape)}")
    if any(not 0 <= q < tokens for q in chosen) or any(not 0 <= t < count for t in tops):
        raise InputError(f"queries, layers: expected below {tokens} and {count}, got {chosen} and {tops}")
    a = augmented(attention, residual) if residual else attention
    found = torch.stack([torch.stack([_flows(a[: top + 1], q) for q in chosen]) for top in tops])
    total = found.sum(-1, keepdim=True)
    return found / total.masked_fill(total == 0, 1.0)


def _flows(a: Float[Tensor, "layers tokens tokens"], query: int) -> Float[Tensor, "tokens"]:
    if len(a) == 1:
        return a[0, query]
    if len(a) == 2:
        return torch.minimum(a[1, query][:, None], a[0]).sum(0)
    return torch.as_tensor(_solved(a.detach().cpu().double().numpy(), query)).to(a)


def _solved(a: np.ndarray, query: int) -> np.ndarray:
    """Maximum flows from one token above the top layer to each input token."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    layers, tokens, _ = a.shape
    layer, i, j = np.nonzero(np.rint(a * CAPACITY) > 0)
    weight = a[layer, i, j]
    above, below = (layer + 1) * tokens + i, layer * tokens + j
    nodes = (layers + 1) * tokens
    whole = np.rint(weight * CAPACITY).astype(np.int32)
    graph = coo_array((whole, (above, below)), shape=(nodes, nodes)).tocsr()
    source, found = layers * tokens + query, np.zeros(tokens)
    for target in range(tokens):
        flow = maximum_flow(graph, source, target).flow
        residual = graph - flow
        residual.eliminate_zeros()
        reached = np.zeros(nodes, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        found[target] = weight[reached[above] & ~reached[below]].sum()
    return found


def _require_stack(attention: Tensor) -> int:
    if attention.dim() < 3 or attention.shape[-1] != attention.shape[-2] or 0 in attention.shape:
        raise InputError(f"attention: expected [..., layers, tokens, tokens], got {list(attention.shape)}")
    return int(attention.shape[-3])
