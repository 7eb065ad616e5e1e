"""Of two images that are alike by their left halves, the map of the pair lies on the left half: more of its positive mass
does than half, more than of the norms of the features, and taking places away in its order lowers the pair's cosine faster than
in theirs.

Refuted if at most half of the mass lies there, if no more than of the norms, if removal in the map's order is no faster, or if
the map of a network trained on the right half does not lie on the right.

Images are two digits of 8 x 8 side by side. A small convolutional network, which is told the column of each pixel, embeds them
by the mean of its last map and is trained by a cosine classifier to tell the left digit (or the right one). Pairs are test
images that share it. Only the map differs between arms.

Knocked out: the partner (the map is computed against an image with another left digit, and judged on the true pair).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.explain.deep_similarity.explainer import DeepSimilarity
from cenote.explain.deep_similarity.faithful import mass_in, removal_curve
from cenote.explain.deep_similarity.maps import Terms, norm_map, pair_map
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import Digits, digits
from cenote.study.harness.training import descend

SIDE = 8
CHANNELS = 32
CLASSES = 10
BATCH = 64
LEARNING_RATE = 3e-3
SHARPNESS = 10.0
PAIRS = 400
HALF = 0.5
RETRIEVED = 0.8
STEPS: dict[Size, int] = {"smoke": 3, "small": 500, "full": 3000}

MAP, NORM, SWAPPED, RIGHT, UNTRAINED = (
    "map of the pair",
    "norms of the features",
    "map against another partner",
    "trained on the right half",
    "untrained network",
)


class Canvases(NamedTuple):
    """Pairs of digits side by side, with the column of each pixel as a second channel."""

    x: Float[Tensor, "items 2 8 16"]
    left: Int[Tensor, "items"]
    right: Int[Tensor, "items"]


class Network(nn.Module):
    """Three convolutions, their mean, and a cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, CHANNELS, 3, padding=1), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.classes = nn.Parameter(torch.randn(CLASSES, CHANNELS))

    def forward(self, x: Float[Tensor, "items 2 8 16"]) -> Float[Tensor, "items classes"]:
        """Cosines with the classes, sharpened."""
        return SHARPNESS * F.normalize(self.body(x).mean((2, 3)), dim=1) @ F.normalize(self.classes, dim=1).T


@study
def run(seed: int, size: Size) -> Findings:
    """Train a network per seed and half; look at maps of pairs that share it."""
    seeds = seeds_of(seed, size)
    mass, cosine, found, losses = Arms(), Arms(), Arms(), {}
    by_seed = [_measured(s, STEPS[size]) for s in seeds]
    for name in (MAP, NORM, SWAPPED, RIGHT, UNTRAINED):
        mass[name] = tuple(m.mass[name] for m in by_seed)
    for name in (MAP, NORM, SWAPPED, "random order"):
        cosine[name] = tuple(m.cosine[name] for m in by_seed)
    for name in (MAP, RIGHT):
        found[name] = tuple(m.precision[name] for m in by_seed)
        losses[name] = [m.losses[name] for m in by_seed]

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"positive mass on the left half, {arm}", mass[arm], expected=HALF),
            above(f"positive mass on the left half, {arm} minus {NORM}", mass.minus(arm, NORM), expected=0.0),
            above(f"mean cosine in removal, {NORM} minus {arm}", cosine.minus(NORM, arm), expected=0.0),
            above(f"positive mass on the right half, {RIGHT}", [1 - m for m in mass[RIGHT]], expected=HALF),
        )

    retrieval = above("share of nearest images with the same left digit", found[MAP], RETRIEVED)
    mirrored = above("share of nearest images with the same right digit", found[RIGHT], RETRIEVED)
    return Findings(
        seeds=seeds,
        parts=(Part(rule, MAP, knocked_out=(SWAPPED,), against=(NORM, RIGHT)),),
        gates=(
            *(gate(name, retrieval, losses[MAP]) for name in (MAP, NORM, SWAPPED)),
            gate(RIGHT, mirrored, losses[RIGHT]),
        ),
        checks=(
            above(
                f"positive mass on the left half, {MAP} minus {UNTRAINED}",
                mass.minus(MAP, UNTRAINED),
                0.0,
                in_rule=False,
            ),
            above(
                f"mean cosine in removal, random order minus {MAP}",
                cosine.minus("random order", MAP),
                0.0,
                in_rule=False,
            ),
        ),
        table=mass.table("positive mass on the left half")
        + cosine.table("mean cosine in removal")
        + found.table("nearest image of the same class"),
        figure=partial(_draw, arms=mass),
        notes=(
            f"{PAIRS} pairs per seed; the map has 4 x 8 places, of which the left half's digit has 4 x 4.",
            "The seeds differ in initialisation, in which digits stand side by side, and in the order of training.",
        ),
    )


class Measured(NamedTuple):
    """Of one seed, by arm."""

    mass: dict[str, float]
    cosine: dict[str, float]
    precision: dict[str, float]
    losses: dict[str, list[float]]


def _measured(seed: int, steps: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    test = canvases(digits("test"), 2 * PAIRS, generator)
    trained = {right: _trained(seed, steps, right) for right in (False, True)}
    left = torch.zeros(SIDE // 2, SIDE, dtype=torch.bool)
    left[:, : SIDE // 2] = True
    mass, precision, cosine = {}, {}, {}
    for name, (model, _) in ((MAP, trained[False]), (RIGHT, trained[True]), (UNTRAINED, (_fresh(seed), []))):
        labels = test.right if name == RIGHT else test.left
        terms = DeepSimilarity(model, "body").terms({"x": test.x})
        a, b = _partners(labels, generator, same=True)
        first, second = _of(terms, a), _of(terms, b)
        scores = pair_map(first, second).a
        mass[name] = float(mass_in(scores, left.flatten()).mean())
        if name == UNTRAINED:
            continue
        precision[name] = _nearest(terms, labels)
        if name == MAP:
            _, other = _partners(labels, generator, same=False)
            norms, swapped = norm_map(first), pair_map(first, _of(terms, other)).a
            random = torch.rand(scores.shape, generator=generator)
            mass |= {
                NORM: float(mass_in(norms, left.flatten()).mean()),
                SWAPPED: float(mass_in(swapped, left.flatten()).mean()),
            }
            for arm, order in ((MAP, scores), (NORM, norms), (SWAPPED, swapped), ("random order", random)):
                cosine[arm] = float(removal_curve(first, second, order).mean())
    return Measured(mass, cosine, precision, {MAP: trained[False][1], RIGHT: trained[True][1]})


def canvases(source: Digits, items: int, generator: torch.Generator) -> Canvases:
    """Digits side by side, drawn at random.

    >>> canvases(digits("test"), 3, torch.Generator().manual_seed(0)).x.shape
    torch.Size([3, 2, 8, 16])
    """
    chosen = torch.randint(len(source.y), (2, items), generator=generator)
    pixels = torch.cat([source.x[chosen[0]].view(-1, SIDE, SIDE), source.x[chosen[1]].view(-1, SIDE, SIDE)], 2)
    columns = torch.linspace(-1, 1, 2 * SIDE).expand_as(pixels)
    return Canvases(torch.stack([pixels, columns], 1), source.y[chosen[0]], source.y[chosen[1]])


def _fresh(seed: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network().eval()


def _trained(seed: int, steps: int, right: bool) -> tuple[Network, list[float]]:
    model, generator = _fresh(seed).train(), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = canvases(digits("train"), BATCH, generator)
        return F.cross_entropy(model(batch.x), batch.right if right else batch.left)

    losses = descend(model.parameters(), (loss() for _ in range(steps)), steps, LEARNING_RATE)
    return model.eval(), losses


def _partners(
    labels: Int[Tensor, "items"], generator: torch.Generator, same: bool
) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
    """The first images, and for each one of the others with the same label, or with another."""
    a, rest = torch.arange(PAIRS), torch.arange(PAIRS, 2 * PAIRS)
    fits: Bool[Tensor, "pairs others"] = (labels[a][:, None] == labels[rest][None]) == same
    drawn = torch.rand(fits.shape, generator=generator).masked_fill(~fits, -1).argmax(1)
    return a, rest[drawn]


def _of(terms: Terms, items: Tensor) -> Terms:
    return Terms(terms.values[items], terms.mask[items], terms.grid, terms.units)


def _nearest(terms: Terms, labels: Tensor) -> float:
    embedded = F.normalize(terms.embedding, dim=1)
    near = (embedded @ embedded.T).fill_diagonal_(-2.0).argmax(1)
    return float((labels[near] == labels).double().mean())


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "share of the map's positive mass on the left half")
