"""Sets of tokens, padded or ragged, behind one small algebra.

A pool is written once against `Tokens`: `values` holds the features of all tokens, and the reductions know which tokens
belong together. `rows` below stands for `batch tokens` (padded) or `total` (ragged), so a `torch.nn.Linear` applied to
`values` works in both forms.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import masks, segments
from cenote.core.arrays import as_tensor
from cenote.core.errors import InputError
from cenote.core.moments import set_variance
from cenote.core.requirements import require_floating
from cenote.core.segments import accumulation_dtype, flush_tiny


class Tokens(ABC):
    """A batch of token sets. Reductions run over the tokens of each set; an empty set gives zeros."""

    values: Float[Tensor, "*rows dim"]

    @property
    def dim(self) -> int:
        """Width of one token."""
        return self.values.shape[-1]

    @property
    @abstractmethod
    def batch(self) -> int:
        """Number of sets."""

    @property
    @abstractmethod
    def tokens_per_set(self) -> float:
        """Mean number of token slots in a set, for choosing a plan by counted operations."""

    @abstractmethod
    def lengths(self) -> Int[Tensor, "batch"]:
        """Number of real tokens in each set."""

    @abstractmethod
    def sum(self, v: Float[Tensor, "*rows channels"] | None = None) -> Float[Tensor, "batch channels"]:
        """Sum of `v` (default: the tokens) over each set."""

    @abstractmethod
    def max(self, v: Float[Tensor, "*rows channels"] | None = None) -> Float[Tensor, "batch channels"]:
        """Maximum of `v` (default: the tokens) over each set."""

    @abstractmethod
    def logsumexp(self, v: Float[Tensor, "*rows channels"]) -> Float[Tensor, "batch channels"]:
        """`log sum_n exp(v_n)` over each set."""

    @abstractmethod
    def softmax(self, scores: Float[Tensor, "*rows heads"]) -> Float[Tensor, "*rows heads"]:
        """Softmax of `scores` over the tokens of each set; padded slots get exactly 0.

        A score of -inf gives a token the weight 0; each set with tokens needs one finite score per head.
        """

    @abstractmethod
    def weighted_sum(
        self, weights: Float[Tensor, "*rows heads"], v: Float[Tensor, "*rows channels"] | None = None
    ) -> Float[Tensor, "batch heads channels"]:
        """`y_bh = sum_n w_nh v_n` (default `v`: the tokens); what stands in padded slots of either counts for nothing."""

    @abstractmethod
    def scores(
        self, queries: Float[Tensor, "heads dim"] | Float[Tensor, "batch heads dim"]
    ) -> Float[Tensor, "*rows heads"]:
        """`s_nh = q_h . x_n`, with queries shared by all sets or one group of queries per set; 0 in padded slots."""

    @abstractmethod
    def spread(self, per_set: Shaped[Tensor, "batch *channels"]) -> Shaped[Tensor, "*rows *channels"]:
        """Give every token the value of its set."""

    @abstractmethod
    def positions(self) -> Int[Tensor, "*rows"]:
        """The number of each token within its set, from 0; of padded slots -1."""

    @abstractmethod
    def token(self, index: int) -> Float[Tensor, "batch dim"]:
        """Token number `index` of every set (negative: counted from its last real token); zeros if it has none."""

    @abstractmethod
    def drop_first(self, count: int) -> Tokens:
        """The same sets without their first `count` tokens; a set that has no more is empty."""

    @abstractmethod
    def replace(self, values: Float[Tensor, "*rows channels"]) -> Tokens:
        """The same sets with other features; padded slots are cleaned to zero."""

    @abstractmethod
    def heads_first(
        self, weights: Float[Tensor, "*rows heads"]
    ) -> Float[Tensor, "batch heads tokens"] | Float[Tensor, "heads total"]:
        """Weights in the order in which they are shown to people: heads before tokens."""

    def mean(self, v: Float[Tensor, "*rows channels"] | None = None) -> Float[Tensor, "batch channels"]:
        """Mean of `v` (default: the tokens) over each set."""
        dtype = (self.values if v is None else v).dtype
        wide = accumulation_dtype(dtype)
        counts = self.lengths().clamp(min=1).to(wide).unsqueeze(-1)
        if v is None and dtype == wide:  # the tokens are clean already
            return self.sum() / counts
        return (self.sum((self.values if v is None else v).to(wide)) / counts).to(dtype)

    def min(self, v: Float[Tensor, "*rows channels"] | None = None) -> Float[Tensor, "batch channels"]:
        """Minimum of `v` (default: the tokens) over each set."""
        return -self.max(-(self.values if v is None else v))

    def std(
        self, v: Float[Tensor, "*rows channels"] | None = None, eps: float = 1e-8
    ) -> Float[Tensor, "batch channels"]:
        """Population standard deviation `sqrt(var + eps)` of `v` over each set; zeros for an empty set."""
        v = self.values if v is None else v
        wide = v.to(accumulation_dtype(v.dtype))
        variance = self.mean((wide - self.spread(self.mean(wide))).square())
        std = (variance + eps).sqrt()
        return torch.where(self.lengths().unsqueeze(-1) > 0, std, std.new_zeros(())).to(v.dtype)

    def uniform(self) -> Float[Tensor, "*rows one"]:
        """The weights of a plain mean: `1/N` on each real token."""
        ones = self.values.new_ones((*self.values.shape[:-1], 1))
        counts = self.lengths().clamp(min=1).to(self.values.dtype).unsqueeze(-1)
        return self.replace(ones / self.spread(counts)).values


LARGE_SET = 2**15
"""Numbers in one set, above which one product per set is faster on CPUs than one for all sets."""


class PaddedTokens(Tokens):
    """Sets padded to a common length: `values [batch, tokens, dim]` with an optional mask, True on real tokens.

    Whatever stands in a padded slot, NaN included, is replaced by zero, so that no later sum or gradient can see it. That costs
    one copy of the tokens; without a mask nothing is copied, so leave it out where nothing is padded.
    """

    def __init__(
        self, values: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> None:
        self.mask = mask
        self.values = values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)

    def part(self, sets: slice) -> PaddedTokens:
        """Some of the sets, without a copy."""
        part = copy.copy(self)
        part.values = self.values[sets]
        part.mask = None if self.mask is None else self.mask[sets]
        return part

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    @property
    def tokens_per_set(self) -> float:
        return float(self.values.shape[1])

    def lengths(self) -> Int[Tensor, "batch"]:
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full((self.batch,), self.values.shape[1], device=self.values.device)

    def sum(self, v: Float[Tensor, "batch tokens channels"] | None = None) -> Float[Tensor, "batch channels"]:
        v = self.values if v is None else self._cleaned(v)
        return v.sum(1)

    def max(self, v: Float[Tensor, "batch tokens channels"] | None = None) -> Float[Tensor, "batch channels"]:
        v = self.values if v is None else v
        if v.shape[1] == 0:
            return v.new_zeros((v.shape[0], v.shape[2]))
        if self.mask is None:
            return v.amax(1)
        top = v.masked_fill(~self.mask.unsqueeze(-1), float("-inf")).amax(1)
        return top.masked_fill(~self.mask.any(1, keepdim=True), 0)

    def logsumexp(self, v: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch channels"]:
        wide = v.to(accumulation_dtype(v.dtype))
        if v.shape[1] == 0:
            return v.new_zeros((v.shape[0], v.shape[2]))
        if self.mask is None:
            return wide.logsumexp(1).to(v.dtype)
        mask, empty = self.mask.unsqueeze(-1), ~self.mask.any(1).view(-1, 1, 1)
        # 0 and not -inf in an empty set: the gradient of logsumexp of nothing but -inf is NaN
        hidden = wide.new_full((), float("-inf")).masked_fill(empty, 0)
        return torch.where(mask, wide, hidden).logsumexp(1).masked_fill(empty.squeeze(1), 0).to(v.dtype)

    def std(
        self, v: Float[Tensor, "batch tokens channels"] | None = None, eps: float = 1e-8
    ) -> Float[Tensor, "batch channels"]:
        v = self.values if v is None else v
        if self.mask is not None or v.numel() == 0:
            return super().std(v, eps)
        return (set_variance(v) + eps).sqrt().to(v.dtype)

    def softmax(self, scores: Float[Tensor, "batch tokens heads"]) -> Float[Tensor, "batch tokens heads"]:
        # tokens last: several times faster than along the middle, and the order in which `scores` leaves them
        wide = scores.to(accumulation_dtype(scores.dtype)).transpose(1, 2)
        if self.mask is None:
            return flush_tiny(torch.softmax(wide, -1)).transpose(1, 2).to(scores.dtype)
        hidden = ~self.mask.unsqueeze(1)
        # the lowest finite value, not -inf: a set without tokens then stays finite and is zeroed below
        wide = wide.masked_fill(hidden, torch.finfo(wide.dtype).min)
        return flush_tiny(torch.softmax(wide, -1)).masked_fill(hidden, 0).transpose(1, 2).to(scores.dtype)

    def weighted_sum(
        self,
        weights: Float[Tensor, "batch tokens heads"],
        v: Float[Tensor, "batch tokens channels"] | None = None,
    ) -> Float[Tensor, "batch heads channels"]:
        return self._cleaned(weights).transpose(1, 2) @ (self.values if v is None else self._cleaned(v))

    def scores(
        self, queries: Float[Tensor, "heads dim"] | Float[Tensor, "batch heads dim"]
    ) -> Float[Tensor, "batch tokens heads"]:
        if queries.dim() == 2 and self.values.is_contiguous() and self.values.shape[1:].numel() < LARGE_SET:
            return self.values @ queries.T
        # one product per set: joining the sets would copy the tokens of a map, or of sets without their first token;
        # the queries of many members are worth that copy
        if queries.dim() == 2 and not torch._C._are_functorch_transforms_active():
            queries = queries.expand(self.batch, -1, -1)
        return (queries @ self.values.transpose(1, 2)).transpose(1, 2)

    def spread(self, per_set: Shaped[Tensor, "batch *channels"]) -> Shaped[Tensor, "batch tokens *channels"]:
        return per_set.unsqueeze(1).expand(per_set.shape[0], self.values.shape[1], *per_set.shape[1:])

    def positions(self) -> Int[Tensor, "batch tokens"]:
        if self.mask is None:
            return torch.arange(self.values.shape[1], device=self.values.device).expand(self.batch, -1)
        return masks.positions(self.mask)

    def token(self, index: int) -> Float[Tensor, "batch dim"]:
        tokens = self.values.shape[1]
        if self.mask is None:
            inside = -tokens <= index < tokens
            return self.values[:, index] if inside else self.values.new_zeros((self.batch, self.dim))
        if tokens == 0:
            return self.values.new_zeros((self.batch, self.dim))
        counts = self.lengths().unsqueeze(1)
        wanted = counts + index if index < 0 else torch.full_like(counts, index)
        found = (self.positions() == wanted) & self.mask
        slot = found.int().argmax(1).view(-1, 1, 1).expand(-1, 1, self.dim)
        return self.values.gather(1, slot).squeeze(1).masked_fill(~found.any(1, keepdim=True), 0)

    def drop_first(self, count: int) -> PaddedTokens:
        _require_count(count)
        if count == 0:
            return self
        if self.mask is None:
            return PaddedTokens(self.values[:, count:])
        return PaddedTokens(self.values, self.mask & ~masks.first_tokens(self.mask, count))

    def replace(self, values: Float[Tensor, "batch tokens channels"]) -> PaddedTokens:
        return PaddedTokens(values, self.mask)

    def heads_first(self, weights: Float[Tensor, "batch tokens heads"]) -> Float[Tensor, "batch heads tokens"]:
        return weights.transpose(1, 2)

    def _cleaned(self, v: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        return v if self.mask is None else v.masked_fill(~self.mask.unsqueeze(-1), 0)


class Bags(Tokens):
    """A ragged batch: the tokens of all sets one after the other, without padding.

    Args:
        values: `[total, dim]`, the tokens of set 0, then of set 1, and so on.
        offsets: `[batch + 1]` int64, starting with 0 and ending with `total`; set `b` is `values[offsets[b]:offsets[b+1]]`.

    Raises:
        InputError: where the offsets do not describe the values.

    Example:
        >>> bags = Bags.from_list([torch.ones(3, 2), torch.zeros(0, 2), torch.ones(1, 2)])
        >>> bags.lengths().tolist()
        [3, 0, 1]
        >>> bags.sum().tolist()
        [[3.0, 3.0], [0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, values: Float[Tensor, "total dim"], offsets: Int[Tensor, "batch_plus_1"]) -> None:
        if values.dim() != 2:
            raise InputError(f"Bags: values must be [total, dim], got shape {tuple(values.shape)}")
        if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
            raise InputError(
                f"Bags: offsets must be a one-dimensional int64 tensor of batch + 1 numbers, "
                f"got {offsets.dtype} of shape {tuple(offsets.shape)}"
            )
        if offsets.device != values.device:
            raise InputError(
                f"Bags: values are on {values.device} and offsets on {offsets.device}; move one with .to(device)"
            )
        if not torch.compiler.is_compiling():
            first, last = offsets[0].item(), offsets[-1].item()
            if first != 0 or last != values.shape[0] or bool((offsets.diff() < 0).any()):
                raise InputError(
                    f"Bags: offsets must rise from 0 to the number of rows {values.shape[0]}, "
                    f"got {offsets[:3].tolist()}...{last}"
                )
        self.values = values
        self.offsets = offsets

    @classmethod
    def from_list(cls, sets: Sequence[Float[Tensor, "_ dim"] | NDArray[Any]]) -> Bags:
        """Join a list of `[tokens_i, dim]` tensors or arrays.

        Raises:
            InputError: where the list is empty or one of it is not two-dimensional, of another width, or no numbers.
        """
        if not len(sets):
            raise InputError("Bags.from_list: got an empty list; at least one set is needed to know the width")
        tensors = [as_tensor(sets=s) for s in sets]
        for i, s in enumerate(tensors):
            if s.dim() != 2:
                raise InputError(f"Bags.from_list: set {i} must be [tokens, dim], got shape {tuple(s.shape)}")
        widths = {s.shape[-1] for s in tensors}
        if len(widths) > 1:
            raise InputError(f"Bags.from_list: the sets have different widths {sorted(widths)}")
        lengths = torch.tensor([0, *(s.shape[0] for s in tensors)])
        return cls(torch.cat(tensors), lengths.cumsum(0).to(tensors[0].device))

    @classmethod
    def from_padded(
        cls, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Bags:
        """The real tokens of a padded batch.

        Raises:
            InputError: where the mask is not bool or does not fit `x`.
        """
        if x.dim() != 3:
            raise InputError(f"x: expected [batch, tokens, dim], got shape {tuple(x.shape)}")
        _require_mask(x, mask)
        real = masks.real_tokens(x, mask)
        offsets = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
        return cls(x[real], offsets)

    def to_padded(self) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """`(x, mask)`, padded with zeros to the longest set."""
        lengths = self.lengths()
        longest = int(lengths.max()) if self.batch else 0
        mask = torch.arange(longest, device=self.values.device) < lengths.unsqueeze(1)
        x = self.values.new_zeros((self.batch, longest, self.dim))
        return x.masked_scatter(mask.unsqueeze(-1), self.values), mask

    def __len__(self) -> int:
        return self.batch

    def __getitem__(self, index: int) -> Float[Tensor, "tokens dim"]:
        if not -self.batch <= index < self.batch:
            raise IndexError(f"set {index} of {self.batch}")
        index %= self.batch
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Float[Tensor, "tokens dim"]]:
        return (self[i] for i in range(self.batch))

    def __repr__(self) -> str:
        return f"Bags(batch={self.batch}, total={self.values.shape[0]}, dim={self.dim}, dtype={self.values.dtype})"

    def select(self, sets: Int[Tensor, "chosen"] | Bool[Tensor, "batch"]) -> Bags:
        """The bags with these numbers (negative: counted from the last), in this order, or those marked True."""
        lengths = self.lengths()[sets]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total = int(offsets[-1])
        owner = segments.segment_index(offsets, total)
        shift = (self.offsets[:-1][sets] - offsets[:-1]).index_select(0, owner)
        return Bags(self.values.index_select(0, torch.arange(total, device=offsets.device) + shift), offsets)

    def to(self, *args: object, **kwargs: object) -> Bags:
        """As `torch.Tensor.to`: another device or dtype."""
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        return Bags(values, self.offsets.to(values.device))

    @property
    def batch(self) -> int:
        return self.offsets.numel() - 1

    @property
    def tokens_per_set(self) -> float:
        return self.values.shape[0] / max(self.batch, 1)

    def set_index(self) -> Int[Tensor, "total"]:
        """The set that each token belongs to."""
        return segments.segment_index(self.offsets, self.values.shape[0])

    def lengths(self) -> Int[Tensor, "batch"]:
        return self.offsets.diff()

    def sum(self, v: Float[Tensor, "total channels"] | None = None) -> Float[Tensor, "batch channels"]:
        return segments.segment_sum(self.values if v is None else v, self.offsets)

    def max(self, v: Float[Tensor, "total channels"] | None = None) -> Float[Tensor, "batch channels"]:
        return segments.segment_max(self.values if v is None else v, self.offsets)

    def logsumexp(self, v: Float[Tensor, "total channels"]) -> Float[Tensor, "batch channels"]:
        return segments.segment_logsumexp(v, self.offsets)

    def softmax(self, scores: Float[Tensor, "total heads"]) -> Float[Tensor, "total heads"]:
        return segments.segment_softmax(scores, self.offsets)

    def weighted_sum(
        self, weights: Float[Tensor, "total heads"], v: Float[Tensor, "total channels"] | None = None
    ) -> Float[Tensor, "batch heads channels"]:
        return segments.segment_matmul(weights, self.values if v is None else v, self.offsets)

    def scores(
        self, queries: Float[Tensor, "heads dim"] | Float[Tensor, "batch heads dim"]
    ) -> Float[Tensor, "total heads"]:
        if queries.dim() == 2:
            return self.values @ queries.T
        return segments.segment_scores(self.values, queries, self.offsets)

    def spread(self, per_set: Shaped[Tensor, "batch *channels"]) -> Shaped[Tensor, "total *channels"]:
        return per_set.index_select(0, self.set_index())

    def positions(self) -> Int[Tensor, "total"]:
        rows = torch.arange(self.values.shape[0], device=self.values.device)
        return rows - self.offsets.index_select(0, self.set_index())

    def token(self, index: int) -> Float[Tensor, "batch dim"]:
        lengths = self.lengths()
        position = lengths + index if index < 0 else torch.full_like(lengths, index)
        inside = (position >= 0) & (position < lengths)
        if not self.values.shape[0]:
            return self.values.new_zeros((self.batch, self.dim))
        rows = (self.offsets[:-1] + position).clamp(0, self.values.shape[0] - 1)
        return self.values.index_select(0, rows).masked_fill(~inside.unsqueeze(-1), 0)

    def drop_first(self, count: int) -> Bags:
        _require_count(count)
        if count == 0:
            return self
        lengths = (self.lengths() - count).clamp(min=0)
        return Bags(self.values[self.positions() >= count], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    def replace(self, values: Float[Tensor, "total channels"]) -> Bags:
        return Bags(values, self.offsets)

    def heads_first(self, weights: Float[Tensor, "total heads"]) -> Float[Tensor, "heads total"]:
        return weights.T


def as_tokens(
    x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
    mask: Bool[Tensor, "batch tokens"] | Bool[Tensor, "batch height width"] | None = None,
    dim: int | None = None,
) -> Tokens:
    """Check a pool's input and give it the common form.

    Args:
        x: `[batch, tokens, dim]` features, a `[batch, dim, height, width]` map (its positions are the tokens, row by row),
            or `Bags`.
        mask: `[batch, tokens]` (`[batch, height, width]` for a map), True on real tokens; not with `Bags`.
        dim: the width that is expected, if it is known.

    Raises:
        InputError: naming the argument, what came and what was expected.
    """
    if isinstance(x, Tokens):
        if mask is not None:
            raise InputError("mask: a ragged batch (Bags) has no padding, so it takes no mask; leave it out")
        require_floating(x.values)
        tokens = x
    else:
        if not isinstance(x, Tensor):
            raise InputError(
                f"x: expected a [batch, tokens, dim] tensor or Bags, got {type(x).__name__}; "
                f"join a list of sets with cenote.Bags.from_list"
            )
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
            mask = mask.flatten(1) if isinstance(mask, Tensor) and mask.dim() == 3 else mask
        if x.dim() != 3:
            raise InputError(
                f"x: expected [batch, tokens, dim] or [batch, dim, height, width], got shape {tuple(x.shape)}; "
                f"a single set is x.unsqueeze(0)"
            )
        _require_mask(x, mask)
        require_floating(x)
        tokens = PaddedTokens(x, mask)
    if dim is not None and tokens.dim != dim:
        raise InputError(f"x: expected tokens of width {dim}, got {tokens.dim}; build the pool with dim={tokens.dim}")
    return tokens


def _require_mask(x: Shaped[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise InputError(f"mask: expected a bool tensor, got {type(mask).__name__}; use torch.as_tensor(mask)")
    if mask.dtype != torch.bool:
        raise InputError(f"mask: expected bool with True on real tokens, got {mask.dtype}; use mask.bool()")
    if mask.shape != x.shape[:2]:
        raise InputError(f"mask: expected shape {tuple(x.shape[:2])} to match x, got {tuple(mask.shape)}")


def _require_count(count: int) -> None:
    if count < 0:
        raise InputError(f"count: expected how many tokens to drop, got {count}")
