"""Apply a small network to every token without keeping its hidden layers of a huge set in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_AT_ONCE = 4096


def tokenwise(
    function: Callable[[Tensor], Tensor], values: Float[Tensor, "*rows dim"], rows_at_once: int = ROWS_AT_ONCE
) -> Float[Tensor, "*rows out"]:
    """`function(values)`, in chunks of rows whose hidden layers are recomputed in the backward pass.

    Few rows go through in one piece and nothing is recomputed. `function` must treat every row alike and on its own.
    """
    rows = values.shape[:-1].numel()
    # a transform would be gone when the backward pass computes the hidden layers anew
    if rows <= rows_at_once or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function(values)
    chunks = values.reshape(rows, values.shape[-1]).split(rows_at_once)
    if torch.is_grad_enabled():
        out = torch.cat([checkpoint(function, chunk, use_reentrant=False) for chunk in chunks])
    else:
        out = torch.cat([function(chunk) for chunk in chunks])
    return out.unflatten(0, values.shape[:-1])
