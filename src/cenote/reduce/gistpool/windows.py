"""Windows of a context, gist tokens between them, and who may read whom.

Source: Petrov, Sandler, Zhmoginov, Miller, Vladymyrov, "Long Context In-Context Compression by Getting to the Gist of Gisting"
(2025), arXiv 2504.08934.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cenote.core import InputError
from cenote.core.masks import positions
from cenote.core.requirements import require_at_least

Place = Literal["end", "centre"]


class Windows(NamedTuple):
    """Runs of `ratio` tokens, the last of them shorter; contexts with fewer of them are filled up on the left.

    Attributes:
        members: which tokens each window holds, `[batch, windows, tokens]`.
        last: number of a window's last token among the real ones, `[batch, windows]`.
        mask: True = a real window, `[batch, windows]`.
    """

    members: Bool[Tensor, "batch windows tokens"]
    last: Int[Tensor, "batch windows"]
    mask: Bool[Tensor, "batch windows"]

    def means(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch windows dim"]:
        """The mean of each window's tokens; zeros of windows that only fill up."""
        inside = self.members.any(1)
        shares = self.members.to(x.dtype) / self.members.sum(-1, keepdim=True).clamp(min=1)
        return shares @ x.masked_fill(~inside[..., None], 0.0)

    def middle(self) -> Int[Tensor, "batch windows"]:
        """Number of each window's middle token among the real ones; of an even number the first of the two."""
        return self.last - self.members.sum(-1) // 2


class Layout(NamedTuple):
    """A context and its gist tokens as one sequence, filled up on the left.

    Attributes:
        source: of each slot the number of its token in the context as it was given, or of its gist, `[batch, slots]`.
        gist: where a gist stands, `[batch, slots]`.
        mask: True = a real slot, `[batch, slots]`.
        positions: that the model is told, `[batch, slots]`; 0 where a slot only fills up.
        ends: position at which a prompt goes on, `[batch]`.
    """

    source: Int[Tensor, "batch slots"]
    gist: Bool[Tensor, "batch slots"]
    mask: Bool[Tensor, "batch slots"]
    positions: Int[Tensor, "batch slots"]
    ends: Int[Tensor, "batch"]

    def gists(self, x: Shaped[Tensor, "batch slots *features"]) -> Shaped[Tensor, "batch windows *features"]:
        """What stands at the gists, filled up on the left with zeros."""
        most = int(self.gist.sum(1).max())
        order = self.gist.to(torch.uint8).argsort(dim=1, stable=True)[:, -most:]
        real = self.gist.gather(1, order)
        found = x[torch.arange(len(x), device=x.device)[:, None], order]
        return found.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 2)), 0)


def windows(mask: Bool[Tensor, "batch tokens"], ratio: int, overlap: int = 0) -> Windows:
    """Cut each context into `ceil(tokens / ratio)` windows; padding belongs to none.

    Args:
        mask: True on real tokens, padding anywhere.
        ratio: tokens per window, `r`.
        overlap: tokens before a window that it holds, too.

    Raises:
        InputError: for a context without a token.

    Example:
        >>> found = windows(torch.tensor([[True] * 5, [False] * 3 + [True] * 2]), 2)
        >>> found.members[0].int().tolist()
        [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
        >>> found.mask.tolist(), found.last.tolist()
        ([[True, True, True], [False, False, True]], [[1, 3, 4], [0, 0, 1]])
    """
    require_at_least(1, ratio=ratio)
    require_at_least(0, overlap=overlap)
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        raise InputError("context: is empty in some item; give at least one token, or answer without a context")
    counts = -(-lengths // ratio)
    most = int(counts.max())
    number = torch.arange(most, device=mask.device) - (most - counts)[:, None]
    real = number >= 0
    at = positions(mask)[:, None]
    first, behind = (number * ratio - overlap)[..., None], ((number + 1) * ratio)[..., None]
    members = (at >= first) & (at < behind) & mask[:, None] & real[..., None]
    last = torch.minimum((number + 1) * ratio, lengths[:, None]) - 1
    return Windows(members, last.masked_fill(~real, 0), real)


def interleaved(mask: Bool[Tensor, "batch tokens"], cut: Windows, spread: bool = True, place: Place = "end") -> Layout:
    """Put each gist right behind its window, or all of them behind the context.

    A gist that is spread has the position of its window's last token, or middle one, and a prompt goes on as if there were no
    gists; gists behind the context are counted as tokens.

    Args:
        mask: of the context, True on real tokens.
        cut: its windows.
        spread: whether gists stand among the tokens.
        place: which position a gist that is spread has.

    Example:
        >>> mask = torch.ones(1, 5, dtype=torch.bool)
        >>> made = interleaved(mask, windows(mask, 2))
        >>> made.gist.int().tolist(), made.positions.tolist(), made.ends.tolist()
        ([[0, 0, 1, 0, 0, 1, 0, 1]], [[0, 1, 1, 2, 3, 3, 4, 4]], [5])
    """
    lengths, counts = mask.sum(1), cut.mask.sum(1)
    token = positions(mask)
    gist = positions(cut.mask)
    behind = lengths[:, None] + gist
    # tokens at even places, each gist between that of its window's last token and the next; what fills up first of all
    keys = torch.cat([2 * token, 2 * cut.last + 1 if spread else 2 * behind], 1)
    real = torch.cat([mask, cut.mask], 1)
    order = keys.masked_fill(~real, -1).argsort(dim=1, stable=True)
    order = order[:, -int(real.sum(1).max()) :]
    tokens = mask.shape[1]
    at = behind if not spread else cut.last if place == "end" else cut.middle()
    real = real.gather(1, order)
    told = torch.cat([token, at], 1).gather(1, order).masked_fill(~real, 0)
    is_gist = order >= tokens
    source = torch.where(is_gist, order - tokens, order)
    return Layout(source, is_gist & real, real, told, lengths if spread else lengths + counts)


def readable(
    layout: Layout, cut: Windows, window: bool = True, itself: bool = True
) -> Bool[Tensor, "batch slots slots"]:
    """Which slots each slot may read.

    Tokens of the context read those before them and never a gist. A gist reads its window and itself or, without `window`,
    all tokens and gists before it.

    Args:
        layout: the sequence.
        cut: its windows.
        window: whether gists are kept to their windows.
        itself: whether a gist that is kept to its window reads itself, too.

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> cut = windows(mask, 2)
        >>> readable(interleaved(mask, cut), cut)[0].int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
    """
    slots = layout.mask.shape[1]
    before = torch.ones(slots, slots, dtype=torch.bool, device=layout.mask.device).tril()
    real = layout.mask[:, :, None] & layout.mask[:, None]
    ahead = before & real
    of_token = ahead & ~layout.gist[:, None]
    if not window:
        return torch.where(layout.gist[..., None], ahead, of_token)
    item = torch.arange(len(slots_of := layout.source), device=slots_of.device)[:, None, None]
    number = layout.source.masked_fill(~layout.gist, 0)[..., None]
    token = layout.source.masked_fill(layout.gist | ~layout.mask, 0)[:, None]
    mine = cut.members[item, number, token] & ~layout.gist[:, None]
    if itself:
        mine = mine | torch.eye(slots, dtype=torch.bool, device=layout.mask.device)
    return torch.where(layout.gist[..., None], mine & real, of_token)


def dilution_bound(tokens: int, largest: float) -> float:
    """The largest weight that a softmax over so many tokens can have: `1 / (1 + (n - 1) e^(-2B))`, logits in `[-B, B]`.

    It falls to zero as the context grows, so that a head of bounded weights cannot copy one token out of many, unless it is
    kept to a window.

    >>> round(dilution_bound(1, 3.0), 3), round(dilution_bound(4096, 3.0), 3)
    (1.0, 0.09)
    """
    require_at_least(1, tokens=tokens)
    require_at_least(0, largest=largest)
    return 1 / (1 + (tokens - 1) * math.exp(-2 * largest))


class Cost(NamedTuple):
    """Pairs of a query and a key that attention computes, per head and block, and keys that are kept.

    Attributes:
        compressing: once per context: tokens with tokens, and gists with their windows.
        answering: once per prompt: its tokens with the gists and with each other.
        whole: context and prompt without compression.
        kept: keys per head and block.
        bytes: of keys and values, all blocks.
    """

    compressing: int
    answering: int
    whole: int
    kept: int
    bytes: int


def cost(
    tokens: int, prompt: int, ratio: int, *, blocks: int, kv_heads: int, width: int, bytes_per_number: int = 4
) -> Cost:
    """What a compressed context costs, by counting.

    Args:
        tokens: of the context.
        prompt: tokens of the prompt.
        ratio: tokens per gist.
        blocks, kv_heads, width: of the decoder; of a head the width.
        bytes_per_number: 4 of float32.

    >>> cost(8, 2, 4, blocks=1, kv_heads=1, width=16)
    Cost(compressing=46, answering=7, whole=55, kept=2, bytes=256)
    """
    require_at_least(1, tokens=tokens, ratio=ratio, blocks=blocks, kv_heads=kv_heads, width=width)
    require_at_least(0, prompt=prompt)
    kept = -(-tokens // ratio)
    own = prompt * (prompt + 1) // 2
    return Cost(
        compressing=tokens * (tokens + 1) // 2 + tokens + kept,
        answering=prompt * kept + own,
        whole=(tokens + prompt) * (tokens + prompt + 1) // 2,
        kept=kept,
        bytes=2 * kept * blocks * kv_heads * width * bytes_per_number,
    )
