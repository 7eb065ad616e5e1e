"""The fully connected CRF on an image of 375 x 500 pixels, the size of PASCAL VOC's, with 21 classes and 10 steps.

The appearance kernel ties every pixel to every other: summed over all pairs it takes time and memory with the square of the
pixels, on the permutohedral lattice linearly. Both are timed where both are feasible; at 375 x 500 the lattice beside the CRF
that has the smoothness kernel alone. Results are compared before: the lattice is an approximation, so that at least 99 % of the
pixels must get the same class.

    python -m benchmarks.dense_crf [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.timing import Pair, run
from torch import Tensor

from cenote.pool import DenseCRF
from cenote.pool.spatial.deeplab.dense_crf import unary_from_probabilities

CLASSES, STEPS, SIGMA = 21, 10, 50.0
SAME = 0.99


def scene(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image of flat patches with noise, and blurred noisy energies of the class of each patch."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(CLASSES, (1, 1, -(-height // 25), -(-width // 25)), generator=generator)
    labels = patches.repeat_interleave(25, 2).repeat_interleave(25, 3)[0, 0, :height, :width]
    colours = torch.randint(256, (CLASSES, 3), generator=generator).float()
    image = colours[labels].movedim(2, 0) + 5 * torch.randn(3, height, width, generator=generator)
    sure = torch.nn.functional.one_hot(labels, CLASSES).movedim(2, 0).float().unsqueeze(0)
    blurred = torch.nn.functional.avg_pool2d(sure, 9, 1, 4, count_include_pad=False)
    noisy = 4 * blurred + torch.randn(blurred.shape, generator=generator)
    return unary_from_probabilities(noisy.softmax(1)), image.clamp(0, 255).round().unsqueeze(0)


def require_alike(ours: Tensor, theirs: Tensor) -> None:
    """Stop unless nearly all pixels get the same class.

    Raises:
        AssertionError: naming the share.
    """
    share = float((ours.argmax(1) == theirs.argmax(1)).double().mean())
    if share < SAME:
        raise AssertionError(f"only {share:.1%} of the pixels get the same class")


def crf(method: str = "auto", appearance: float = 4.0) -> DenseCRF:
    return DenseCRF(appearance, SIGMA, iterations=STEPS, method=method)  # type: ignore[arg-type]


def pairs() -> Iterator[Pair]:
    lattice, exact = crf("lattice"), crf("exact")
    with torch.no_grad():
        for height, width in ((64, 64), (72, 96)):
            unary, image = scene(height, width)
            require_alike(lattice(unary, image), exact(unary, image))
            yield Pair(
                f"CRF of {height} x {width} pixels, {CLASSES} classes, {STEPS} steps",
                "DenseCRF, lattice",
                lambda unary=unary, image=image: lattice(unary, image),
                "all pairs",
                lambda unary=unary, image=image: exact(unary, image),
                memory=True,
            )
        unary, image = scene(375, 500)
        smooth = crf(appearance=0.0)
        yield Pair(
            f"CRF of 375 x 500 pixels, {CLASSES} classes, {STEPS} steps",
            "DenseCRF, lattice",
            lambda: lattice(unary, image),
            "the smoothness kernel alone",
            lambda: smooth(unary, image),
            memory=True,
        )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.dense_crf", rounds=3)
