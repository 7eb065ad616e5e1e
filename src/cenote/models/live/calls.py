"""Where attention happens in a model, and one computation of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import InputError, grouped

Kind = Literal["self", "cross", "joint", "block"]
Allowed = Callable[[Int[Tensor, "batch rows"]], Bool[Tensor, "_batch _heads _rows keys"]]
"""Numbers of queries -> which keys they may read; dimensions of 1 where it's the same for all."""


class Place(NamedTuple):
    """Where attention happens, or a block.

    `block` counts from 0 inside of `stack`, the path of the list of blocks ("" outside of any); block i reads state i and
    writes state i + 1. `path` is that of `module`.
    """

    block: int
    kind: Kind
    stack: str
    path: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention computation, before it happens: `softmax(cap(scale q k') + bias, where allowed) v`.

    Args:
        place: where.
        q: queries, after positions, `[batch, heads, queries, width]`.
        k, v: keys and values, not repeated, `[batch, kv_heads, keys, width]`; query head h reads key head
            `h // (heads / kv_heads)`.
        scale: factor on the products.
        allowed: which keys the queries of given numbers may read, made when asked for; None for all.
        bias: added to the scores, `[batch or 1, heads or 1, queries or 1, keys]`; the lowest numbers where nothing may be read.
        softcap: scores become `softcap tanh(scores / softcap)`, before the bias.
        sinks: one score per head that takes part in the softmax and has no value, `[heads]`.
        spans: of the prompt's tokens, `[batch, tokens]`.
        step: of decoding: 0 for the prompt; of denoising.
        query_start, key_start: number of the first query, and key, among all tokens so far.
        prompt: how many tokens the prompt has at this place, where that is known: of these spans are.
        rows: numbers of the queries, where only some of them are computed, `[batch, rows]`.
        real: False where a row only fills up, `[batch, rows]`.
        conditional: which items read the prompt, where guidance has others beside them, `[batch]`; None for all.
    """

    place: Place
    q: Float[Tensor, "batch heads queries width"]
    k: Float[Tensor, "batch kv_heads keys width"]
    v: Float[Tensor, "batch kv_heads keys value_width"]
    scale: float
    allowed: Allowed | None = None
    bias: Float[Tensor, "_batch _heads _queries keys"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, "heads"] | None = None
    spans: Mapping[str, Bool[Tensor, "_batch _tokens"]] = field(default_factory=dict)
    step: int = 0
    query_start: int = 0
    key_start: int = 0
    prompt: int | None = None
    rows: Int[Tensor, "batch rows"] | None = None
    real: Bool[Tensor, "batch rows"] | None = None
    conditional: Bool[Tensor, "batch"] | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def queries(self) -> int:
        """How many there are here: those of `rows` only, where only these are computed."""
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    def replace(self, **changes: object) -> AttentionCall:
        """The same with other q, k, v, scale, allowed..."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def only(self, queries: Bool[Tensor, "batch queries"]) -> AttentionCall:
        """The same for these queries alone; items with fewer of them are filled up with rows that are not `real`."""
        if queries.all():
            return self
        counts = queries.sum(1)
        most = int(counts.max())
        # stable: True first, each in its order
        order = (~queries).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        real = torch.arange(most, device=queries.device) < counts[:, None]
        order = order.masked_fill(~real, 0)
        return self.replace(
            q=_gathered(self.q, order),
            rows=order if self.rows is None else self.rows.gather(1, order),
            real=real if self.real is None else real & self.real.gather(1, order),
        )

    def numbers(self) -> Int[Tensor, "batch queries"]:
        """Of the queries, among those of the whole call."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.queries, device=self.q.device).expand(self.batch, -1)

    def readable(self) -> Bool[Tensor, "_batch _heads _queries keys"] | None:
        """Which keys may be read; None where all may. Dimensions are 1 where it's the same for all."""
        return None if self.allowed is None else self.allowed(self.numbers())

    def queries_in(self, span: str) -> Bool[Tensor, "batch queries"]:
        """Which of the queries are tokens of this span; tokens made by decoding are in none."""
        where = self._span(span)
        numbers = self.numbers() + self.query_start
        inside = where.gather(1, numbers.clamp(max=where.shape[1] - 1)) & (numbers < where.shape[1])
        return inside if self.real is None else inside & self.real

    def keys_in(self, span: str) -> Bool[Tensor, "batch keys"]:
        """Which of the keys are tokens of this span; tokens made by decoding are in none."""
        where = self._span(span, keys=True)
        behind = self.key_start + self.keys - where.shape[1]
        return nn.functional.pad(where, (0, max(0, behind)))[:, self.key_start : self.key_start + self.keys]

    def last(self) -> Bool[Tensor, "batch queries"]:
        """The last query of each item (of a batch that is padded on the left, or not at all)."""
        if self.queries == 1:
            return torch.ones(self.batch, 1, dtype=torch.bool, device=self.q.device)
        numbers = self.numbers()
        return numbers == (self.queries - 1 if self.rows is None else numbers.amax(1, keepdim=True))

    def scores(self) -> Float[Tensor, "batch heads queries keys"]:
        """Before the softmax, at least float32; -inf where a key may not be read."""
        scores = grouped.products(self.q, self.k)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.bias is not None:
            scores = scores + picked(self.bias, self.rows)
        readable = self.readable()
        return scores if readable is None else scores.masked_fill(~readable, float("-inf"))

    def weights(self) -> Float[Tensor, "batch heads queries keys"]:
        """What each query takes from each key."""
        scores = self.scores()
        hides_nothing = self.allowed is None and self.bias is None and self.sinks is None
        return scores.softmax(-1) if hides_nothing else self.softmax(scores)

    def softmax(self, scores: Float[Tensor, "batch heads queries keys"]) -> Float[Tensor, "batch heads queries keys"]:
        """Weights: zeros for a query that may read nothing; what sinks take is missing from their sum."""
        if self.sinks is None:
            nothing = scores.amax(-1, keepdim=True) == float("-inf")
            return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        sinks = self.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def mixed(
        self, weights: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """What these weights make of the values."""
        return grouped.mixed(weights.to(self.v.dtype), self.v)

    def _span(self, name: str, keys: bool = False) -> Bool[Tensor, "batch tokens"]:
        if name not in self.spans:
            known = ", ".join(sorted(self.spans)) or "none"
            raise InputError(f"spans: {name!r} is asked for at {self.place.path}, and there are: {known}")
        where = self.spans[name].to(self.q.device)
        if self.batch % where.shape[0]:
            raise InputError(
                f"spans: {name!r} is of {where.shape[0]} items, and {self.place.path} computes {self.batch}"
            )
        tokens = self.keys if keys and self.place.kind == "cross" else self.prompt
        if where.shape[1] != (self.keys if tokens is None else tokens):
            raise InputError(
                f"spans: {name!r} is of {where.shape[1]} tokens, and {self.place.path} reads {tokens or self.keys}; give spans "
                f"of the whole prompt, to edits of the places that read it (at=Where(stack=...)), and decode without drafts "
                f"(assistant_model, prompt_lookup_num_tokens), which stand behind the prompt from the first call on"
            )
        return where.repeat_interleave(self.batch // where.shape[0], 0)


def cached(given: Iterable[object]) -> int | None:
    """How many tokens the cache among a module's arguments holds; None where there is none, or it doesn't tell."""
    cache = next((value for value in given if hasattr(value, "get_seq_length")), None)
    if cache is None:
        return None
    try:
        return int(cache.get_seq_length())
    except (ValueError, IndexError, TypeError):
        # of layers without attention
        return None


def picked(
    mask: Float[Tensor, "_batch _heads _queries keys"] | Bool[Tensor, "_batch _heads _queries keys"],
    rows: Int[Tensor, "batch rows"] | None,
) -> Tensor:
    """The rows of these numbers; a mask that is the same for all queries stays as it is."""
    if rows is None or mask.shape[2] == 1:
        return mask
    if mask.shape[0] == 1 and (rows == rows[:1]).all():
        return mask[:, :, rows[0]]
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    return mask[torch.arange(rows.shape[0], device=rows.device)[:, None], :, rows].transpose(1, 2)


def dense(mask: Bool[Tensor, "_batch _heads _queries keys"] | Float[Tensor, "_batch _heads _queries keys"]) -> Allowed:
    """A mask that is there as a whole: True = may be read; or added to scores: about the lowest number = may not."""
    return lambda rows: may_read(picked(mask, rows))


def may_read(mask: Shaped[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """A mask as models have them, as one of True = may be read: added to scores, about the lowest number = may not; of whole
    numbers, 0 = may not."""
    if mask.dtype == torch.bool:
        return mask
    return mask > (torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0)


def real_tokens(mask: Shaped[Tensor, "_batch _heads tokens tokens"], batch: int) -> Bool[Tensor, "batch tokens"]:
    """Those that read themselves: a token that is no padding does."""
    return may_read(mask).diagonal(dim1=2, dim2=3).any(1).expand(batch, -1)


def causal(
    keys: int,
    offset: int = 0,
    window: int | None = None,
    padding: Bool[Tensor, "batch keys"] | None = None,
    backwards_only: bool = True,
) -> Allowed:
    """Query i reads keys up to i + offset, of these the last `window` where it's given, and never a padded one."""

    def allowed(rows: Int[Tensor, "batch rows"]) -> Bool[Tensor, "_batch 1 _rows keys"]:
        at = torch.arange(keys, device=rows.device)
        behind = (rows + offset)[:, :, None] - at
        may = behind >= 0 if backwards_only else torch.ones_like(behind, dtype=torch.bool)
        if window is not None:
            may = may & (behind < window) & (behind > -window)
        if padding is not None:
            may = may & padding[:, None]
        return may[:, None]

    return allowed


def _gathered(x: Float[Tensor, "batch heads queries width"], rows: Int[Tensor, "batch rows"]) -> Tensor:
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
