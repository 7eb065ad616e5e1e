"""A policy that prunes or merges the tokens of each image by the variance of their scores keeps a vision transformer, without
fine-tuning, at least as right as the worse of pruning alone and merging alone and within half a point of the better, with half
and with a quarter of the tokens after two blocks; that variance grows with depth; and images need their own decisions: it is
better than with those of other images, and than with each turned round.

Refuted if it is more than a point below the better of the two, or no better with its own decisions.

Canvases of 32 x 32 pixels hold a digit of 16 x 16 on a ground that is half plain and half striped; a vision transformer with a
class token reads 64 patches, is trained without reduction, and must be right in 90 % first. Thresholds are the median of each
block's variance over training images.

Knocked out: whose decision it is (permuted over the images of a batch: as many are pooled), and what it says (turned round).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cenote.reduce import (
    EvenlySpacedTokens,
    FusedTopTokens,
    PruneOrPool,
    RandomTokens,
    TopAttentionTokens,
    ppt,
    set_thresholds,
    watched,
)
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.reduced_vit import PATCHES, Trained, accuracy_with, on_canvases, runs

SEEDS = {"small": 3, "full": 5}
BLOCKS = (1, 2)
GONE = {"half": (16, 16), "a quarter": (32, 16)}
LEVEL = 0.9
CALIBRATED = 512
POOL, PRUNE = float("inf"), float("-inf")


class Permuted(PruneOrPool):
    """Each image has the decision of another one of its batch."""

    def pools(self, variance: Tensor) -> Tensor:
        order = torch.randperm(len(variance), generator=torch.Generator().manual_seed(0))
        return super().pools(variance)[order]


class Inverted(PruneOrPool):
    """Pools where it would prune, and prunes where it would pool."""

    def pools(self, variance: Tensor) -> Tensor:
        return ~super().pools(variance)


OWN, OTHERS, TURNED = "PPT", "PPT, decisions permuted", "PPT, decisions turned round"
PRUNING, POOLING, DEPTH = "prune only", "pool only", "pool first, then prune"
EVIT, ATTENTION, GRID, RANDOM = "EViT", "top attention", "grid", "random"
ARMS = (OWN, PRUNING, POOLING, DEPTH, EVIT, ATTENTION, GRID, RANDOM, OTHERS, TURNED)
FIXED = {PRUNING: (PRUNE, PRUNE), POOLING: (POOL, POOL), DEPTH: (POOL, PRUNE)}
RIVALS: dict[str, Any] = {
    EVIT: FusedTopTokens,
    ATTENTION: TopAttentionTokens,
    GRID: EvenlySpacedTokens,
    RANDOM: RandomTokens,
}


class Measured(NamedTuple):
    """Of one seed and number of tokens: accuracy by arm; per reducing block the squared coefficient of variation and the share
    that was pooled."""

    right: dict[str, float]
    variation: list[float]
    pooled: list[float]


@study
def run(seed: int, size: Size) -> Findings:
    """Train one network per seed; reduce its tokens by every arm."""
    seeds = seeds_of(seed, size, **SEEDS)
    networks = [on_canvases(s, size) for s in seeds]
    found = {left: [_measured(network, gone) for network in networks] for left, gone in GONE.items()}
    right = {left: Arms({a: tuple(m.right[a] for m in found[left]) for a in ARMS}) for left in GONE}

    def rule(arm: str) -> tuple[Check, ...]:
        checks = []
        for left in GONE:
            own, both = right[left][arm], list(zip(right[left][PRUNING], right[left][POOLING], strict=True))
            worse = [a - min(pair) for a, pair in zip(own, both, strict=True)]
            better = [a - max(pair) for a, pair in zip(own, both, strict=True)]
            grown = [m.variation[1] - m.variation[0] for m in found[left]]
            checks += [
                above(f"{left} left: accuracy, {arm} minus the worse of both", worse, expected=0.0),
                above(f"{left} left: accuracy, {arm} minus the better of both", better, expected=-0.005, refuted=-0.01),
                above(f"{left} left: accuracy, {arm} minus {OTHERS}", right[left].minus(arm, OTHERS), expected=0.0),
                above(f"{left} left: accuracy, {arm} minus {TURNED}", right[left].minus(arm, TURNED), expected=0.0),
                above(f"{left} left: variation of scores, second block minus first", grown, expected=0.0),
            ]
        return tuple(checks)

    accurate = above("accuracy of the unreduced network", [n.accuracy for n in networks], LEVEL)
    losses = [n.losses for n in networks]
    return Findings(
        seeds=seeds,
        parts=(Part(rule, OWN, knocked_out=(OTHERS, TURNED), against=(PRUNING, POOLING)),),
        gates=(
            *(gate(name, accurate, losses) for name in (OWN, PRUNING, POOLING)),
            *(gate(name, None, None) for name in (OTHERS, TURNED)),
        ),
        checks=tuple(
            above(f"{left} left: accuracy, {OWN} minus {rival}", right[left].minus(OWN, rival), 0.0, in_rule=False)
            for left in GONE
            for rival in (DEPTH, EVIT, ATTENTION, GRID, RANDOM)
        ),
        table=[row for left in GONE for row in right[left].table(f"accuracy, {left} left")] + _policies(found),
        figure=partial(_draw, arms=right["a quarter"]),
        notes=(
            "The seeds differ in initialisation, in where digits stand and what is behind them, and in the order of training.",
            f"Unreduced the networks are right in {', '.join(f'{n.accuracy:.3f}' for n in networks)}.",
        ),
    )


def _measured(network: Trained, gone: tuple[int, ...]) -> Measured:
    own = ppt(PATCHES, blocks=BLOCKS, r=list(gone), threshold=0.0, normalised=True)
    images = tuple(part[:CALIBRATED] for part in network.train)
    thresholds = set_thresholds(own, lambda: runs(network, own, images))  # type: ignore[arg-type]
    with watched(own) as seen:
        right = {OWN: accuracy_with(network, own)}
    for name, limits in FIXED.items():
        right[name] = accuracy_with(network, ppt(PATCHES, blocks=BLOCKS, r=list(gone), threshold=list(limits)))
    for name, kind in ((OTHERS, Permuted), (TURNED, Inverted)):
        at = {b: kind(tokens=r.budget.tokens, threshold=thresholds[b], normalised=True) for b, r in own.items()}
        right[name] = accuracy_with(network, at)
    for name, rival in RIVALS.items():
        right[name] = accuracy_with(network, {b: rival(tokens=r.budget.tokens) for b, r in own.items()})
    return Measured(
        right,
        [float(seen[b].variance.mean()) for b in BLOCKS],
        [float(seen[b].pool.double().mean()) for b in BLOCKS],
    )


def _policies(found: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """Rows of the table: what was decided in each block."""
    rows = []
    for left, measured in found.items():
        for n, block in enumerate(BLOCKS):
            shares = Arms({OWN: tuple(m.pooled[n] for m in measured)})
            variations = Arms({OWN: tuple(m.variation[n] for m in measured)})
            rows += shares.table(f"share pooled in block {block}, {left} left")
            rows += variations.table(f"variation of scores in block {block}, {left} left")
    return rows


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "accuracy with a quarter of 64 tokens")
