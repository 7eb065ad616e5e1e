from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_positive
from cenote.pool.spatial.axes import per_axis
from cenote.pool.spatial.deeplab.permutohedral import PermutohedralLattice

Method = Literal["auto", "exact", "lattice"]
Normalization = Literal["symmetric", "before", "after", "none"]
Sigma = float | tuple[float, float]
Filter = Callable[[Tensor], Tensor]

EXACT_PIXELS = 64 * 64
LEAST_PROBABILITY = 1e-5


class DenseCRF(nn.Module):
    """Fully connected conditional random field: snaps blurry class scores to the edges of an image.

    Every pixel is tied to every other: `E(l) = sum_i U_i(l_i) + sum_{i<j} [l_i != l_j] k(i, j)` with
    `k(i, j) = w1 exp(-|p_i - p_j|^2 / 2 s_a^2 - |I_i - I_j|^2 / 2 s_b^2) + w2 exp(-|p_i - p_j|^2 / 2 s_g^2)`.
    Mean field, all pixels at once: `Q = softmax(-U)`, then `Q <- softmax(-U + sum_m w_m K_m Q)`, `iterations` times, with
    normalised kernels, by default `D^-1/2 K D^-1/2`, `D = diag(K 1)`.

    Nothing is learned; gradients reach the unary energies. Works on any scores per pixel, see `refine` for heat maps.

    Args:
        appearance_weight: `w1`; 0 leaves the kernel out.
        position_sigma: `s_a` in pixels, or one per axis `(x, y)`.
        colour_sigma: `s_b` in the units of the image, 0 to 255.
        smoothness_weight: `w2`; 0 leaves the kernel out.
        smoothness_sigma: `s_g` in pixels, or one per axis `(x, y)`.
        iterations: mean field steps; 0 gives `softmax(-U)`.
        method: how the appearance kernel is summed. `"exact"`: over all pairs, `O(N^2)`. `"lattice"`: approximately, on a
            permutohedral lattice, `O(N)`. `"auto"`: exact up to 64 x 64 pixels. The smoothness kernel is always exact.
        normalization: of the kernels: `"symmetric"`, `"before"` (`K D^-1`), `"after"` (`D^-1 K`) or `"none"`.

    Example:
        >>> crf = DenseCRF()
        >>> image = torch.randint(256, (2, 3, 20, 24))
        >>> q = crf(unary_from_probabilities(torch.rand(2, 5, 20, 24).softmax(1)), image)
        >>> q.shape, bool((q.sum(1) - 1).abs().max() < 1e-5)
        (torch.Size([2, 5, 20, 24]), True)

    Source: Krähenbühl, Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NeurIPS 2011, as
        used by Chen et al., "DeepLab", TPAMI 2018.

    Note:
        The paper searches `w1`, `s_a` and `s_b` on validation images (`search_crf` does) and fixes `w2 = 3`, `s_g = 3`; the
        defaults lie in the ranges that it searches. A pixel is its own neighbour too, as in the authors' library.
    """

    def __init__(
        self,
        appearance_weight: float = 4.0,
        position_sigma: Sigma = 50.0,
        colour_sigma: float = 5.0,
        smoothness_weight: float = 3.0,
        smoothness_sigma: Sigma = 3.0,
        iterations: int = 10,
        method: Method = "auto",
        normalization: Normalization = "symmetric",
    ) -> None:
        super().__init__()
        require_positive(colour_sigma=colour_sigma)
        self.appearance_weight = appearance_weight
        self.position_sigma = _sigmas("position_sigma", position_sigma)
        self.colour_sigma = float(colour_sigma)
        self.smoothness_weight = smoothness_weight
        self.smoothness_sigma = _sigmas("smoothness_sigma", smoothness_sigma)
        if iterations < 0:
            raise InputError(f"iterations: expected 0 or more, got {iterations}")
        require_one_of(("auto", "exact", "lattice"), method=method)
        require_one_of(("symmetric", "before", "after", "none"), normalization=normalization)
        self.iterations = iterations
        self.method = method
        self.normalization = normalization

    def forward(
        self,
        unary: Float[Tensor, "batch classes height width"],
        image: Shaped[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch classes height width"]:
        """Class probabilities.

        Args:
            unary: energies, `-log` of probabilities; see `unary_from_probabilities` and `unary_from_labels`.
            image: colours from 0 to 255, integers or floats, at the size of `unary`.

        Raises:
            InputError: where the two do not go together.
        """
        return self._at_weights(unary, image, (self.appearance_weight,))[0]

    def _at_weights(
        self,
        unary: Float[Tensor, "batch classes height width"],
        image: Shaped[Tensor, "batch 3 height width"],
        weights: Sequence[float],
    ) -> list[Float[Tensor, "batch classes height width"]]:
        """Class probabilities at each of these appearance weights; the kernels of an image are made once for all."""
        if unary.dim() != 4 or not unary.is_floating_point():
            raise InputError(f"unary: expected floats [batch, classes, height, width], got {tuple(unary.shape)}")
        if image.dim() != 4 or image.shape[0] != unary.shape[0] or image.shape[2:] != unary.shape[2:]:
            raise InputError(
                f"image: expected [{unary.shape[0]}, 3, {unary.shape[2]}, {unary.shape[3]}] to go with unary, "
                f"got {tuple(image.shape)}"
            )
        wide = torch.promote_types(unary.dtype, torch.float32)
        by_image = [self._inferred(u, i, weights) for u, i in zip(unary.to(wide), image.to(wide), strict=True)]
        if not by_image:
            return [unary for _ in weights]
        return [torch.stack(q).to(unary.dtype) for q in zip(*by_image, strict=True)]

    def refine(
        self,
        heat: Float[Tensor, "batch height width"],
        image: Shaped[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch height width"]:
        """A map from 0 to 1 (attention, relevance) with its edges moved to those of the image: two classes, on and off.

        This use is ours. Scale the map to its own range first; what is above 1/2 counts as on.
        """
        on = unary_from_probabilities(torch.stack([1 - heat, heat], 1))
        return self(on, image)[:, 1]

    def _inferred(
        self, unary: Float[Tensor, "classes h w"], image: Float[Tensor, "3 h w"], weights: Sequence[float]
    ) -> list[Tensor]:
        height, width = unary.shape[1:]
        fixed: list[tuple[float, Filter]] = []
        if self.smoothness_weight:
            fixed.append((self.smoothness_weight, SeparableKernel(height, width, self.smoothness_sigma, unary)))
        appearance: Filter | None = None
        if any(weights):
            features = pixel_features(height, width, self.position_sigma, image, self.colour_sigma)
            exact = self.method == "exact" or (self.method == "auto" and height * width <= EXACT_PIXELS)
            appearance = DenseKernel(features) if exact else PermutohedralLattice(features)
        energies = unary.flatten(1).T
        found = []
        for weight in weights:
            kernels = [(weight, appearance), *fixed] if weight and appearance is not None else fixed
            q = mean_field(energies, kernels, self.iterations, self.normalization)
            found.append(q.T.reshape(unary.shape))
        return found


class DenseKernel:
    """Exact sums `y_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j` over all pairs.

    Args:
        features: `[points, dims]`, in units of their standard deviations.

    Example:
        >>> DenseKernel(torch.zeros(4, 2))(torch.ones(4, 1)).flatten().tolist()
        [4.0, 4.0, 4.0, 4.0]

    Note:
        Up to 64 x 64 points the kernel is kept, beyond it is made again block by block at every call.
    """

    def __init__(self, features: Float[Tensor, "points dims"]) -> None:
        self.features = features.detach()
        self.kept = self._rows(self.features) if len(features) <= EXACT_PIXELS else None

    def __call__(self, values: Float[Tensor, "points channels"]) -> Float[Tensor, "points channels"]:
        if self.kept is not None:
            return self.kept @ values
        # as many rows as keep a block at the size of a kept kernel
        rows = max(1, EXACT_PIXELS**2 // len(self.features))
        return torch.cat([self._rows(part) @ values for part in self.features.split(rows)])

    def _rows(self, part: Tensor) -> Tensor:
        # differences, not the expanded square: with large positions that would lose its digits
        return torch.exp(-torch.cdist(part, self.features, compute_mode="donot_use_mm_for_euclid_dist").square() / 2)


class SeparableKernel:
    """Exact sums over a grid with a Gaussian of positions alone: rows, then columns.

    Args:
        height, width: of the grid.
        sigma: `(x, y)`, in pixels.
        like: a tensor of the precision and on the device to compute in.

    Example:
        >>> values = torch.tensor([[1.0], [0.0]])
        >>> SeparableKernel(1, 2, (1.0, 1.0), values)(values).flatten().tolist()[0]
        1.0
    """

    def __init__(self, height: int, width: int, sigma: tuple[float, float], like: Tensor) -> None:
        self.across, self.down = (_line(n, s).to(like) for n, s in zip((width, height), sigma, strict=True))

    def __call__(self, values: Float[Tensor, "points channels"]) -> Float[Tensor, "points channels"]:
        grid = values.unflatten(0, (len(self.down), len(self.across)))
        across = self.across @ grid
        return (self.down @ across.flatten(1)).view(across.shape).flatten(0, 1)


def mean_field(
    unary: Float[Tensor, "points classes"],
    kernels: Sequence[tuple[float, Filter]],
    iterations: int,
    normalization: Normalization = "symmetric",
) -> Float[Tensor, "points classes"]:
    """Mean field of a Potts model: `Q <- softmax(-U + sum_m w_m K_m Q)`, all points at once.

    Args:
        unary: `U`.
        kernels: weight and filter of each kernel; a filter maps `[points, channels]` to sums over all points.
        iterations: number of steps.
        normalization: as in `DenseCRF`.

    >>> unary = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> torch.equal(mean_field(unary, [], 5), (-unary).softmax(1))
    True
    """
    scales = [_scales(k(unary.new_ones(len(unary), 1)), normalization) for _, k in kernels]
    q = (-unary).softmax(1)
    for _ in range(iterations):
        logits = -unary
        for (weight, k), (before, after) in zip(kernels, scales, strict=True):
            logits = logits + weight * after * k(before * q)
        q = logits.softmax(1)
    return q


def pixel_features(
    height: int,
    width: int,
    position_sigma: tuple[float, float],
    image: Float[Tensor, "3 height width"] | None = None,
    colour_sigma: float = 1.0,
) -> Float[Tensor, "points dims"]:
    """`(x / s_x, y / s_y)` of each pixel, row by row, and its colours over their sigma where an image is given.

    >>> pixel_features(1, 3, (2.0, 1.0)).tolist()
    [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]]
    """
    like = torch.empty(0) if image is None else image
    x = torch.arange(width, device=like.device, dtype=like.dtype) / position_sigma[0]
    y = torch.arange(height, device=like.device, dtype=like.dtype) / position_sigma[1]
    places = torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width)])
    planes = places if image is None else torch.cat([places, image / colour_sigma])
    return planes.flatten(1).T.contiguous()


def unary_from_probabilities(
    probabilities: Float[Tensor, "batch classes height width"], least: float = LEAST_PROBABILITY
) -> Float[Tensor, "batch classes height width"]:
    """`-log` of probabilities, which are first clipped to `[least, 1]`.

    Args:
        probabilities: `[batch, classes, height, width]`, of each pixel.
        least: what a probability of 0 is taken for.

    >>> unary_from_probabilities(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)).flatten().tolist()[1] > 11
    True
    """
    return -probabilities.clamp(least, 1).log()


def unary_from_labels(
    labels: Int[Tensor, "batch height width"] | UInt8[Tensor, "batch height width"], classes: int, confidence: float
) -> Float[Tensor, "batch classes height width"]:
    """Energies of hard labels that are right with probability `confidence`: the rest is shared by the other classes.

    Args:
        labels: 0 to `classes - 1`; a label outside of that says nothing about its pixel.
        classes: at least 2.
        confidence: between 0 and 1, both left out.

    >>> unary_from_labels(torch.tensor([[[1]]]), 3, 0.5).exp().round().flatten().tolist()
    [4.0, 2.0, 4.0]
    """
    if classes < 2 or not 0 < confidence < 1:
        raise InputError(
            f"classes, confidence: expected at least 2 classes and a confidence between 0 and 1, "
            f"got {classes} and {confidence}"
        )
    labels = labels.long()
    known = (labels >= 0) & (labels < classes)
    own = F.one_hot(labels.where(known, torch.zeros_like(labels)), classes).movedim(-1, 1).bool()
    p = torch.where(own, confidence, (1 - confidence) / (classes - 1))
    return -torch.where(known.unsqueeze(1), p, 1 / classes).log()


class Searched(NamedTuple):
    """What `search_crf` found.

    Attributes:
        crf: with the best parameters.
        score: its pixel accuracy.
        tried: `(appearance_weight, position_sigma, colour_sigma) -> score` of all.
    """

    crf: DenseCRF
    score: float
    tried: dict[tuple[float, float, float], float]


def search_crf(
    unary: Float[Tensor, "batch classes height width"],
    image: Shaped[Tensor, "batch 3 height width"],
    labels: Int[Tensor, "batch height width"],
    appearance_weights: Sequence[float] = (3.0, 4.0, 5.0, 6.0),
    position_sigmas: Sequence[float] = (30.0, 50.0, 70.0, 100.0),
    colour_sigmas: Sequence[float] = (3.0, 4.0, 5.0, 6.0),
    ignore: int = 255,
    **settings: object,
) -> Searched:
    """The paper's search: `w1`, `s_a` and `s_b` by pixel accuracy on a few labelled images, all else fixed.

    Args:
        unary, image: as `DenseCRF` takes them.
        labels: the truth.
        appearance_weights, position_sigmas, colour_sigmas: what is tried; default the paper's ranges.
        ignore: a label that does not count.
        settings: of `DenseCRF`.

    Source: Chen et al., "DeepLab", TPAMI 2018.

    >>> images, labels = torch.zeros(1, 3, 6, 6), torch.zeros(1, 6, 6).long()
    >>> found = search_crf(torch.rand(1, 2, 6, 6), images, labels, (3.0,), (5.0,), (4.0, 5.0))
    >>> len(found.tried), found.score == max(found.tried.values())
    (2, True)
    """
    counts = labels != ignore
    if not bool(counts.any()):
        raise InputError("labels: expected at least one pixel whose label counts")
    triples = itertools.product(appearance_weights, position_sigmas, colour_sigmas)
    tried = dict.fromkeys(triples, 0.0)
    if not tried:
        raise InputError("appearance_weights, position_sigmas, colour_sigmas: expected at least one of each to try")
    for sigmas in itertools.product(position_sigmas, colour_sigmas):
        crf = DenseCRF(appearance_weights[0], *sigmas, **settings)  # type: ignore[arg-type]
        with torch.no_grad():
            guesses = [q.argmax(1) for q in crf._at_weights(unary, image, appearance_weights)]
        for weight, guess in zip(appearance_weights, guesses, strict=True):
            tried[weight, *sigmas] = float((guess == labels)[counts].double().mean())
    best = max(tried, key=tried.__getitem__)
    return Searched(DenseCRF(*best, **settings), tried[best], tried)  # type: ignore[arg-type]


def _scales(mass: Tensor, normalization: Normalization) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(mass)
    inverse = 1 / (mass + 1e-20)
    return {
        "symmetric": (inverse.sqrt(), inverse.sqrt()),
        "before": (inverse, one),
        "after": (one, inverse),
        "none": (one, one),
    }[normalization]


def _line(length: int, sigma: float) -> Tensor:
    at = torch.arange(length, dtype=torch.float64) / sigma
    return torch.exp(-(at.unsqueeze(1) - at).square() / 2)


def _sigmas(name: str, sigma: Sigma) -> tuple[float, float]:
    x, y = per_axis(name, sigma, 2, lambda s: math.isfinite(s) and s > 0, "a positive number")
    return float(x), float(y)
