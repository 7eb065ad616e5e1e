"""Tokens chosen as medoids rebuild all others with less error than random tokens or the most significant ones, at every number
that is left, and a vision transformer without fine-tuning names digits with 2 of 16 of them at least as well as with the 2 most
significant. Weighed by significance they rebuild the significant better than unweighted.

Refuted if random or most significant tokens rebuild better, if the most significant ones are more than a point better at 2 of
16, or if weights help what is significant no more than not.

A vision transformer reads the 16 patches of 2 x 2 pixels of a digit as tokens, with a class token, and is trained without
reduction; it must be right in 90 % first. Tokens are reduced between attention and MLP of the second of four blocks.

Knocked out: the clusters (the assignment of each image is permuted over its tokens: as many groups, as large, and their
medoids), the image (medoids of another image), and the weights (permuted over the tokens of each image, for the first medoids
too).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cenote.core.clusters import medoids_of, squared_distances
from cenote.reduce import EvenlySpacedTokens, KMeansTokens, KMedoidsTokens, RandomTokens, TopAttentionTokens
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.reduced_vit import Reading, Trained, accuracy_with, fine_tuned, on_digits, rebuilt

SEEDS = {"small": 3, "full": 5}
BLOCK = 1
PATCH = 2
LEFT = (8, 4, 2)
FEWEST = 2
LEVEL = 0.9
TUNING, TUNING_RATE = 3, 1e-3


class RandomGroups(KMedoidsTokens):
    """Medoids of groups that are as many and as large, of random tokens."""

    def clusters(self, x: Tensor, weights: Any, counts: Tensor, mask: Tensor, given: Any = None) -> Any:
        assignment, medoids = super().clusters(x, weights, counts, mask, given)
        assignment = _permuted(assignment, mask)
        return assignment, medoids_of(squared_distances(x, mask), assignment, medoids, mask, weights)


class OfAnotherImage(KMedoidsTokens):
    """The medoids of the next image of the batch."""

    def clusters(self, x: Tensor, weights: Any, counts: Tensor, mask: Tensor, given: Any = None) -> Any:
        assignment, medoids = super().clusters(x, weights, counts, mask, given)
        return assignment.roll(1, 0), medoids.roll(1, 0)


class WeightsPermuted(KMedoidsTokens):
    """Weights of other tokens of the same image."""

    def clusters(self, x: Tensor, weights: Any, counts: Tensor, mask: Tensor, given: Any = None) -> Any:
        return super().clusters(
            x, _permuted(weights, mask), counts, mask, None if given is None else _permuted(given, mask)
        )


class TopSignificance(TopAttentionTokens):
    """The tokens of largest significance."""

    rows = "all"


WK, K, WKM, KM = "WK-Medoids", "K-Medoids", "weighted k-means", "k-means"
RANDOM, TOP, GRID, CLS = "random", "top significance", "grid", "top class attention"
GROUPS, OTHER, PERMUTED = "random groups", "medoids of another image", "WK-Medoids, weights permuted"
EVEN_GROUPS, EVEN_OTHER = "random groups, unweighted", "medoids of another image, unweighted"
ARMS: dict[str, Any] = {
    WK: KMedoidsTokens,
    K: partial(KMedoidsTokens, weighted=False),
    WKM: KMeansTokens,
    KM: partial(KMeansTokens, weighted=False),
    RANDOM: RandomTokens,
    TOP: TopSignificance,
    GRID: EvenlySpacedTokens,
    CLS: TopAttentionTokens,
    GROUPS: RandomGroups,
    OTHER: OfAnotherImage,
    PERMUTED: WeightsPermuted,
    EVEN_GROUPS: partial(RandomGroups, weighted=False),
    EVEN_OTHER: partial(OfAnotherImage, weighted=False),
}
TUNED = (WK, TOP, GROUPS)


@study
def run(seed: int, size: Size) -> Findings:
    """Train one network per seed; reduce its tokens by every arm, and fine-tune with three of them."""
    seeds = seeds_of(seed, size, **SEEDS)
    networks = [on_digits(s, size, patch=PATCH) for s in seeds]
    loss, weighted, right = ({k: Arms() for k in LEFT} for _ in range(3))
    for left in LEFT:
        for name, reducer in ARMS.items():
            found = [_measured(network, reducer(tokens=left)) for network in networks]
            right[left][name], loss[left][name], weighted[left][name] = zip(*found, strict=True)
    tuned = Arms()
    epochs = 1 if size == "smoke" else TUNING
    for name in TUNED:
        at = {BLOCK: ARMS[name](tokens=FEWEST)}
        after = [fine_tuned(n, at, epochs, TUNING_RATE, s) for n, s in zip(networks, seeds, strict=True)]
        tuned[name] = tuple(accuracy_with(n, at) for n in after)

    def rebuilds(arm: str) -> tuple[Check, ...]:
        return tuple(
            above(
                f"{left} left: logarithm of the loss, {rival} minus {arm}", loss[left].minus(rival, arm), expected=0.0
            )
            for left in LEFT
            for rival in (RANDOM, TOP)
        )

    def names(arm: str) -> tuple[Check, ...]:
        return (
            above(
                f"accuracy at {FEWEST} of 16, {arm} minus {TOP}",
                right[FEWEST].minus(arm, TOP),
                expected=0.0,
                refuted=-0.01,
            ),
        )

    def weighs(arm: str) -> tuple[Check, ...]:
        return tuple(
            above(
                f"{left} left: logarithm of the loss by significance, {K} minus {arm}",
                weighted[left].minus(K, arm),
                expected=0.0,
            )
            for left in LEFT
        )

    accurate = above("accuracy of the unreduced network", [n.accuracy for n in networks], LEVEL)
    losses = [n.losses for n in networks]
    gated, spared = (WK, K, RANDOM, TOP), (GROUPS, OTHER, PERMUTED, EVEN_GROUPS, EVEN_OTHER)
    best = right[FEWEST]
    return Findings(
        seeds=seeds,
        parts=(
            Part(rebuilds, K, knocked_out=(EVEN_GROUPS, EVEN_OTHER), against=(RANDOM, TOP)),
            Part(names, WK, knocked_out=(GROUPS, OTHER), against=(TOP,)),
            Part(weighs, WK, knocked_out=(PERMUTED,), against=(K,)),
        ),
        gates=(*(gate(name, accurate, losses) for name in gated), *(gate(name, None, None) for name in spared)),
        checks=(
            above(f"accuracy at {FEWEST}, {WK} minus {GROUPS}", best.minus(WK, GROUPS), 0.0, in_rule=False),
            above(f"accuracy at {FEWEST}, {WK} minus {OTHER}", best.minus(WK, OTHER), 0.0, in_rule=False),
            above(f"accuracy at {FEWEST}, {WK} minus {K}", best.minus(WK, K), 0.0, in_rule=False),
            above(f"accuracy at {FEWEST}, {K} minus {KM}", best.minus(K, KM), 0.0, in_rule=False),
            above(f"accuracy at {FEWEST}, {CLS} minus {WK}", best.minus(CLS, WK), 0.0, in_rule=False),
            above(
                f"accuracy at {FEWEST} after fine-tuning, {WK} minus {TOP}", tuned.minus(WK, TOP), 0.0, in_rule=False
            ),
            above(
                f"accuracy at {FEWEST} after fine-tuning, {WK} minus {GROUPS}",
                tuned.minus(WK, GROUPS),
                0.0,
                in_rule=False,
            ),
        ),
        table=[
            row
            for left in LEFT
            for row in (
                *right[left].table(f"accuracy, {left} left"),
                *loss[left].table(f"log loss, {left} left"),
                *weighted[left].table(f"log loss by significance, {left} left"),
            )
        ]
        + tuned.table(f"accuracy after {epochs} epochs of fine-tuning, {FEWEST} left"),
        figure=partial(_draw, arms=best),
        notes=(
            "The seeds differ in initialisation and in the order of training; the images are the same.",
            f"Unreduced the networks are right in {', '.join(f'{n.accuracy:.3f}' for n in networks)}.",
        ),
    )


def _measured(network: Trained, reducer: Any) -> tuple[float, float, float]:
    """Accuracy, and the logarithms of both losses per image."""
    reading = Reading(reducer)
    accuracy = accuracy_with(network, {BLOCK: reading})
    plain, weighted = rebuilt(reading)
    return accuracy, math.log(plain), math.log(weighted)


def _permuted(values: Tensor, mask: Tensor) -> Tensor:
    """Over the real tokens of each image, all images having the same."""
    real = mask[0].nonzero().squeeze(1)
    order = torch.rand(len(values), len(real), generator=torch.Generator().manual_seed(0)).argsort(1)
    found = values.clone()
    found[:, real] = values[:, real].gather(1, order)
    return found


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, f"accuracy with {FEWEST} of 16 tokens")
