"""Attention in groups of neighbours, in some heads cut half a group later, with first tokens that every query reads.

Source: Zhang, "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models" (2024), arXiv
2406.05678; shifted groups are those of Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
ICLR 2024. The paper's code holds shifted groups alone; what is inferred of the rest is named so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.blocks import leftward, masked_attention, repeated

SinkScope = Literal["both", "keys"]
SegmentAxis = Literal["heads", "sequence"]


@dataclass(frozen=True)
class Groups:
    """Who reads whom in training: SF-Attn by default.

    The second half of the heads is cut half a group later than the first; `return_fraction` of it goes back to its place. Every
    query reads the first `sinks` tokens too.

    Args:
        group: tokens of a group; None for `ratio` of the tokens there are.
        ratio: as above.
        return_fraction: share of the shifted half that is not shifted (inferred), rounded to whole heads.
        sinks: how many first tokens all read.
        sink_scope: `"both"`: these read all tokens too, which in a causal decoder is what they read anyway; `"keys"`: not.
        no_wrap: a query reads no later token; False: as in the authors' code, where in shifted heads the first half group lies
            behind the last one and reads it.
        segment_axis: `"sequence"`, another reading: all of the second half is shifted, but not the half group that would come
            to lie behind the last one; `return_fraction` is not looked at (inferred).
        sink_at: positions of the sinks, other than the first; a control.

    Raises:
        InputError: for shares and counts that are none.

    Example:
        >>> Groups(group=4, return_fraction=0.0, sinks=0).readable(heads=2, tokens=8)[1].int()
        tensor([[1, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0, 0, 0],
                [0, 0, 1, 0, 0, 0, 0, 0],
                [0, 0, 1, 1, 0, 0, 0, 0],
                [0, 0, 1, 1, 1, 0, 0, 0],
                [0, 0, 1, 1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 1, 0],
                [0, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    group: int | None = None
    ratio: float = 0.25
    return_fraction: float = 0.5
    sinks: int = 4
    sink_scope: SinkScope = "both"
    no_wrap: bool = True
    segment_axis: SegmentAxis = "heads"
    sink_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.group is not None:
            require_at_least(1, group=self.group)
        if not 0 < self.ratio <= 1:
            raise InputError(f"ratio: expected more than 0 and at most 1, got {self.ratio}")
        if not 0 <= self.return_fraction <= 1:
            raise InputError(f"return_fraction: expected a share from 0 to 1, got {self.return_fraction}")
        require_at_least(0, sinks=self.sinks)
        require_one_of(get_args(SinkScope), sink_scope=self.sink_scope)
        require_one_of(get_args(SegmentAxis), segment_axis=self.segment_axis)

    @classmethod
    def shifted(cls, group: int | None = None, ratio: float = 0.25, *, no_wrap: bool = False) -> Groups:
        """S2-Attn as in LongLoRA's code: all of the second half shifted, no sinks, later tokens read where groups wrap."""
        return cls(group, ratio, return_fraction=0.0, sinks=0, no_wrap=no_wrap)

    @classmethod
    def apart(cls, group: int | None = None, ratio: float = 0.25) -> Groups:
        """Groups that nothing passes between: no head shifted, no sinks."""
        return cls(group, ratio, return_fraction=1.0, sinks=0)

    def size(self, tokens: int) -> int:
        """Tokens of a group, where there are so many."""
        return self.group if self.group is not None else max(1, int(tokens * self.ratio))

    def is_shifted(self, heads: int) -> Bool[Tensor, "heads"]:
        """Which heads are."""
        second = heads - heads // 2
        stay = 0 if self.segment_axis == "sequence" else round(self.return_fraction * second)
        return torch.arange(heads) >= heads // 2 + stay

    def layout(self, heads: int, tokens: int, device: torch.device | None = None) -> Int[Tensor, "heads slots"]:
        """Number of the token at each slot of each head, groups one behind the other; numbers from `tokens` on fill up."""
        size = self.size(tokens)
        length = -(-tokens // size) * size
        half = size // 2
        at = torch.arange(length, device=device)
        if self.segment_axis == "heads":
            shifted = at.roll(-half)
        else:
            # a half group of its own at either end
            more = torch.arange(length, length + size, device=device)
            shifted = torch.cat([more[: size - half], at, more[size - half :]])
            at = torch.cat([at, more])
        moved = self.is_shifted(heads).to(at.device)[:, None]
        return torch.where(moved, shifted, at)

    def sink_tokens(self, tokens: int, device: torch.device | None = None) -> Int[Tensor, "sinks"]:
        """Which tokens all read."""
        found = self.sink_at if self.sink_at is not None else range(self.sinks)
        return torch.tensor([number for number in found if number < tokens], dtype=torch.long, device=device)

    def readable(
        self, heads: int, tokens: int, device: torch.device | None = None, rows: Int[Tensor, "rows"] | None = None
    ) -> Bool[Tensor, "heads rows tokens"]:
        """Which tokens each reads, or each of some rows."""
        laid = self.layout(heads, tokens, device)
        slot = laid.argsort(1)[:, :tokens]
        at = torch.arange(tokens, device=device)
        rows = at if rows is None else rows
        asked = slot[:, rows, None]
        earlier = at <= rows[:, None]
        ordered = slot[:, None] <= asked
        if self.no_wrap:
            ordered = ordered & earlier
        sink = torch.zeros(tokens, dtype=torch.bool, device=device)
        sink[self.sink_tokens(tokens, device)] = True
        seen = sink | sink[rows, None] if self.sink_scope == "both" else sink
        size = self.size(tokens)
        return (slot[:, None] // size == asked // size) & ordered | (seen & earlier)


def grouped_attention(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    v: Float[Tensor, "batch kv_heads tokens value_width"],
    groups: Groups,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_width"]:
    """Softmax attention inside of groups and to the sinks; a group at a time, never tokens x tokens.

    Each group is given the sinks as further keys. Tokens are counted from 0 within each item, padding on either side.

    Args:
        q, k, v: after positions.
        groups: who reads whom; tokens that are no whole number of groups are filled up.
        mask: False on padding. Groups are those of the tokens that there are, padding included.
        scale: of scores, `width^-0.5` by default.

    Returns:
        Zeros for padding.

    Example:
        >>> q = torch.randn(1, 2, 8, 4)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> torch.allclose(grouped_attention(q, q, q, Groups(ratio=1.0, return_fraction=1.0)), dense, atol=1e-6)
        True
    """
    batch, heads, tokens = q.shape[:3]
    k, v = repeated(k, heads), repeated(v, heads)
    laid = None if mask is None else leftward(mask)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device) if laid is None else laid.real
    if laid is not None:
        q, k, v = (laid.laid(x) for x in (q, k, v))
    size = groups.size(tokens)
    layout = groups.layout(heads, tokens, q.device)
    filled = int(layout.max()) + 1
    room = filled - tokens
    real = nn.functional.pad(real, (0, room))
    q, k, v = (nn.functional.pad(x, (0, 0, 0, room)) for x in (q, k, v))

    def cut(x: Tensor) -> Tensor:
        slots = layout[None, :, :, None].expand(batch, -1, -1, x.shape[-1])
        return x.gather(2, slots).unflatten(2, (-1, size))

    sinks = groups.sink_tokens(tokens, q.device)
    number = layout.unflatten(1, (-1, size))
    slot = torch.arange(size, device=q.device)
    inside = (slot <= slot[:, None]).expand(*number.shape, -1)
    if groups.no_wrap:
        inside = inside & (number[..., None, :] <= number[..., None])
    # a sink that a query reads inside of its group is not read twice
    there = (number[..., None] == sinks).to(q.dtype)
    beside = (sinks <= number[..., None]) & (inside.to(q.dtype) @ there == 0)
    which = torch.cat([number, sinks.expand(*number.shape[:2], -1)], 2)
    may = torch.cat([inside, beside], -1)[None] & real[:, which][:, :, :, None] & real[:, number][..., None]
    keys, values = (
        torch.cat([cut(x), x[:, :, None, sinks].expand(-1, -1, number.shape[1], -1, -1)], 3) for x in (k, v)
    )
    queries, keys, values, may = (x.flatten(1, 2) for x in (cut(q), keys, values, may))
    mixed = masked_attention(queries, keys, values, may, scale).unflatten(1, (heads, -1)).flatten(2, 3)
    back = layout.argsort(1)[None, :, :tokens, None].expand(batch, -1, -1, v.shape[-1])
    y = mixed.gather(2, back)
    if groups.sink_at is not None and groups.sink_scope == "both":
        may = (
            groups.readable(heads, tokens, q.device, sinks) & real[:, None, None, :tokens] & real[:, None, sinks, None]
        )
        y = y.index_copy(2, sinks, masked_attention(q[:, :, sinks], k[:, :, :tokens], v[:, :, :tokens], may, scale))
    return y if laid is None else laid.back(y)
