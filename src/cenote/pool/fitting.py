"""Which tokens a pool is shown, and which of its arguments the tokens decide: one answer for every use of a pool."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.catalog import create, method
from cenote.core.errors import InputError
from cenote.core.graphs import Graphs
from cenote.core.masks import without_first
from cenote.core.sets import PaddedTokens, Tokens, as_tokens
from cenote.pool.graph.base import GraphPool

COUNTED_SLOTS = ("drasp",)
"""Pools that cut segments, and were shown masked slots before their tokens by earlier versions."""

Form = Literal["sets", "layers", "graphs"]


@dataclass(frozen=True)
class Known:
    """What is known of the tokens that a pool is built for.

    Attributes:
        dim: width of a token.
        prefix_tokens: leading tokens that are not patches ([CLS], registers).
        tokens: of every item, prefix included; `None` where items differ, or nobody can say.
        layers: in a stack; `None` where nobody can say.
    """

    dim: int
    prefix_tokens: int = 0
    tokens: int | None = None
    layers: int | None = None


def decided_arguments(name: str, known: Known) -> dict[str, Any]:
    """The constructor arguments of a pool, besides `dim`, that are known from its tokens.

    Example:
        >>> decided_arguments("abmilp-positions", Known(8, prefix_tokens=1, tokens=17))
        {'tokens': 16}
    """
    entry = method(name)
    wanted = inspect.signature(entry.load()).parameters
    decided: dict[str, Any] = {}
    if "layers" in wanted and entry.kind == "layers" and known.layers is not None:
        decided["layers"] = known.layers
    if "tokens" in wanted and entry.kind != "layers" and known.tokens is not None:
        decided["tokens"] = known.tokens - known.prefix_tokens
    if "prefix_tokens" in wanted and known.prefix_tokens:
        decided["prefix_tokens"] = known.prefix_tokens
    return decided


def require_runs_on(name: str, known: Known) -> None:
    """Refuse a pool that data of which all is known cannot feed.

    Raises:
        InputError: naming the pool and saying why.
    """
    entry = method(name)
    cls = entry.load()
    if entry.kind != "layers" and "tokens" in inspect.signature(cls).parameters and known.tokens is None:
        raise InputError(f"{name}: needs the same number of tokens in every item, and these data are ragged")
    if cls.reads_cls and not known.prefix_tokens:
        raise InputError(f"{name}: reads [CLS], and these data have no prefix tokens")


def named_pool(name: str, known: Known, settings: dict[str, Any]) -> Any:
    """A pool of sets or of layers by its name, told what is known; `settings` override that.

    Raises:
        InputError: where it is no such pool, or needs to know more.
    """
    entry = method(name)
    if entry.room != "pool" or entry.kind not in ("sets", "layers"):
        raise InputError(
            f"pool: {name} pools {entry.kind} in {entry.room}; name a pool of sets or layers (cenote list)"
        )
    arguments: dict[str, Any] = {"dim": known.dim, **decided_arguments(name, known), **settings}
    wanted = inspect.signature(entry.load()).parameters
    told = arguments.keys() | (entry.settings or {}).keys()
    missing = [k for k, p in wanted.items() if p.default is p.empty and k not in told and p.kind is not p.VAR_KEYWORD]
    if missing:
        raise InputError(f"pool: {name} must be told {', '.join(missing)}; give {missing[0]}=... as well")
    return create(name, **arguments)


def warn_of_slots(name: str, where: str) -> None:
    """Tell who loads a pool saved by an earlier version if its results on padded batches are others now.

    Args:
        name: of the pool.
        where: it was loaded from.
    """
    if name in COUNTED_SLOTS:
        warnings.warn(
            f"{where}: was saved by a version in which {name} counted masked slots, so that a result hung on the padding "
            f"of its batch; now it is that of the real tokens alone, and differs where padding or hidden tokens came first",
            stacklevel=3,
        )


def form_of(pool: Any) -> Form:
    """What a pool takes: sets of tokens, stacks of layers, or graphs."""
    if isinstance(pool, GraphPool):
        return "graphs"
    return "layers" if hasattr(pool, "min_layers") else "sets"


def width(pool: Any) -> int:
    """Numbers that a pool makes of an item, several vectors side by side."""
    return pool.out_dim * getattr(pool, "vectors", 1)


class Shown(NamedTuple):
    """Stacks of layers `[batch, layers, tokens, dim]` with the mask of the tokens that are shown, or graphs without one."""

    values: Any
    mask: Bool[Tensor, "batch tokens"] | None


@dataclass(frozen=True)
class FittedPool:
    """A pool that is shown exactly the tokens that it may see.

    Prefix tokens are the first real ones of each set, wherever padding stands. A pool of sets with `prefix = "drop"` never sees
    them, nor does a pool of layers that does not read [CLS]; a pool of graphs sees every node.

    Args:
        pool: of sets, of layers or of graphs.
        prefix_tokens: leading tokens that are not patches; 0 shows every pool every token.

    Example:
        >>> x, mask = torch.tensor([[[0.0], [9.0], [2.0], [4.0]]]), torch.tensor([[False, True, True, True]])
        >>> FittedPool(cenote.create("mean", dim=1), prefix_tokens=1).pooled(x, mask).tolist()
        [[3.0]]
    """

    pool: Any
    prefix_tokens: int = 0

    @property
    def hidden(self) -> int:
        """Leading real tokens of each set that the pool does not see."""
        form = form_of(self.pool)
        if form == "layers":
            return 0 if getattr(self.pool, "reads_cls", False) else self.prefix_tokens
        return self.prefix_tokens if form == "sets" and getattr(self.pool, "prefix", "keep") == "drop" else 0

    def seen(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Tokens | Shown:
        """What the pool is called with; of sets without a mask the hidden tokens are cut off, else they are masked.

        To a pool for which order matters the real tokens come first, so that no masked slot takes a place in it.

        Args:
            x: `[batch, tokens, dim]` or `Bags`; of a pool of layers `[batch, layers, tokens, dim]`; of graphs `Graphs`.
            mask: True on real tokens.

        Raises:
            InputError: where a pool of graphs gets something else.
        """
        form = form_of(self.pool)
        if form == "layers":
            return Shown(x, without_first(x, mask, self.hidden))
        if form == "graphs":
            if not isinstance(x, Graphs) or mask is not None:
                raise InputError(f"x: this pool reads edges between tokens and takes Graphs, got {type(x).__name__}")
            return Shown(x, None)
        return self._packed(as_tokens(x, mask).drop_first(self.hidden))[0]

    def pooled(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Float[Tensor, "batch width"]:
        """One vector an item, several of a pool side by side."""
        vectors: Tensor = self.pool(*_arguments(self.seen(x, mask)))
        return vectors.flatten(1)

    def attend(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Any:
        """What the pool's own `attend` gives: output first, then weights.

        They are those of the slots of `x` where it has a mask, else of the tokens that the pool is shown.
        """
        if form_of(self.pool) != "sets":
            return self.pool.attend(*_arguments(self.seen(x, mask)))
        given = as_tokens(x, mask).drop_first(self.hidden)
        tokens, slots = self._packed(given)
        found = self.pool.attend(tokens)
        if slots is None or found.weights is None:
            return found
        heads = found.weights.shape[1]
        empty = found.weights.new_zeros(given.values.shape[0], heads, given.values.shape[1])
        return found._replace(weights=empty.scatter(2, slots.unsqueeze(1).expand(-1, heads, -1), found.weights))

    def _packed(self, tokens: Tokens) -> tuple[Tokens, Int[Tensor, "batch shown"] | None]:
        """The same, real tokens first, where a pool to which order matters could count the slots before or between them.

        Also the slot that each token came from; `None` where all stay in place.
        """
        if not isinstance(tokens, PaddedTokens) or tokens.mask is None or not tokens.values.numel():
            return tokens, None
        fixed = getattr(self.pool, "fixed_tokens", False)
        if getattr(self.pool, "permutation_invariant", True) and not fixed:
            return tokens, None
        mask, lengths = tokens.mask, tokens.lengths()
        if (fixed and mask.shape[1] == self.pool.tokens) or (not fixed and bool((mask[:, 1:] <= mask[:, :-1]).all())):
            return tokens, None
        slots = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(lengths.max())]
        values = tokens.values.gather(1, slots.unsqueeze(-1).expand(-1, -1, tokens.dim))
        real = mask.gather(1, slots)
        return PaddedTokens(values, None if bool(real.all()) else real), slots


def _arguments(seen: Tokens | Shown) -> tuple[Any, ...]:
    if isinstance(seen, Tokens):
        return (seen,)
    return (seen.values,) if seen.mask is None else tuple(seen)
