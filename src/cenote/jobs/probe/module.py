"""A probe: pool, normalisation and a linear classifier or regressor on frozen token features."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.catalog import create
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe.own import OwnMethod
from cenote.pool.base import Pool, Pooled
from cenote.pool.fitting import FittedPool, Known, decided_arguments, require_runs_on, width
from cenote.pool.graph.base import GraphPool
from cenote.pool.layers.base import LayerPool


class Probe(nn.Module):
    """`logits = W norm(pool(x)) + b`, with a BatchNorm without affine part as `norm`.

    `x` is what its pool takes: token features, padded or `Bags`; stacks of layers; `Graphs`.

    Args:
        pool: of tokens, of layers or of graphs; several output vectors are laid side by side.
        outputs: width of the logits.
        prefix_tokens: leading tokens of the data that are not patches; who sees them, `cenote.pool.fitting` says.
    """

    def __init__(self, pool: Pool | LayerPool | GraphPool, outputs: int, prefix_tokens: int = 0) -> None:
        super().__init__()
        self.pool: Any = pool
        self.prefix_tokens = prefix_tokens
        self.norm = nn.BatchNorm1d(width(pool), affine=False)
        self.classifier = nn.Linear(width(pool), outputs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled by a version that kept how many tokens its pool does not see, of layers under another name
        dropped = state.pop("drop", 0)
        state.setdefault("prefix_tokens", state.pop("hidden", dropped))
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def fitted(self) -> FittedPool:
        """The pool as it is shown these data."""
        return FittedPool(self.pool, self.prefix_tokens)

    @property
    def drop(self) -> int:
        """Leading tokens that the weights of a set without a mask do not count: they are cut off."""
        return self.fitted.hidden if isinstance(self.pool, Pool) else 0

    def forward(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Float[Tensor, "batch outputs"]:
        """Logits of each item."""
        return self.classifier(self.norm(self.pooled(x, mask)))

    def pooled(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Float[Tensor, "batch width"]:
        """What the classifier reads, before normalisation."""
        return self.fitted.pooled(x, mask)

    def seen(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Any:
        """The tokens, stacks or graphs that the pool is shown: `values`, and `mask` where there is one."""
        return self.fitted.seen(x, mask)

    def attend(self, x: Any, mask: Bool[Tensor, "batch tokens"] | None = None) -> Pooled:
        """The pooled vectors and what they took from each token that the pool is shown, from all its layers together."""
        output, weights = self.fitted.attend(x, mask)[:2]
        return Pooled(output, weights.sum(2) if weights is not None and isinstance(self.pool, LayerPool) else weights)


def sized_arguments(name: str, data: TokenDataset) -> dict[str, Any]:
    """The constructor arguments, besides `dim`, that the data decide.

    Raises:
        InputError: where the method cannot run on such data, saying why.
    """
    known = Known(data.dim, data.prefix_tokens, data.tokens, len(data.layers))
    require_runs_on(name, known)
    return decided_arguments(name, known)


def build_probe(name: str | OwnMethod, data: TokenDataset, settings: dict[str, Any] | None = None) -> Probe:
    """A fresh probe of the data with the pool called `name`, or with one of one's own.

    Raises:
        InputError: where the method cannot run on such data, saying why.
    """
    if isinstance(name, OwnMethod):
        return Probe(name.pool(data), data.outputs, data.prefix_tokens)
    pool = create(name, dim=data.dim, **{**sized_arguments(name, data), **(settings or {})})
    return Probe(pool, data.outputs, data.prefix_tokens)
