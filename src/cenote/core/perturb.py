"""What a model gives when parts of its inputs are taken away.

Which units stay is a mask, `[items, masks, units]`; how the others are filled is the caller's, who knows the inputs. Equal
masks of an item are run once, and rows that keep equally many run together, so that dropped tokens save time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least

Run = Callable[[Int[Tensor, "rows"], Bool[Tensor, "rows units"]], Float[Tensor, "rows outputs"]]
"""Numbers of items, and what each row keeps of its item -> the model's outputs."""

BATCH = 128


@torch.no_grad()
def perturbed(
    run: Run,
    keep: Bool[Tensor, "items masks units"],
    real: Bool[Tensor, "items units"] | None = None,
    batch: int = BATCH,
) -> Float[Tensor, "items masks outputs"]:
    """The outputs under every mask.

    Args:
        run: the model, given numbers of items and what is kept of each.
        keep: True = stays.
        real: which units there are; what masks say of others makes no difference.
        batch: rows at a time.

    Raises:
        InputError: where shapes do not fit, or nothing is asked.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 4.0]])
        >>> keep = torch.tensor([[[True, False, True], [False, True, True]]])
        >>> perturbed(lambda items, keep: (x[items] * keep).sum(1, keepdim=True), keep).tolist()
        [[[5.0], [6.0]]]
    """
    require_at_least(1, batch=batch)
    items, masks, units = keep.shape
    if 0 in keep.shape:
        raise InputError(f"keep: expected [items, masks, units] with at least one of each, got {list(keep.shape)}")
    if real is not None and real.shape != (items, units):
        raise InputError(f"real: expected [{items}, {units}] as the masks, got {list(real.shape)}")
    asked = keep if real is None else keep & real[:, None]
    numbers = torch.arange(items, device=keep.device).repeat_interleave(masks)
    rows = torch.cat([numbers[:, None], asked.flatten(0, 1).long()], 1)
    distinct, place = rows.unique(dim=0, return_inverse=True)
    kept = distinct[:, 1:].bool()
    # the longest first: what does not fit into memory fails at once
    order = kept.sum(1).argsort(descending=True, stable=True)
    found = torch.cat([run(distinct[part, 0], kept[part]) for part in order.split(batch)])
    return found[order.argsort()[place]].unflatten(0, (items, masks))


def of_tokens(keep: Bool[Tensor, "rows units"], unit: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "rows tokens"]:
    """Which tokens stay, where units of several tokens stay or go.

    Args:
        keep: of the units.
        unit: of each token; -1 of those that belong to none, which stay ([CLS]).

    >>> of_tokens(torch.tensor([[True, False]]), torch.tensor([[-1, 0, 1, 1]])).tolist()
    [[True, True, False, False]]
    """
    return keep.gather(1, unit.clamp(min=0)) | (unit < 0)


def dropped(
    x: Shaped[Tensor, "rows tokens *dim"], keep: Bool[Tensor, "rows tokens"], fill: float = 0
) -> tuple[Shaped[Tensor, "rows kept *dim"], Bool[Tensor, "rows kept"]]:
    """What is kept, moved together to the left, and which of it is real.

    >>> dropped(torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.tensor([[True, False, True], [False, True, False]]), fill=-1)
    (tensor([[ 5,  7],
            [ 9, -1]]), tensor([[ True,  True],
            [ True, False]]))
    """
    longest = int(keep.sum(1).amax())
    order = keep.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    rows = torch.arange(len(keep), device=keep.device)[:, None]
    real = keep.gather(1, order)
    found = x[rows, order]
    return found.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 2)), fill), real
