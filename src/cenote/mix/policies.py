"""Which keys a decoder reads and keeps: what every policy has, the controls, and two rivals.

A policy that reads keeps all keys and reads few; one that forgets keeps few, and what it forgot is lost for ever.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import grouped, routing
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.models.live.reading import Held, Layout, Phase, Reading, Reads, reading

Share = Literal["kv_head", "query_head"]
State = Any
"""What a policy keeps of one generation; what has a row for each item belongs to `held.notes`, which follow beams."""


class KVPolicy(ABC):
    """Base of what says which keys each key head reads for a new token, and which it forgets.

    A policy defines `read(layer, q, held, state)`. Where the keys are no more than the budget it says None: all are read, by
    the attention function that the user loaded, equal to the bit. It stays free of any model: what it keeps of a generation is
    made by `begin`, or lies in `held.notes` and `held.per_key`, and goes with the cache.

    Args:
        budget: the most keys that one key head reads for one token.

    Attributes:
        acts: "decode" for new tokens, "prefill" for the prompt too.
        forgets: whether `forget` takes keys out of the cache.
        watches: whether `seen` is shown weights.
        unit: what is chosen: tokens or blocks of them.
        share: whether a choice is that of a key head, or of each query head, whose group then reads up to so many times the
            budget.

    Raises:
        InputError: for a budget below 1.
    """

    method_kind: ClassVar[str] = "kv-policy"

    acts: frozenset[Phase] = frozenset({"decode"})
    forgets: bool = False
    watches: bool = False
    unit: Literal["token", "block"] = "token"
    share: Share = "kv_head"

    def __init__(self, budget: int) -> None:
        require_at_least(1, budget=budget)
        self.budget = budget

    def on(self, model: nn.Module, prompt: int | None = None) -> AbstractContextManager[Reading]:
        """Let a decoder read and keep what this policy says, in `generate` and in every forward.

        Args:
            model: a decoder of transformers; on leaving it is as it was.
            prompt: how many tokens are the prompt, where it comes in several calls or in one with what is behind it, as with
                drafts.

        Returns:
            What was read, counted where it was gathered.
        """
        return reading(model, self, prompt)

    def begin(self, layout: Layout) -> State:  # noqa: ARG002
        """What is kept of one generation."""
        return None

    @abstractmethod
    def read(self, layer: int, q: Float[Tensor, "batch heads 1 width"], held: Held, state: State) -> Reads | None:
        """Which keys one query of each head reads; None for all.

        Args:
            layer: of the cache.
            q: the query, after positions.
            held: keys and values, the query's own the last.
            state: what `begin` made.
        """

    def reads_all(self, layer: int) -> bool:  # noqa: ARG002
        """Whether this layer reads everything, whatever the budget."""
        return False

    def choose(
        self, layer: int, q: Float[Tensor, "batch heads queries width"], held: Held, state: State
    ) -> Bool[Tensor, "batch _heads queries keys"] | None:
        """The same for several queries, the last of which is that of the last key: of one head for all, key heads or heads.

        What `read` says for one after the other; overridden where that can be had at once. None for all.
        """
        queries, kv_heads = q.shape[2], held.keys.shape[1]
        found = []
        for row in range(queries):
            then = held.until(queries - 1 - row)
            reads = self.read(layer, q[:, :, row : row + 1], then, state)
            chosen = then.real if reads is None else _mask(reads, then.count)
            found.append(nn.functional.pad(chosen, (0, held.count - then.count)))
        heads = max(kv_heads, *(chosen.shape[1] for chosen in found))
        return torch.stack([chosen.repeat_interleave(heads // chosen.shape[1], 1) for chosen in found], 2)

    def seen(  # noqa: B027
        self, layer: int, weights: Float[Tensor, "batch heads queries keys"], held: Held, state: State
    ) -> None:
        """What some queries took of the keys that are held; zeros for queries that are padding."""

    def forget(self, layer: int, held: Held, state: State) -> Bool[Tensor, "batch kv_heads keys"] | None:  # noqa: ARG002
        """Which keys stay; None for all. Asked behind the prompt and before each token reads."""
        return None


class Dense(KVPolicy):
    """Reads everything: the control that must lose nothing."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize)

    def read(self, layer: int, q: Tensor, held: Held, state: State) -> None:  # noqa: ARG002
        return None


class _Scored(KVPolicy):
    """Protected keys, and the best of the others."""

    def read(self, layer: int, q: Tensor, held: Held, state: State) -> Reads | None:
        if held.count <= self.budget:
            return None
        scores = self.scores(layer, q, held, state)
        real, protected = held.real, self.protected(held)
        group = scores.shape[1] // real.shape[1]
        if protected is not None:
            scores = scores.masked_fill(protected.repeat_interleave(group, 1), float("inf"))
        return Reads(*routing.best_numbers(scores, self.budget, real.repeat_interleave(group, 1)))

    @abstractmethod
    def scores(self, layer: int, q: Tensor, held: Held, state: State) -> Float[Tensor, "batch _heads keys"]:
        """What keys are chosen by."""

    def protected(self, held: Held) -> Bool[Tensor, "batch kv_heads keys"] | None:  # noqa: ARG002
        """What is read whatever its score."""
        return None


class SinkWindow(KVPolicy):
    """The first tokens, which take much attention and say little, and the last ones.

    Args:
        budget: keys in all.
        sinks: of these the first.
        forgets: take the others out of the cache; what is read is the same.

    Raises:
        InputError: where sinks leave no room.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
        >>> with SinkWindow(budget=4, sinks=1).on(model) as run:
        ...     _ = model.generate(torch.tensor([[5, 6, 7, 8, 9]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        >>> run.read[0], run.held[0]
        (16, 26)

    Source: Xiao et al. (2024), Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    def __init__(self, budget: int, sinks: int = 4, forgets: bool = False) -> None:
        super().__init__(budget)
        _require_room(budget, sinks=sinks)
        self.sinks, self.forgets = sinks, forgets

    def read(self, layer: int, q: Tensor, held: Held, state: State) -> Reads | None:  # noqa: ARG002
        if self.forgets or held.count <= self.budget:
            return None
        # which these are need not be looked for
        first = torch.arange(self.sinks, device=q.device).expand(len(q), 1, -1)
        recent = held.last - torch.arange(self.budget - self.sinks - 1, -1, -1, device=q.device)
        positions = torch.cat([first, recent], 2)
        valid = torch.cat([first <= held.last, recent >= self.sinks], 2)
        numbers = positions if held.start is None else positions + held.start.view(-1, 1, 1)
        heads = held.keys.shape[1]
        return Reads(numbers.clamp(0, held.count - 1).expand(-1, heads, -1), valid.expand(-1, heads, -1))

    def forget(self, layer: int, held: Held, state: State) -> Tensor | None:  # noqa: ARG002
        return _ends(held, self.sinks, self.budget - self.sinks) if held.count > self.budget else None


class RandomKeys(_Scored):
    """The first and the last tokens, and others drawn anew for each token: a policy that is no better chooses nothing.

    What is drawn depends on the seed, the layer, the key head and the two positions alone, so that neither a batch nor a cache
    changes it.

    Args:
        budget: keys in all.
        sinks: of these the first tokens.
        recent: and the last; half of the budget by default.
        seed: another draw.

    Raises:
        InputError: where what is protected leaves no room.
    """

    def __init__(self, budget: int, sinks: int = 4, recent: int | None = None, seed: int = 0) -> None:
        super().__init__(budget)
        self.sinks, self.recent, self.seed = sinks, budget // 2 if recent is None else recent, seed
        _require_room(budget, sinks=sinks, recent=self.recent)

    def scores(self, layer: int, q: Tensor, held: Held, state: State) -> Tensor:  # noqa: ARG002
        heads = torch.arange(held.keys.shape[1], device=q.device).view(1, -1, 1)
        return _drawn(self.seed, layer, heads, held.last, held.positions)

    def protected(self, held: Held) -> Tensor:
        return _ends(held, self.sinks, self.recent)


class OracleTopK(_Scored):
    """The keys with the largest weights, found by reading all of them: what a choice of so many can reach.

    Args:
        budget: keys in all.
        share: "kv_head": of a key head, by the largest weight that one of its query heads gives; "query_head": of each query
            head, and up to a group's number of times as many are read from memory.

    Raises:
        InputError: for another share.
    """

    def __init__(self, budget: int, share: Share = "kv_head") -> None:
        super().__init__(budget)
        require_one_of(get_args(Share), share=share)
        self.share = share

    def scores(self, layer: int, q: Tensor, held: Held, state: State) -> Tensor:  # noqa: ARG002
        return key_scores(q, held, self.share)


class Quest(KVPolicy):
    """Pages of keys by a bound of their products with the query, from the least and largest number of each channel.

    The query's own page is read whatever its bound, and so is the first where sinks are protected. Query heads of a key head
    share its pages, by the highest bound.

    Args:
        budget: keys in all, a multiple of the page.
        page: tokens in one.
        sink: protect the first page.

    Raises:
        InputError: for a budget that is no multiple of the page, or too small for what is protected.

    Source: Tang et al. (2024), Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774.
    """

    unit = "block"

    def __init__(self, budget: int, page: int = 16, sink: bool = True) -> None:
        super().__init__(budget)
        require_at_least(1, page=page)
        if budget % page:
            raise InputError(
                f"budget: expected a multiple of the {page} tokens of a page, got {budget}; take "
                f"{page * max(1, budget // page)}"
            )
        _require_room(budget // page, sink=int(sink), own=1, unit="pages", what="budget // page")
        self.page, self.sink = page, sink

    def read(self, layer: int, q: Tensor, held: Held, state: State) -> Reads | None:  # noqa: ARG002
        if held.count <= self.budget:
            return None
        low, high = self._bounds(held)
        scores = routing.over_group(routing.bounded(q, low, high)[:, :, 0], low.shape[1])
        own = torch.div(held.last, self.page, rounding_mode="floor")
        at = torch.arange(scores.shape[2], device=q.device)
        forced = (at == own) | ((at == 0) & self.sink)
        chosen = routing.best(scores.masked_fill(forced, float("inf")), self.budget // self.page, at <= own)
        pages, there = routing.packed(chosen)
        positions = (pages.unsqueeze(-1) * self.page + torch.arange(self.page, device=q.device)).flatten(2)
        valid = there.repeat_interleave(self.page, 2) & (positions <= held.last)
        numbers = positions if held.start is None else positions + held.start.view(-1, 1, 1)
        return Reads(numbers.clamp(max=held.count - 1), valid)

    def _bounds(self, held: Held) -> tuple[Tensor, Tensor]:
        """Of all pages that have begun; kept beside the layer, a token more changes one page."""
        notes = held.notes
        through = notes.get("through", 0)
        if through < held.seen - 1 or "low" not in notes:
            pages = torch.div(held.positions, self.page, rounding_mode="floor").masked_fill(~held.real, -1)
            # room for some more
            count = held.count // self.page + 2 + held.count // (8 * self.page)
            notes["low"], notes["high"] = routing.page_bounds(held.keys, pages, count)
            notes["through"] = held.seen
        elif through == held.seen - 1:
            self._add(held)
            notes["through"] = held.seen
        begun = (held.count - 1) // self.page + 1
        return notes["low"][:, :, :begun], notes["high"][:, :, :begun]

    def _add(self, held: Held) -> None:
        """The last key, to its page."""
        notes, key = held.notes, held.keys[:, :, -1:]
        own = torch.div(held.last, self.page, rounding_mode="floor")
        missing = int(own.max()) + 1 - notes["low"].shape[2]
        for name, narrower in (("low", torch.minimum), ("high", torch.maximum)):
            bounds = notes[name]
            if missing > 0:
                bounds = nn.functional.pad(bounds, (0, 0, 0, missing + bounds.shape[2] // 8))
            at = own.unsqueeze(-1).expand_as(key)
            first = (held.last % self.page == 0).unsqueeze(-1)
            new = torch.where(first, key, narrower(bounds.gather(2, at), key))
            notes[name] = bounds.scatter(2, at, new)


class H2O(KVPolicy):
    """Keeps the last tokens and those that took most attention so far, and forgets the others for ever.

    What a key took is summed over the query heads of its key head and over all tokens since it was stored, the prompt's too.

    Args:
        budget: keys that are kept in all.
        recent: of these the last; half of the budget by default.
        sinks: and the first, which take most in any case.

    Raises:
        InputError: where what is protected leaves no room.

    Source: Zhang et al. (2023), H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models,
        arXiv 2306.14048.
    """

    forgets = True
    watches = True

    def __init__(self, budget: int, recent: int | None = None, sinks: int = 0) -> None:
        super().__init__(budget)
        self.recent, self.sinks = budget // 2 if recent is None else recent, sinks
        _require_room(budget, sinks=sinks, recent=self.recent)

    def read(self, layer: int, q: Tensor, held: Held, state: State) -> None:  # noqa: ARG002
        return None

    def seen(self, layer: int, weights: Tensor, held: Held, state: State) -> None:  # noqa: ARG002
        taken = routing.over_group(weights.sum(2), held.keys.shape[1], "sum")
        before = held.per_key.get("taken")
        held.per_key["taken"] = taken if before is None else before + taken

    def forget(self, layer: int, held: Held, state: State) -> Tensor | None:  # noqa: ARG002
        if held.count <= self.budget:
            return None
        taken = held.per_key.get("taken")
        if taken is None:
            taken = torch.zeros(held.keys.shape[:3], device=held.keys.device)
        protected = _ends(held, self.sinks, max(1, self.recent))
        return routing.best(taken.masked_fill(protected, float("inf")), self.budget, held.real)


def key_scores(q: Float[Tensor, "batch heads 1 width"], held: Held, share: Share) -> Float[Tensor, "batch _heads keys"]:
    """The largest weight that a query head of each key head gives each key; or the weights of each query head."""
    products = grouped.products(q, held.keys)[:, :, 0]
    scores = products.to(torch.promote_types(products.dtype, torch.float32)) * held.scale
    if not held.whole:
        group = scores.shape[1] // held.keys.shape[1]
        scores = scores.masked_fill(~held.real.repeat_interleave(group, 1), float("-inf"))
    weights = scores.softmax(-1)
    return routing.over_group(weights, held.keys.shape[1]) if share == "kv_head" else weights


def _ends(held: Held, first: int, last: int) -> Bool[Tensor, "batch kv_heads keys"]:
    """The first and the last of the real tokens that were seen."""
    positions = held.positions
    return held.real & ((positions < first) | (positions > held.last - last))


def _mask(reads: Reads, keys: int) -> Bool[Tensor, "batch heads keys"]:
    """What is read, as a mask of all keys."""
    # one column more takes what only fills up
    at = reads.numbers.masked_fill(~reads.valid, keys)
    mask = torch.zeros(*at.shape[:2], keys + 1, dtype=torch.bool, device=at.device)
    return mask.scatter(2, at, True)[..., :keys]


def _drawn(
    seed: int,
    layer: int,
    heads: Int[Tensor, "1 heads 1"],
    last: Int[Tensor, "batch 1 1"],
    at: Int[Tensor, "batch heads keys"],
) -> Float[Tensor, "batch heads keys"]:
    """Numbers from 0 to 1 that depend on these whole numbers alone."""
    x = torch.full_like(at, seed * 7919 + layer * 104729 + 1)
    for part in (heads, last, at):
        # multiplied and folded, as generators of random numbers mix a counter
        x = (x ^ (part + 0x9E3779B9)) * 0x2545F4914F6CDD1D
        x = x ^ ((x >> 29) & 0x7FFFFFFFF)
    return (x & 0xFFFFFF).to(torch.float32) / 2**24


def _require_room(budget: int, unit: str = "keys", what: str = "budget", **protected: int) -> None:
    """Raise where what is protected is more than the budget."""
    require_at_least(0, **protected)
    if sum(protected.values()) > budget:
        said = " and ".join(f"{name} {number}" for name, number in protected.items())
        raise InputError(f"{what}: {budget} {unit} leave no room for what is protected: {said}")
