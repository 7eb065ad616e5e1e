"""What a mask alone tells: True on real tokens, with padding anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def real_tokens(
    x: Shaped[Tensor, "batch *features"], mask: Bool[Tensor, "batch tokens"] | None, tokens: int = 1
) -> Bool[Tensor, "batch tokens"]:
    """The mask of `x`; without one every token is real.

    Args:
        x: features of padded sets.
        mask: True on real tokens.
        tokens: the dimension of `x` that counts them; of a stack of layers 2.

    Example:
        >>> real_tokens(torch.zeros(1, 3, 8), None)
        tensor([[True, True, True]])
    """
    return torch.ones((x.shape[0], x.shape[tokens]), dtype=torch.bool, device=x.device) if mask is None else mask


def padding_of(inputs: Mapping[str, Any]) -> Bool[Tensor, "batch tokens"] | None:
    """What the `attention_mask` among a model's inputs says of padding: True on real tokens; None where there is none.

    Example:
        >>> padding_of({"attention_mask": torch.tensor([[0, 1, 1]])})
        tensor([[False,  True,  True]])
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def first_of(x: Shaped[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Shaped[Tensor, "batch dim"]:
    """The first real token of each set, wherever padding stands; the first slot where there is none.

    Example:
        >>> first_of(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[False, True]])).tolist()
        [[2.0]]
    """
    return x[torch.arange(len(x), device=x.device), mask.long().argmax(1)]


def cleared(
    x: Shaped[Tensor, "*batch tokens dim"], mask: Bool[Tensor, "*#batch tokens"] | None
) -> Shaped[Tensor, "*batch tokens dim"]:
    """Zeros in masked slots: what stands there, NaN included, reaches neither a sum, as 0 times NaN would, nor a gradient.

    Example:
        >>> cleared(torch.tensor([[[1.0], [float("nan")]]]), torch.tensor([[True, False]])).tolist()
        [[[1.0], [0.0]]]
    """
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def positions(mask: Bool[Tensor, "*sets tokens"]) -> Int[Tensor, "*sets tokens"]:
    """The number of each token among the real ones of its set, from 0; of padded slots -1.

    Example:
        >>> positions(torch.tensor([[False, True, False, True]]))
        tensor([[-1,  0, -1,  1]])
    """
    return (mask.cumsum(-1) - 1).masked_fill(~mask, -1)


def first_tokens(mask: Bool[Tensor, "*sets tokens"], count: int = 1) -> Bool[Tensor, "*sets tokens"]:
    """True on the first `count` real tokens of each set, wherever padding stands.

    Example:
        >>> first_tokens(torch.tensor([[False, True, True], [True, False, True]]))
        tensor([[False,  True, False],
                [ True, False, False]])
    """
    return mask & (mask.cumsum(-1) <= count)


def without_first(
    x: Shaped[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None, count: int
) -> Bool[Tensor, "batch tokens"] | None:
    """The mask of a stack of layers, False on the first `count` real tokens of each set too.

    Example:
        >>> without_first(torch.zeros(1, 6, 3, 8), None, 1)
        tensor([[False,  True,  True]])
    """
    if not count:
        return mask
    real = real_tokens(x, mask, tokens=2)
    return real & ~first_tokens(real, count)
