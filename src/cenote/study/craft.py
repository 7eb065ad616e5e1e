"""Taking away concepts in the order of their Sobol importance lowers a class's score faster than at random, and faster than in
the order of how much of each there is; and of planted concepts the factoring finds all, the importance those that the model
uses.

Refuted if the area under the curve of deletion is no smaller than that of random orders or of mean coefficients, if a planted
direction is found with a cosine of 0.95 or less, or if a concept has an index of 0.1 or less where the model uses it, or of 0.1
or more where it does not.

A small convolutional network names digits of 16 x 16 pixels (8 x 8, made larger); concepts are learned for each class from
crops of training images that it gives this class, and deleted from test images. Planted: five directions, of which a model
reads two.

Knocked out: the model's responses (the scores are permuted over the masks, so that the index does not see how the model
reacts), and, for what is planted, the factoring (activations of random items are the directions).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.explain import Concepts, Craft
from cenote.explain.craft import orders
from cenote.explain.craft.dictionary import dictionary
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import digits
from cenote.study.harness.training import descend, shuffled

SIDE = 16
CHANNELS = 32
CLASSES = 10
BATCH = 50
LEARNING_RATE = 3e-3
CONCEPTS = 6
PATCH = 8
POINTS = 16
DRAWS = 20
IMAGES = 20
ACCURACY = 0.9
PLANTED, WIDTH, ROWS = 5, 24, 400
USED = (0, 3)
PRESENT = 0.4
FOUND = 0.95
INDEX = 0.1
PASSES: dict[Size, int] = {"smoke": 1, "small": 40, "full": 80}
LAYERS = 3

SOBOL, SHUFFLED, AMOUNT, RANDOM, GRADIENT, TCAV = (
    "Sobol order",
    "Sobol order, responses shuffled",
    "order of mean coefficients",
    "random orders",
    "gradient order",
    "TCAV order",
)
FACTORED, ITEMS = "factored directions", "random items as directions"


@study
def run(seed: int, size: Size) -> Findings:
    """Train a network per seed, learn concepts of every class, delete them in all orders; plant others and look for them."""
    seeds = seeds_of(seed, size)
    measured = [_measured(s, size) for s in seeds]
    area = Arms({name: tuple(m.area[name] for m in measured) for name in measured[0].area})
    cosine, used, unused = Arms(), Arms(), Arms()
    for name in (FACTORED, ITEMS):
        planted = [_planted(s, name == FACTORED) for s in seeds]
        for arms, values in zip((cosine, used, unused), zip(*planted, strict=True), strict=True):
            arms[name] = values

    def deletes(arm: str) -> tuple[Check, ...]:
        return (
            above(f"area under deletion, {RANDOM} minus {arm}", area.minus(RANDOM, arm), expected=0.0),
            above(f"area under deletion, {AMOUNT} minus {arm}", area.minus(AMOUNT, arm), expected=0.0),
        )

    def finds(arm: str) -> tuple[Check, ...]:
        return (
            above(f"smallest cosine with a planted direction, {arm}", cosine[arm], expected=FOUND),
            above(f"smallest index of a concept that is used, {arm}", used[arm], expected=INDEX),
            below(f"largest index of one that is not, {arm}", unused[arm], expected=INDEX),
        )

    accurate = above("accuracy on test digits", [m.accuracy for m in measured], ACCURACY)
    losses = [m.losses for m in measured]
    return Findings(
        seeds=seeds,
        parts=(
            Part(deletes, SOBOL, knocked_out=(SHUFFLED,), against=(RANDOM, AMOUNT)),
            Part(finds, FACTORED, knocked_out=(ITEMS,)),
        ),
        gates=(
            *(gate(name, accurate, losses) for name in (SOBOL, SHUFFLED, RANDOM, AMOUNT)),
            gate(FACTORED, above("smallest cosine with a planted direction", cosine[FACTORED], 0.0), None),
            gate(ITEMS, None, None),
        ),
        checks=tuple(
            above(f"area under deletion, {other} minus {SOBOL}", area.minus(other, SOBOL), 0.0, in_rule=False)
            for other in (GRADIENT, TCAV)
        ),
        table=[
            *area.table("area under deletion"),
            *cosine.table("smallest planted cosine"),
            *used.table("smallest index, used"),
            *unused.table("largest index, unused"),
        ],
        figure=partial(_draw, arms=area),
        notes=(
            f"The area is the mean of a class's score as {CONCEPTS} concepts go, over {IMAGES} test images and the classes.",
            "The seeds differ in initialisation and order of training, in the random orders, and in what is planted.",
        ),
    )


class Measured(NamedTuple):
    """Of one seed: the area under deletion of each order, and the network's training."""

    area: dict[str, float]
    accuracy: float
    losses: list[float]


def _measured(seed: int, size: Size) -> Measured:
    train, test = digits("train"), digits("test")
    images = [F.interpolate(d.x.view(-1, 1, 8, 8), (SIDE, SIDE), mode="bilinear") for d in (train, test)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES),
        )  # fmt: skip
    batches = list(shuffled(len(train.y), BATCH, PASSES[size], torch.Generator().manual_seed(seed)))
    losses = descend(
        model.parameters(),
        (F.cross_entropy(model(images[0][b]), train.y[b]) for b in batches),
        len(batches),
        LEARNING_RATE,
    )
    model.eval()
    with torch.no_grad():
        given, tested = (model(x).argmax(1) for x in images)
    areas: dict[str, list[float]] = {}
    for target in range(2 if size == "smoke" else CLASSES):
        own = images[0][given == target]
        shown = images[1][test.y == target][:IMAGES]
        if len(own) < CONCEPTS:  # of a network that hardly learned, as in a smoke test
            own = images[0][train.y == target]
        concepts = Craft(model[:6], model[6:], CONCEPTS, PATCH, seed=seed).fit(own)
        for name, area in _areas(concepts, shown, target, seed).items():
            areas.setdefault(name, []).append(area)
    means = {name: float(np.mean(values)) for name, values in areas.items()}
    return Measured(means, float((tested == test.y).double().mean()), losses)


def _areas(concepts: Concepts, images: Tensor, target: int, seed: int) -> dict[str, float]:
    """The mean of the curve of deletion in each order, of one class."""

    u = concepts.transform(images)

    def area(ranking: Tensor) -> float:
        order = ranking.argsort(descending=True).tolist()
        return float(concepts.deletion(u, target, order, given="coefficients").mean())

    rankings = {
        SOBOL: concepts.importance(u, target, POINTS, given="coefficients").mean(0),
        SHUFFLED: concepts.importance(u, target, POINTS, given="coefficients", shuffled=True, seed=seed).mean(0),
        AMOUNT: orders.mean_coefficients(concepts, u, "coefficients"),
        GRADIENT: orders.gradients(concepts, u, target, "coefficients"),
        TCAV: orders.tcav(concepts, u, target, "coefficients"),
    }
    found = {name: area(ranking) for name, ranking in rankings.items()}
    drawn = [area(orders.at_random(concepts, DRAWS * seed + n)) for n in range(DRAWS)]
    return found | {RANDOM: float(np.mean(drawn))}


def _planted(seed: int, factored: bool) -> tuple[float, float, float]:
    """The smallest cosine with a planted direction, the smallest index of a concept that is used, the largest of another."""
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(seed)
    w = 0.02 * torch.rand(PLANTED, WIDTH, generator=generator)
    share = WIDTH // PLANTED
    for k in range(PLANTED):
        w[k, k * share : (k + 1) * share] += 1
    there = torch.rand(ROWS, PLANTED, generator=generator) < PRESENT
    u: Float[Tensor, "rows planted"] = torch.rand(ROWS, PLANTED, generator=generator) * there
    a = u @ w
    chosen = torch.randperm(ROWS, generator=generator)[:PLANTED]
    directions = dictionary(a, PLANTED, seed=seed)[1] if factored else a[chosen]
    cosines = F.cosine_similarity(w[:, None], directions[None], dim=-1)
    _, matched = linear_sum_assignment(-cosines.numpy())
    reader = torch.linalg.pinv(w).T[list(USED)].sum(0)
    concepts = Concepts(
        torch.zeros(1, 1, 1, 1), torch.zeros(1, PLANTED), directions, 1, None, lambda x: (x @ reader).relu()[:, None]
    )
    index = concepts.importance(a[:40], 0, 64, given="activations").mean(0)[torch.as_tensor(matched)]
    reads = torch.zeros(PLANTED, dtype=torch.bool)
    reads[list(USED)] = True
    smallest = float(cosines[torch.arange(PLANTED), torch.as_tensor(matched)].min())
    return smallest, float(index[reads].min()), float(index[~reads].max())


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "area under the curve of deletion (smaller is faster)")
