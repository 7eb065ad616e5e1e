"""A probe: pool, normalisation and a linear classifier or regressor on frozen token features."""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.catalog import create, method
from cenote.core import InputError, Tokens, as_tokens
from cenote.features.dataset import TokenDataset
from cenote.pool.base import Pool


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


def sized_arguments(name: str, data: TokenDataset) -> dict[str, Any]:
    """The constructor arguments, besides `dim`, that the data decide.

    Raises:
        InputError: where the method cannot run on such data, saying why.
    """
    cls = method(name).load()
    wanted = inspect.signature(cls).parameters
    sized: dict[str, Any] = {}
    if "tokens" in wanted:
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
    return Probe(pool, data.outputs, data.prefix_tokens)
