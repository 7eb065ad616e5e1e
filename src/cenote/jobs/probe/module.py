"""A probe: pool, normalisation and a linear classifier or regressor on frozen token features."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.catalog import create, method
from cenote.core import InputError, Tokens, as_tokens
from cenote.core.graphs import Graphs
from cenote.core.masks import without_first
from cenote.features.dataset import TokenDataset
from cenote.pool.base import Pool, Pooled
from cenote.pool.graph.base import GraphPool
from cenote.pool.layers.base import LayerPool


class Probe(nn.Module):
    """`logits = W norm(pool(x)) + b`, with a BatchNorm without affine part as `norm`.

    Args:
        pool: from token features to one vector (several output vectors are laid side by side).
        outputs: width of the logits.
        prefix_tokens: leading tokens of the data that are not patches; a pool with `prefix = "drop"` never sees them.
    """

    def __init__(self, pool: Pool, outputs: int, prefix_tokens: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.drop = prefix_tokens if pool.prefix == "drop" else 0
        self.norm = nn.BatchNorm1d(pool.out_dim * pool.vectors, affine=False)
        self.classifier = nn.Linear(pool.out_dim * pool.vectors, outputs)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"] | Tokens, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch outputs"]:
        """Logits of each set."""
        return self.classifier(self.norm(self.pooled(x, mask)))

    def pooled(
        self, x: Float[Tensor, "batch tokens dim"] | Tokens, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch width"]:
        """What the classifier reads, before normalisation."""
        return self.pool(self.seen(x, mask)).flatten(1)

    def seen(
        self, x: Float[Tensor, "batch tokens dim"] | Tokens, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Tokens:
        """The tokens that the pool is shown."""
        return as_tokens(x, mask).drop_first(self.drop)

    def attend(
        self, x: Float[Tensor, "batch tokens dim"] | Tokens, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Pooled:
        """The pooled vectors and what they took from each token that the pool is shown."""
        return self.pool.attend(self.seen(x, mask))


class Stack(NamedTuple):
    """A batch of layer stacks `[batch, layers, tokens, dim]`, or of graphs, and which tokens are shown."""

    values: Any
    mask: Tensor | None


class LayerProbe(Probe):
    """A probe whose pool reads all layers of each token.

    Args:
        pool: from layer stacks to one vector.
        outputs: width of the logits.
        prefix_tokens: leading tokens of the data; a pool that does not read [CLS] never sees them.
    """

    pool: LayerPool  # type: ignore[assignment]

    def __init__(self, pool: LayerPool, outputs: int, prefix_tokens: int = 0) -> None:
        nn.Module.__init__(self)
        self.pool = pool
        self.drop = 0
        self.hidden = 0 if pool.reads_cls else prefix_tokens
        self.norm = nn.BatchNorm1d(pool.out_dim, affine=False)
        self.classifier = nn.Linear(pool.out_dim, outputs)

    def pooled(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Float[Tensor, "batch width"]:
        """What the classifier reads, before normalisation."""
        return self.pool(*self.seen(x, mask))

    def seen(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Any:
        """The stack, with tokens that the pool is not to see masked."""
        return Stack(x, without_first(x, mask, self.hidden))

    def attend(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Pooled:
        """As of a pool of tokens; the weights of a token are summed over its layers."""
        output, weights = self.pool.attend(*self.seen(x, mask))
        return Pooled(output, None if weights is None else weights.sum(2))


class GraphProbe(Probe):
    """A probe whose pool reads the edges between tokens; it takes `Graphs`.

    Args:
        pool: from graphs to one vector each.
        outputs: width of the logits.
    """

    pool: GraphPool  # type: ignore[assignment]

    def __init__(self, pool: GraphPool, outputs: int) -> None:
        nn.Module.__init__(self)
        self.pool = pool
        self.drop = 0
        self.norm = nn.BatchNorm1d(pool.out_dim, affine=False)
        self.classifier = nn.Linear(pool.out_dim, outputs)

    def pooled(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Float[Tensor, "batch width"]:
        """What the classifier reads, before normalisation."""
        return self.pool(self.seen(x, mask).values)

    def seen(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Any:
        """The graphs themselves."""
        if not isinstance(x, Graphs) or mask is not None:
            raise InputError(f"x: this probe reads edges between tokens and takes Graphs, got {type(x).__name__}")
        return Stack(x, None)

    def attend(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Pooled:
        """As of a pool of tokens."""
        output, weights, _ = self.pool.attend(self.seen(x, mask).values)
        return Pooled(output, weights)


def sized_arguments(name: str, data: TokenDataset) -> dict[str, Any]:
    """The constructor arguments, besides `dim`, that the data decide.

    Raises:
        InputError: where the method cannot run on such data, saying why.
    """
    entry = method(name)
    cls = entry.load()
    wanted = inspect.signature(cls).parameters
    sized: dict[str, Any] = {}
    if entry.kind == "layers":
        if "layers" in wanted:
            sized["layers"] = len(data.layers)
    elif "tokens" in wanted:
        if data.tokens is None:
            raise InputError(f"{name}: needs the same number of tokens in every item, and these data are ragged")
        sized["tokens"] = data.tokens - data.prefix_tokens
    if "prefix_tokens" in wanted and data.prefix_tokens:
        sized["prefix_tokens"] = data.prefix_tokens
    if cls.reads_cls and not data.prefix_tokens:
        raise InputError(f"{name}: reads [CLS], and these data have no prefix tokens")
    return sized


def build_probe(name: str, data: TokenDataset, settings: dict[str, Any] | None = None) -> Probe:
    """A fresh probe of the data with the pool called `name`.

    Raises:
        InputError: where the method cannot run on such data, saying why.
    """
    pool = create(name, dim=data.dim, **{**sized_arguments(name, data), **(settings or {})})
    return probe_of(pool, data.outputs, data.prefix_tokens)


def probe_of(pool: Pool | LayerPool | GraphPool, outputs: int, prefix_tokens: int) -> Probe:
    """A fresh probe on a pool of tokens, of layers or of graphs."""
    if isinstance(pool, GraphPool):
        return GraphProbe(pool, outputs)
    return (
        LayerProbe(pool, outputs, prefix_tokens) if isinstance(pool, LayerPool) else Probe(pool, outputs, prefix_tokens)
    )
