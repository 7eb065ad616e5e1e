"""Where an image holds two copies of its class, the mask of a selector that is trained against a detector covers the worse
covered of the two better than that of the same selector and predictor without a detector (by more than 5 points, both maps
cut to the number of true pixels), and the predictor is right as often, to 2 points.

Refuted if the worse covered copy is covered no better, or if 2 points of accuracy are lost.

An image of 24 x 24 pixels has two different handwritten digits of 8 x 8 of one class, of four, one in its left and one in
its right half, and strokes that mean nothing. All networks are small and convolutional, the bound on the mask's area is the
same.

Knocked out: what the detector knows (trained as long on shuffled labels; net, term, weights and area as before).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.explain.comprehensive_attribution.measures import covered, grad_cam
from cenote.explain.comprehensive_attribution.model import Comet, SmallClassifier, SmallSelector, top_pixels
from cenote.explain.comprehensive_attribution.training import LossWeights, accuracy_of, train_comet
from cenote.explain.fitting import fit
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import digits

SEEDS = {"small": 3, "full": 5}
CLASSES = (0, 1, 4, 7)
SIDE = 24
INK = 0.3
STROKES = 4
TRAIN = 600
TEST = 300
WIDTH = 12
BATCH = 50
LEARNING_RATE = 3e-3
AREA = 0.15
WEIGHT = 4.0
AREA_WEIGHT = 20.0
GAP = 2.0
ABLE = 0.9
BLACK_BOX_EPOCHS: dict[Size, int] = {"smoke": 1, "small": 20, "full": 20}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 25, "full": 50}

COMET, PLAIN, IGNORANT, CAM = "detector", "no detector", "detector of shuffled labels", "Grad-CAM of a black box"


class Scenes(NamedTuple):
    """Images, classes, and the ink of the left and of the right digit."""

    x: Float[Tensor, "items 1 side side"]
    y: Int[Tensor, "items"]
    copies: Bool[Tensor, "items 2 side side"]


@study
def run(seed: int, size: Size) -> Findings:
    """Train selector and predictor with a detector, with none and with an ignorant one; cut all maps to the same area."""
    seeds = seeds_of(seed, size, **SEEDS)
    worse, both, right, left = Arms(), Arms(), Arms(), Arms()
    losses: dict[str, list[tuple[float, ...]]] = {arm: [] for arm in (COMET, PLAIN, IGNORANT)}
    by_seed = [_measured(s, size) for s in seeds]
    for arm in (COMET, PLAIN, IGNORANT, CAM):
        for arms, column in ((worse, 0), (both, 1), (right, 2), (left, 3)):
            arms[arm] = tuple(found[arm][column] for found, _, _ in by_seed)
    for arm, curves in losses.items():
        curves += [of[arm] for _, of, _ in by_seed]
    able = [a for _, _, a in by_seed]

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"recall of the worse covered copy, {arm} minus {PLAIN}", worse.minus(arm, PLAIN), 0.05, 0.0),
            above(f"accuracy, {arm} minus {PLAIN}", right.minus(arm, PLAIN), -0.02),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, COMET, knocked_out=(IGNORANT,), against=(PLAIN,)),),
        gates=(
            *(gate(arm, above("accuracy of the black box", able, ABLE), losses[arm]) for arm in (COMET, PLAIN)),
            gate(IGNORANT, None, losses[IGNORANT]),
        ),
        checks=(
            above(f"recall of both copies, {COMET} minus {PLAIN}", both.minus(COMET, PLAIN), 0.0, in_rule=False),
            above(
                f"recall of the worse covered copy, {COMET} minus {CAM}", worse.minus(COMET, CAM), 0.0, in_rule=False
            ),
            above(f"accuracy on what is left, {PLAIN} minus {COMET}", left.minus(PLAIN, COMET), 0.0, in_rule=False),
        ),
        table=worse.table("recall of the worse covered copy")
        + both.table("recall of both copies")
        + right.table("accuracy of the predictor on masked images")
        + left.table("accuracy of the detector on what is left"),
        figure=partial(_draw, worse=worse, left=left),
        notes=(
            "The seeds differ in scenes, initialisation and order of training; digits of training and of test are apart.",
            "What is left is judged by the detector that knows the classes, in every arm.",
        ),
    )


def scenes(items: int, split: str, generator: torch.Generator) -> Scenes:
    """Images of two digits of one class each, and strokes.

    >>> made = scenes(3, "test", torch.Generator().manual_seed(0))
    >>> made.x.shape, made.copies.flatten(2).any(2).all().item()
    (torch.Size([3, 1, 24, 24]), True)
    """
    source = digits(split)
    y = torch.randint(len(CLASSES), (items,), generator=generator)
    x, copies = torch.zeros(items, 1, SIDE, SIDE), torch.zeros(items, 2, SIDE, SIDE, dtype=torch.bool)
    of_class = [(source.y == c).nonzero()[:, 0] for c in CLASSES]
    for n in range(items):
        for _ in range(STROKES):
            row, column = (int(torch.randint(SIDE - 5, (), generator=generator)) for _ in range(2))
            step = torch.arange(5)
            down, across = (int(torch.randint(2, (), generator=generator)) for _ in range(2))
            x[n, 0, row + down * step, column + across * step] = 0.7
        numbers = of_class[int(y[n])]
        pair = numbers[torch.randperm(len(numbers), generator=generator)[:2]]
        for half, digit in enumerate(pair.tolist()):
            row = int(torch.randint(SIDE - 8 + 1, (), generator=generator))
            column = 12 * half + int(torch.randint(5, (), generator=generator))
            at = (slice(row, row + 8), slice(column, column + 8))
            glyph = source.x[digit].view(8, 8)
            x[n, 0][at] = torch.maximum(x[n, 0][at], glyph)
            copies[n, half][at] = glyph > INK
    return Scenes(x, y, copies)


def _measured(
    seed: int, size: Size
) -> tuple[dict[str, tuple[float, float, float, float]], dict[str, tuple[float, ...]], float]:
    """Of each arm recall of the worse copy and of both, accuracy, and on what is left; losses; that of the black box."""
    generator = torch.Generator().manual_seed(seed)
    train, test = scenes(TRAIN, "train", generator), scenes(TEST, "test", generator)
    knows = _classifier(train.x, train.y, seed, size)
    ignores = _classifier(train.x, train.y[torch.randperm(TRAIN, generator=generator)], seed, size)
    found, losses = {}, {}
    for arm, detector, weight in ((COMET, knows, WEIGHT), (PLAIN, knows, 0.0), (IGNORANT, ignores, WEIGHT)):
        torch.manual_seed(seed)
        comet = Comet(SmallSelector(1, WIDTH), SmallClassifier(1, len(CLASSES), WIDTH), detector)
        terms = LossWeights(a=weight, b=AREA_WEIGHT, area=AREA, gap=GAP)
        played = train_comet(
            comet,
            train.x,
            train.y,
            terms,
            epochs=EPOCHS[size],
            batch=BATCH,
            lr=LEARNING_RATE,
            milestones=(),
            random_state=seed,
        )
        with torch.no_grad():
            judged = comet(test.x)
            left = knows(comet.masked(test.x, judged.mask).left)
        recalls = _recalls(judged.mask[:, 0], test)
        right = float((judged.logits.argmax(1) == test.y).double().mean())
        found[arm] = (*recalls, right, float((left.argmax(1) == test.y).double().mean()))
        losses[arm] = played.predictor
    cam = grad_cam(knows, knows.features, test.x)
    able = accuracy_of(knows, test.x, test.y)
    found[CAM] = (*_recalls(cam, test), able, able)
    return found, losses, able


def _classifier(x: Tensor, y: Tensor, seed: int, size: Size) -> SmallClassifier:
    torch.manual_seed(seed + 1)
    model = SmallClassifier(1, len(CLASSES), WIDTH)
    fit(
        model,
        len(y),
        lambda chosen: F.cross_entropy(model(x[chosen]), y[chosen]),
        epochs=BLACK_BOX_EPOCHS[size],
        batch=BATCH,
        lr=LEARNING_RATE,
        random_state=seed,
    )
    return model


def _recalls(maps: Float[Tensor, "items side side"], test: Scenes) -> tuple[float, float]:
    """At the number of true pixels: of the worse covered copy of each image, and of both together."""
    truth = test.copies.any(1)
    chosen = torch.cat([top_pixels(m[None], int(t.sum())) for m, t in zip(maps, truth, strict=True)])
    of_copies = (chosen[:, None] & test.copies).flatten(2).sum(2) / test.copies.flatten(2).sum(2)
    return float(of_copies.amin(1).mean()), float(covered(maps, truth).coverage.mean())


def _draw(figure: Any, worse: Arms, left: Arms) -> None:
    one, other = figure.subplots(1, 2)
    draw_arms(one, worse, "recall of the worse covered copy")
    draw_arms(other, left, "accuracy of the detector on what is left")
