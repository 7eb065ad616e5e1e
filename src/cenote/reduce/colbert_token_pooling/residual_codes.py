"""Vectors as the number of a centroid and a few bits of residual, as late interaction keeps its indexes small."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of

SAMPLE = 2**15
"""Vectors that centroids and buckets are fitted on, at most."""


class Codes(NamedTuple):
    """Vectors in few bytes: `centroids` `[n]`, and `residuals` `[n, bytes]`, `bits` of each dimension packed."""

    centroids: Int[Tensor, "n"]
    residuals: UInt8[Tensor, "n bytes"]

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(part.numel() * part.element_size() for part in self)


class ResidualCodec:
    """Each vector as its nearest centroid and, per dimension, the bucket of what is left.

    `x ~ c_k + w_b`, `k` the nearest centroid, `b` the bucket of `x - c_k`; buckets are quantiles of all residuals,
    `w` their middle quantiles.

    Args:
        centroids: of k-means; None for the power of two below `16 sqrt(n)`, and at most a quarter of the vectors.
        bits: per dimension, 1, 2, 4 or 8; a dimension times bits must fill whole bytes.
        unit_norm: bring decoded vectors back to unit length, as vectors that were of unit length want it.
        seed: of k-means.

    Raises:
        InputError: for impossible settings, vectors that cannot be fitted, and encoding before `fit`.

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
        >>> codec = ResidualCodec(bits=2).fit(x)
        >>> codes = codec.encode(x)
        >>> codes.residuals.shape, bool((codec.decode(codes) * x).sum(1).mean() > 0.9)
        (torch.Size([400, 2]), True)

    Source:
        Santhanam et al. 2022, "ColBERTv2: Effective and Efficient Retrieval via Lightweight Late Interaction",
        arXiv 2112.01488, section 3.3; used by Clavié, Chaffin, Adams 2024, arXiv 2409.14683.
    """

    def __init__(self, centroids: int | None = None, *, bits: int = 2, unit_norm: bool = True, seed: int = 0) -> None:
        require_one_of((1, 2, 4, 8), bits=bits)
        if centroids is not None:
            require_at_least(1, centroids=centroids)
        self.asked, self.bits, self.unit_norm, self.seed = centroids, bits, unit_norm, seed
        self.centroids: Float[Tensor, "k dim"] | None = None

    def fit(self, x: Float[Tensor, "n dim"]) -> Self:
        """Centroids and buckets of these vectors."""
        x = _vectors(x, None)
        n, dim = x.shape
        if dim * self.bits % 8:
            raise InputError(f"bits: {dim} dimensions of {self.bits} bits do not fill whole bytes")
        if n < 2:
            raise InputError(f"x: expected at least 2 vectors to fit, got {n}")
        asked = self.asked or max(1, min(2 ** int(math.log2(16 * math.sqrt(n))), n // 4))
        if asked > n:
            raise InputError(f"centroids: expected at most the {n} vectors, got {asked}")
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: max(SAMPLE, asked)]
        sample = x[drawn].numpy()
        k_means = MiniBatchKMeans(asked, random_state=self.seed, n_init=1, batch_size=4096).fit(sample)
        self.centroids = torch.from_numpy(k_means.cluster_centers_.astype(np.float32))
        residuals = (x[drawn] - self.centroids[self._nearest(x[drawn])]).flatten().numpy()
        steps = 2**self.bits
        self.cuts = torch.from_numpy(np.quantile(residuals, np.arange(1, steps) / steps)).float()
        self.middles = torch.from_numpy(np.quantile(residuals, (np.arange(steps) + 0.5) / steps)).float()
        return self

    def encode(self, x: Float[Tensor, "n dim"]) -> Codes:
        """Codes of vectors."""
        centroids = self._fitted()
        x = _vectors(x, centroids.shape[1])
        nearest = self._nearest(x)
        buckets = torch.bucketize(x - centroids[nearest], self.cuts).to(torch.uint8)
        per_byte = 8 // self.bits
        shifts = torch.arange(per_byte, dtype=torch.uint8) * self.bits
        packed = (buckets.unflatten(1, (x.shape[1] // per_byte, per_byte)) << shifts).sum(-1, dtype=torch.uint8)
        return Codes(nearest.int(), packed)

    def decode(self, codes: Codes) -> Float[Tensor, "n dim"]:
        """The vectors, about."""
        centroids = self._fitted()
        shifts = torch.arange(8 // self.bits, dtype=torch.uint8) * self.bits
        buckets = (codes.residuals.unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        x = centroids[codes.centroids.long()] + self.middles[buckets.flatten(1).long()]
        return torch.nn.functional.normalize(x, dim=-1) if self.unit_norm else x

    def _nearest(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, "n"]:
        centroids = self._fitted()
        half = centroids.square().sum(1) / 2
        found = [(part @ centroids.T - half).argmax(1) for part in x.split(4096)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)

    def _fitted(self) -> Float[Tensor, "k dim"]:
        if self.centroids is None:
            raise InputError("codec: has no centroids yet; fit it first")
        return self.centroids


def _vectors(x: Tensor, dim: int | None) -> Float[Tensor, "n dim"]:
    if x.dim() != 2 or not x.is_floating_point() or (dim is not None and x.shape[1] != dim):
        raise InputError(f"x: expected floating point [n, {dim or 'dim'}], got {x.dtype} {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise InputError("x: holds NaN or infinity")
    return x.detach().float().cpu()
