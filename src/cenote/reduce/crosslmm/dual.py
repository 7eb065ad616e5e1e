"""Dual cross-attention: tokens in a sequence, visual and text, read all visual tokens outside of it, through gates.

Source: Yan, Han, Tsai, Xue, Fang, Hong, Guo, Zhang, "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual
Cross-Attention Mechanisms" (2025), arXiv 2505.17020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least


class Projected(NamedTuple):
    """Keys and values of the original tokens, `[batch, heads, tokens, width]`."""

    keys: Float[Tensor, "batch heads tokens width"]
    values: Float[Tensor, "batch heads tokens width"]


class Memory(NamedTuple):
    """What a dual layer keeps of the original tokens: no query changes it, so that it is made once.

    Attributes:
        visual: for queries from visual positions; None where these don't ask.
        text: for those of text; None where these don't ask.
        mask: True = a real token, `[batch, tokens]`.
    """

    visual: Projected | None
    text: Projected | None
    mask: Bool[Tensor, "batch tokens"]


class GatedCross(nn.Module):
    """`tanh(g) W_o softmax(Q K' / sqrt(d)) V`, `g` a scalar that starts at 0.

    Args:
        dim: of queries and memory.
        heads: how many.
        chunk: queries at a time; None: all. Scores of so many queries with all tokens may be there at once.
    """

    def __init__(self, dim: int, heads: int, chunk: int | None = None) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, chunk=1 if chunk is None else chunk)
        if dim % heads:
            raise InputError(f"heads: {heads} do not divide dim {dim}")
        self.heads, self.chunk = heads, chunk
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(()))

    def project(self, memory: Float[Tensor, "batch tokens dim"]) -> Projected:
        """Keys and values of these tokens."""
        return Projected(self._heads(self.k(memory)), self._heads(self.v(memory)))

    def forward(
        self, x: Float[Tensor, "batch queries dim"], kv: Projected, mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch queries dim"]:
        """What is added to the queries; nothing where all of an item's memory is masked."""
        some = mask.any(1)
        # an item without memory reads anything, and none of it is kept
        may = (mask | ~some[:, None])[:, None, None]
        q = self._heads(self.q(x))
        pieces = q.split(q.shape[2] if self.chunk is None else self.chunk, 2) if q.shape[2] else (q,)
        y = torch.cat([F.scaled_dot_product_attention(piece, *kv, attn_mask=may) for piece in pieces], 2)
        return torch.tanh(self.gate) * self.o(y.transpose(1, 2).flatten(2)) * some[:, None, None]

    def _heads(self, x: Tensor) -> Float[Tensor, "batch heads tokens width"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DualCrossAttention(nn.Module):
    """Visual tokens read the original ones (V2V), and text reads them (T2V), each by its own weights and gate; then a gated
    feed-forward part:

        h[vis]  += tanh(g_v) Attn(W_q norm(h[vis]),  memory)
        h[text] += tanh(g_t) Attn(W_q' norm(h[text]), memory)
        h       += tanh(g_f) FFN(norm(h))

    All tokens of all frames are keys of every query, without a causal mask. With all gates at 0, where they start, it is the
    identity to the bit; so it is for an item without memory.

    Args:
        dim: of the decoder.
        heads: of both cross-attentions.
        visual, text: whether visual positions ask, and text.
        shared: one cross-attention, with one gate, for both.
        hidden: of the feed-forward part; `4 dim` by default, 0: none.
        chunk: queries at a time, see `GatedCross`.

    Attributes:
        text_on: False: text does not ask for now, as in the first stage of training.

    Raises:
        InputError: where nothing asks, or heads don't divide dim.

    Example:
        >>> layer, h = DualCrossAttention(8, 2), torch.randn(1, 5, 8)
        >>> visual = torch.tensor([[True, True, False, False, False]])
        >>> memory = layer.remember(torch.randn(1, 20, 8))
        >>> torch.equal(layer(h, memory, visual, ~visual), h)
        True

    Note: `tanh`, the start at 0, `W_o`, pre-norms, and the gate of the feed-forward part are inferred.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        visual: bool = True,
        text: bool = True,
        shared: bool = False,
        hidden: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if not (visual or text):
            raise InputError("visual, text: nothing would read the memory; give one of them as True")
        hidden = 4 * dim if hidden is None else hidden
        require_at_least(0, hidden=hidden)
        self.norm = nn.LayerNorm(dim)
        self.v2v = GatedCross(dim, heads, chunk) if visual else None
        self.t2v = None if not text else self.v2v if shared and visual else GatedCross(dim, heads, chunk)
        self.wide = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU()) if hidden else None
        self.narrow = nn.Linear(hidden, dim) if hidden else None
        self.gate = nn.Parameter(torch.zeros(())) if hidden else None
        self.text_on = True

    def remember(
        self, memory: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Memory:
        """Keys and values of the original tokens; what stands in padding, NaN too, reaches nothing."""
        if mask is None:
            mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        clean = memory.masked_fill(~mask[..., None], 0.0)
        of_visual = None if self.v2v is None else self.v2v.project(clean)
        of_text = of_visual if self.t2v is self.v2v else None if self.t2v is None else self.t2v.project(clean)
        return Memory(of_visual, of_text, mask)

    def forward(
        self,
        h: Float[Tensor, "batch tokens dim"],
        memory: Memory,
        visual: Bool[Tensor, "batch tokens"],
        text: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """States, having read.

        Args:
            h: states of the sequence.
            memory: from `remember`.
            visual: which of them are visual tokens.
            text: which of them are text; what is neither is padding, and stays.
        """
        x = self.norm(h)
        if self.v2v is not None and memory.visual is not None:
            h = h + _at(visual, x, lambda rows: self.v2v(rows, memory.visual, memory.mask))  # type: ignore[misc]
        if self.t2v is not None and self.text_on and memory.text is not None:
            h = h + _at(text, x, lambda rows: self.t2v(rows, memory.text, memory.mask))  # type: ignore[misc]
        if self.wide is None or self.narrow is None or self.gate is None:
            return h
        asks = (visual | text) if self.text_on and self.t2v is not None else visual
        asks = asks & memory.mask.any(1)[:, None]
        return h + torch.tanh(self.gate) * self.narrow(self.wide(h)) * asks[..., None]


def _at(
    where: Bool[Tensor, "batch tokens"], x: Float[Tensor, "batch tokens dim"], read: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch tokens dim"]:
    """What the tokens in a span read, at their places; zeros elsewhere. Only these are queries."""
    counts = where.sum(1)
    most = int(counts.max()) if len(counts) else 0
    if not most:
        return torch.zeros_like(x)
    order = (~where).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    index = order[..., None].expand(-1, -1, x.shape[2])
    real = torch.arange(most, device=x.device) < counts[:, None]
    found = read(x.gather(1, index)) * real[..., None]
    return torch.zeros_like(x).scatter(1, index, found.to(x.dtype))
