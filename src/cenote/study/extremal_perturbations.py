"""Masks of a given area that keep a class's score highest point at the digit that a network was told to read more often than
its input gradient does, and keep more of its probability than the gradient's mask of equal area; and it is the ranked area that
makes them masks of nothing but 0 and 1.

Refuted if they point there no more often, if they keep no more, or if they are as grey under a mean in the area's place.

A canvas of 16 x 32 pixels holds two digits of 8 x 8 at random places, one of them underlined, which a small convolutional
network is trained to name. Masks of a tenth and of a quarter of the pixels, 150 iterations; masks are cut at one half before
they are judged, and other maps give masks of the same area.

Knocked out: the model (masks are made for the same network with random weights), what is particular to an image (the mean of
other images' masks), and, for grey, the ranks (the squared difference of the mean to the area).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.explain.extremal_perturbations.optimise import extremal_masks
from cenote.explain.extremal_perturbations.pointing import kept_probability, points_at, summed, top_area
from cenote.explain.extremal_perturbations.rivals import gradient_map, random_map
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import Digits, digits
from cenote.study.harness.training import descend

HEIGHT, ACROSS, SIDE = 16, 32, 8
CLASSES = 10
CHANNELS = 32
BATCH = 64
LEARNING_RATE = 3e-3
AREAS = (0.1, 0.25)
JUDGED = 1
"""Which area's mask is cut and judged by what it keeps."""
STEP, SIGMA = 2, 4
BLUR = 4.0
GREY = (0.1, 0.9)
ACCURACY = 0.9
TESTED = 500
TRAINING: dict[Size, int] = {"smoke": 2, "small": 400, "full": 1500}
ITERATIONS: dict[Size, int] = {"smoke": 3, "small": 150, "full": 300}
IMAGES: dict[Size, int] = {"smoke": 2, "small": 4, "full": 50}

MASK, GRADIENT, REDRAWN, OTHERS, MEAN_AREA, RANDOM = (
    "extremal mask",
    "gradient",
    "extremal mask, random weights",
    "mean mask of other images",
    "extremal mask, mean area",
    "random mask",
)


class Canvases(NamedTuple):
    """Two digits, the underlined one's class, and where it is with its line."""

    x: Float[Tensor, "items 1 16 32"]
    y: Int[Tensor, "items"]
    place: Bool[Tensor, "items 16 32"]


@study
def run(seed: int, size: Size) -> Findings:
    """Train a network per seed; find masks of its test canvases and judge them."""
    seeds = seeds_of(seed, size)
    found = [_measured(s, size) for s in seeds]
    pointing, kept, grey = Arms(), Arms(), Arms()
    for name in (MASK, GRADIENT, REDRAWN, OTHERS, RANDOM):
        pointing[name] = tuple(m.pointing[name] for m in found)
        kept[name] = tuple(m.kept[name] for m in found)
    for name in (MASK, MEAN_AREA):
        grey[name] = tuple(m.grey[name] for m in found)
    accurate = above("accuracy on test canvases", [m.accuracy for m in found], ACCURACY)
    losses = [m.losses for m in found]

    def points(arm: str) -> tuple[Check, ...]:
        return (
            above(f"pointing, {arm} minus {GRADIENT}", pointing.minus(arm, GRADIENT), expected=0.0),
            above(f"kept probability, {arm} minus {GRADIENT}", kept.minus(arm, GRADIENT), expected=0.0),
        )

    def clear(arm: str) -> tuple[Check, ...]:
        return (above(f"share of grey pixels, {MEAN_AREA} minus {arm}", grey.minus(MEAN_AREA, arm), expected=0.0),)

    return Findings(
        seeds=seeds,
        parts=(
            Part(points, MASK, knocked_out=(REDRAWN, OTHERS), against=(GRADIENT,)),
            Part(clear, MASK, knocked_out=(MEAN_AREA,)),
        ),
        gates=(
            *(gate(name, accurate, losses) for name in (MASK, GRADIENT, MEAN_AREA)),
            *(gate(name, None, None) for name in (REDRAWN, OTHERS)),
        ),
        checks=(
            above(f"kept probability, {MASK} minus {RANDOM}", kept.minus(MASK, RANDOM), 0.0, in_rule=False),
            above(f"pointing, {RANDOM} minus {REDRAWN}", pointing.minus(RANDOM, REDRAWN), 0.0, in_rule=False),
        ),
        table=pointing.table("pointing") + kept.table("kept probability") + grey.table("share of grey pixels"),
        figure=partial(_draw, arms=kept),
        notes=(
            f"{IMAGES[size]} images per seed. The seeds differ in initialisation and in what the canvases hold.",
            "Of the two tasks of the plan this is the moving one: where the target always stands at the left, a map that knows "
            "nothing points right.",
        ),
    )


class Measured(NamedTuple):
    """Of one seed, by arm."""

    pointing: dict[str, float]
    kept: dict[str, float]
    grey: dict[str, float]
    accuracy: float
    losses: list[float]


def canvases(source: Digits, items: int, generator: torch.Generator) -> Canvases:
    """Two digits at random places, one in either half, the target in either of them.

    >>> made = canvases(digits("test"), 3, torch.Generator().manual_seed(0))
    >>> made.x.shape, made.place.sum((1, 2)).tolist()
    (torch.Size([3, 1, 16, 32]), [72, 72, 72])
    """
    chosen = torch.randint(len(source.y), (2, items), generator=generator)
    top = torch.randint(HEIGHT - SIDE, (2, items), generator=generator)
    left = torch.randint(ACROSS // 2 - SIDE + 1, (2, items), generator=generator)
    swapped = torch.randint(2, (items,), generator=generator)
    left = left + torch.stack([swapped, 1 - swapped]) * (ACROSS // 2)
    x, place = torch.zeros(items, 1, HEIGHT, ACROSS), torch.zeros(items, HEIGHT, ACROSS, dtype=torch.bool)
    for n in range(items):
        for digit in range(2):
            t, le = int(top[digit, n]), int(left[digit, n])
            x[n, 0, t : t + SIDE, le : le + SIDE] = source.x[chosen[digit, n]].view(SIDE, SIDE)
        t, le = int(top[0, n]), int(left[0, n])
        x[n, 0, t + SIDE, le : le + SIDE] = 1
        place[n, t : t + SIDE + 1, le : le + SIDE] = True
    return Canvases(x, source.y[chosen[0]], place)


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 5, padding=2), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2 * CHANNELS, CLASSES),
    )  # fmt: skip


def _measured(seed: int, size: Size) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, redrawn = _network(), _network().eval()

    def loss() -> Tensor:
        batch = canvases(digits("train"), BATCH, generator)
        return F.cross_entropy(model(batch.x), batch.y)

    steps = TRAINING[size]
    losses = descend(model.parameters(), (loss() for _ in range(steps)), steps, LEARNING_RATE)
    model.eval()
    test = canvases(digits("test"), TESTED, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        right = model(test.x).argmax(1) == test.y
    chosen = right.nonzero()[:, 0][: IMAGES[size]].tolist() or [0, 1]
    masks = {
        name: torch.stack([_masks(of, test, n, term, size) for n in chosen])
        for name, of, term in ((MASK, model, "ranked"), (REDRAWN, redrawn, "ranked"), (MEAN_AREA, model, "mean"))
    }
    total = masks[MASK].sum(0)
    masks[OTHERS] = (total - masks[MASK]) / max(1, len(chosen) - 1)
    pointing: dict[str, list[float]] = {}
    kept: dict[str, list[float]] = {}
    for i, n in enumerate(chosen):
        image, target = test.x[n], int(test.y[n])
        cut = (masks[MASK][i, JUDGED, 0] > 0.5).float()
        area = max(float(cut.mean()), 1 / cut.numel())
        maps = {name: summed(masks[name][i]) for name in (MASK, REDRAWN, OTHERS)}
        maps |= {GRADIENT: gradient_map(model, image, target), RANDOM: random_map(model, image, target, seed=n)}
        own = {name: top_area(masks[name][i, JUDGED, 0], area) for name in (MASK, REDRAWN, OTHERS)}
        own |= {name: top_area(maps[name], area) for name in (GRADIENT, RANDOM)}
        for name, scores in maps.items():
            pointing.setdefault(name, []).append(float(points_at(scores, test.place[n])))
            value = kept_probability(model, image, target, own[name][None], blur=BLUR)
            kept.setdefault(name, []).append(float(value[0]))
    low, high = GREY
    grey = {name: float(((masks[name] > low) & (masks[name] < high)).float().mean()) for name in (MASK, MEAN_AREA)}
    means = [{name: float(np.mean(values)) for name, values in held.items()} for held in (pointing, kept)]
    return Measured(means[0], means[1], grey, float(right.double().mean()), losses)


def _masks(model: nn.Module, test: Canvases, n: int, term: Any, size: Size) -> Float[Tensor, "areas 1 16 32"]:
    return extremal_masks(
        model,
        test.x[n],
        int(test.y[n]),
        AREAS,
        iterations=ITERATIONS[size],
        step=STEP,
        sigma=SIGMA,
        blur=BLUR,
        jitter=False,
        area_term=term,
    ).masks


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "probability of the class with only the mask kept")
