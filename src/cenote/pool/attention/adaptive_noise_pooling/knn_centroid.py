"""The KNN-Centroid task: a set of vectors, and the mean of the `k` nearest to its first one."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least

REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "avg": np.mean,
    "mean": np.mean,
    "max": np.max,
    "min": np.min,
    "sum": np.sum,
}


def knn_centroid_vectors(
    samples: int, vectors: int = 128, dim: int = 16, seed: int | np.random.RandomState = 42
) -> Float[np.ndarray, "samples vectors dim"]:
    """Draw sets of vectors whose features come from three families of distributions.

    For each set `dim // 3 + 1` features each are normal (mean from `[-3, 3]`, standard deviation from `[1, 3]`), uniform
    (lower end from `[-3, 3]`, width from `[0.2, 3]`), and exponential (scale from `[0.1, 2]`, sign at random, shifted by
    `[0, 3]` against its sign). All are divided by `sqrt(dim)`, shuffled, and the first `dim` are kept.

    Args:
        samples, vectors, dim: sizes.
        seed: of numpy's frozen `RandomState` stream, in which the author's generator draws; or such a stream.

    Example:
        >>> knn_centroid_vectors(2, vectors=32, dim=8, seed=0).shape
        (2, 32, 8)

    Source: Brothers, "Robust Noise Attenuation via Adaptive Pooling of Transformer Outputs", ICML 2025.
    """
    require_at_least(1, samples=samples, vectors=vectors, dim=dim)
    stream = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    return np.stack([_one_set(stream, vectors, dim) for _ in range(samples)])


def _one_set(stream: np.random.RandomState, vectors: int, dim: int) -> np.ndarray:
    features = dim // 3 + 1
    shape = (vectors, features)
    mean, std = stream.uniform(-3, 3, features), stream.uniform(1, 3, features)
    normal = stream.normal(mean, std, shape)
    low = stream.uniform(-3, 3, features)
    uniform = stream.uniform(low, low + stream.uniform(0.2, 3, features), shape)
    scale = stream.uniform(0.1, 2, features)
    sign = stream.choice([-1, 1], features)
    shift = -sign * stream.uniform(0, 3, features)
    exponential = sign * stream.exponential(scale, shape) + shift
    by_feature = np.hstack([normal, uniform, exponential]).T / np.sqrt(dim)
    stream.shuffle(by_feature)
    return by_feature[:dim].T


def knn_centroid_targets(x: Float[np.ndarray, "samples vectors dim"], method: str) -> Float[np.ndarray, "samples dim"]:
    """What a pool must return for each set.

    Args:
        x: the sets.
        method: `"knn8"`: the mean of the 8 vectors nearest to vector 0, itself excluded (all others, where there are
            fewer); `"kfn8"`: of the 8 furthest; or `"mean"`, `"avg"`, `"max"`, `"min"`, `"sum"` of all vectors.

    Raises:
        InputError: naming the methods where it is none of them.

    Example:
        >>> x = np.array([[[0.0], [5.0], [1.0], [3.0]]])
        >>> knn_centroid_targets(x, "knn2").tolist(), knn_centroid_targets(x, "kfn1").tolist()
        ([[2.0]], [[5.0]])

    Source: Brothers, ICML 2025.
    """
    if method in REDUCTIONS:
        return REDUCTIONS[method](x, axis=1)
    named = re.fullmatch(r"(knn|kfn)([1-9]\d*)", method)
    if named is None:
        raise InputError(
            f"method: expected 'knn' or 'kfn' and a number, as in 'knn8', or one of {', '.join(REDUCTIONS)}; got {method!r}"
        )
    distances = np.linalg.norm(x - x[:, :1], axis=-1)
    ordered = np.take_along_axis(x, np.argsort(distances, axis=1)[..., None], axis=1)
    k = int(named[2])
    return (ordered[:, 1 : k + 1] if named[1] == "knn" else ordered[:, -k:]).mean(1)
