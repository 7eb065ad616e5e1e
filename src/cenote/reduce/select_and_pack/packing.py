"""Tokens of several images in containers of one length, in which each reads those of its own image alone.

Source: Zhang, Li, Seo and Cao (2024), arXiv 2410.23608.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of

Packing = Literal["stream", "first-fit", "padded"]


class PackInfo(NamedTuple):
    """What stands in each slot of the containers: the `image` and the `position` in it, both -1 for padding.

    `shape` is `(batch, tokens)` of what was packed.
    """

    image: Int[Tensor, "containers length"]
    position: Int[Tensor, "containers length"]
    shape: tuple[int, int]

    @property
    def real(self) -> Bool[Tensor, "containers length"]:
        """True = a token, not padding."""
        return self.image >= 0

    @property
    def block_mask(self) -> Bool[Tensor, "containers length length"]:
        """True = may be read: both are tokens of one image."""
        same = self.image[:, :, None] == self.image[:, None]
        return same & self.real[:, :, None]


class Fill(NamedTuple):
    """How full the containers are.

    Attributes:
        kept: share of the tokens of each image that is packed.
        slots: `containers * length / (batch * tokens)`.
        padding: share of the slots that holds nothing.
    """

    kept: Float[Tensor, "batch"]
    slots: float
    padding: float

    @property
    def kept_overall(self) -> float:
        """Of all images together, which have the same number of tokens."""
        return float(self.kept.mean())


def pack_plan(
    keep: Bool[Tensor, "batch tokens"],
    length: int = 49,
    packing: Packing = "stream",
    order: Int[Tensor, "tokens"] | None = None,
) -> PackInfo:
    """Where each kept token goes.

    Args:
        keep: which are packed.
        length: of a container.
        packing: `"stream"`: image after image without a gap, cut every `length` slots, so that an image may be cut in two whose
            parts do not see each other; `"first-fit"`: each image whole, in the first container that has room, all of them as
            long as the largest image asks; `"padded"`: one container per image, as long as the largest.
        order: of the tokens of an image; as they stand by default.

    >>> pack_plan(torch.tensor([[True, False, True], [True, True, False]]), length=3).image.tolist()
    [[0, 0, 1], [1, -1, -1]]
    """
    require_at_least(1, length=length)
    require_one_of(get_args(Packing), packing=packing)
    batch, tokens = keep.shape
    if order is not None:
        if order.shape != (tokens,):
            raise InputError(f"order: expected {tokens} numbers as tokens, got {list(order.shape)}")
        keep = keep[:, order]
    image, place = keep.nonzero(as_tuple=True)
    position = place if order is None else order[place]
    counts = keep.sum(1)
    if packing == "stream":
        slot = torch.arange(len(image), device=keep.device)
        containers = -(-len(image) // length)
    else:
        longest = int(counts.max()) if batch else 0
        length = max(length, longest) if packing == "first-fit" else max(longest, 1)
        starts, containers = _first_fit(counts.tolist(), length) if packing == "first-fit" else _apart(batch, length)
        within = torch.arange(len(image), device=keep.device) - (counts.cumsum(0) - counts)[image]
        slot = torch.tensor(starts, device=keep.device, dtype=torch.long)[image] + within
    empty = torch.full((containers * length,), -1, dtype=torch.long, device=keep.device)
    images, positions = (empty.scatter(0, slot, t).view(containers, length) for t in (image, position))
    return PackInfo(images, positions, (batch, tokens))


def pack_tokens(x: Float[Tensor, "batch tokens dim"], info: PackInfo) -> Float[Tensor, "containers length dim"]:
    """Into the containers; padding is zero.

    Args:
        x: tokens, those that are not kept included.
        info: of `pack_plan`.

    >>> info = pack_plan(torch.tensor([[True, False, True]]), length=3)
    >>> pack_tokens(torch.tensor([[[1.0], [2.0], [3.0]]]), info).flatten().tolist()
    [1.0, 3.0, 0.0]
    """
    found = x[info.image.clamp(min=0), info.position.clamp(min=0)]
    return torch.where(info.real[..., None], found, torch.zeros_like(found))


def unpack_tokens(packed: Float[Tensor, "containers length dim"], info: PackInfo) -> Float[Tensor, "batch tokens dim"]:
    """Back to their places; zeros where nothing was packed.

    Args:
        packed: what became of the tokens in the containers.
        info: by which they were packed.

    >>> info = pack_plan(torch.tensor([[True, False, True]]), length=3)
    >>> unpack_tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), info).flatten().tolist()
    [1.0, 0.0, 3.0]
    """
    real = info.real
    out = packed.new_zeros(*info.shape, packed.shape[-1])
    return out.index_put((info.image[real], info.position[real]), packed[real])


def packed_attention(
    q: Float[Tensor, "containers heads length width"],
    k: Float[Tensor, "containers heads length width"],
    v: Float[Tensor, "containers heads length width"],
    info: PackInfo,
) -> Float[Tensor, "containers heads length width"]:
    """Attention of each token over those of its image in its container; zeros for padding."""
    # padding reads itself: a row without a key would be NaN, and so would its gradient
    own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    found = F.scaled_dot_product_attention(q, k, v, (info.block_mask | own)[:, None])
    return found * info.real[:, None, :, None]


def fill_of(info: PackInfo) -> Fill:
    """Kept ratio, slots and padding.

    >>> fill_of(pack_plan(torch.tensor([[True, False, True, False]]), length=4)).padding
    0.5
    """
    batch, tokens = info.shape
    kept = info.image[info.real].bincount(minlength=batch).double() / max(tokens, 1)
    slots = info.image.numel()
    return Fill(kept, slots / max(batch * tokens, 1), 1 - int(info.real.sum()) / slots if slots else 0.0)


def shifted_order(grid: tuple[int, int], by: int, device: torch.device | None = None) -> Int[Tensor, "tokens"]:
    """The order of the tokens of a map that is moved round by so many rows and columns before it is flattened.

    Attention that knows no places tells a moved map from the other only by where the containers are cut.

    >>> shifted_order((2, 2), 1).tolist()
    [3, 2, 1, 0]
    """
    height, width = grid
    return torch.arange(height * width, device=device).view(height, width).roll((-by, -by), (0, 1)).flatten()


def _first_fit(counts: list[int], length: int) -> tuple[list[int], int]:
    left: list[int] = []
    starts = []
    for count in counts:
        found = next((n for n, room in enumerate(left) if room >= count), len(left))
        if found == len(left) and count:
            left.append(length)
        starts.append(found * length + length - left[found] if count else 0)
        if count:
            left[found] -= count
    return starts, len(left)


def _apart(batch: int, length: int) -> tuple[list[int], int]:
    return [n * length for n in range(batch)], batch
