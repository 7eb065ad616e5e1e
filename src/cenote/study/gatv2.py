"""One layer of GATv2 with one head looks up eight words in a dictionary it has not seen: at least 95 % of them. One layer of
GAT with one head, whose attention ranks all entries alike for every word, finds half of them at most.

Refuted if one head of GATv2 finds less than 95 %, or one head of GAT more than half.

Eight keys ask eight pairs of key and value, the values a random permutation, new at every step; tested on 512 others.

Knocked out: the nonlinearity inside of the score (slope 1). Parameters, steps and all else are the same; scores are sums of a
number of the asking and a number of the asked, and attention is static again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core.seeded import seeded
from cenote.mix.gatv2.lookup import Lookup, lookup_accuracy, train_lookup
from cenote.study.harness import (
    Arms,
    Check,
    Findings,
    Part,
    Size,
    above,
    below,
    between,
    draw_arms,
    gate,
    seeds_of,
    study,
)

K, WIDTH, BATCH, TEST = 8, 32, 32, 512
STEPS: dict[Size, int] = {"smoke": 10, "small": 1500, "full": 4000}
RATE, EVERY, PATIENCE = 2e-3, 50, 1
SEEDS = {"small": 6, "full": 10}
CHANCE = 0.125
ENOUGH, HALF = 0.95, 0.5
LOOKS = 64
METHOD, STATIC, LINEAR = "GATv2, 1 head", "GAT, 1 head", "GATv2, slope 1"
BUILT: dict[str, dict[str, Any]] = {
    METHOD: {"conv": "gatv2"},
    STATIC: {"conv": "gat"},
    LINEAR: {"conv": "gatv2", "slope": 1.0},
}


@study
def run(seed: int, size: Size) -> Findings:
    """Train each layer on dictionaries that are drawn anew, and ask it for the words of others."""
    seeds = seeds_of(seed, size, **SEEDS)
    arms, agreement = Arms(), Arms()
    losses: dict[str, list[list[float]]] = {}
    for name in BUILT:
        found = [_looked_up(name, s, STEPS[size]) for s in seeds]
        arms[name] = tuple(right for right, _, _ in found)
        agreement[name] = tuple(agreed for _, agreed, _ in found)
        losses[name] = [curve for _, _, curve in found]

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"words found, {arm}", arms[arm], expected=ENOUGH),
            below(f"words found, {STATIC}, beside {arm}", arms[STATIC], expected=HALF),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, METHOD, knocked_out=(LINEAR,), against=(STATIC,)),),
        gates=(
            *(gate(arm, above("words found", arms[arm], CHANCE), losses[arm]) for arm in (METHOD, STATIC)),
            gate(LINEAR, None, losses[LINEAR]),
        ),
        checks=(
            below(f"agreement of ranks, {METHOD}", agreement[METHOD], expected=0.999, in_rule=False),
            between(f"agreement of ranks, {STATIC}", agreement[STATIC], 0.999, 1.001, in_rule=False),
            between(f"agreement of ranks, {LINEAR}", agreement[LINEAR], 0.999, 1.001, in_rule=False),
        ),
        table=[
            *arms.table(f"share of {K} words found, {TEST} dictionaries"),
            *agreement.table("Kendall's tau between queries"),
        ],
        figure=partial(_draw, arms=arms),
        notes=(
            f"{STEPS[size]:,} steps of {BATCH} dictionaries, width {WIDTH}, Adam at {RATE:g}, halved where the mean loss of "
            f"{EVERY} steps does not fall. The authors' benchmark drops out half of all features, in evaluation too, and "
            "gives loops to GAT alone; neither is done here. One permutation of 40,320 may be met again in the test.",
        ),
        tried=(
            "One seed of each arm, 800 steps without halving: 1.0 of the words by GATv2, .25 by GAT, .125 with slope 1, .69 by "
            "GAT with 8 heads. GAT's loss still fell, so that rate, halving and 1,500 steps were chosen on GAT alone "
            "(at a rate of .01 it stayed at chance).",
            "Three seeds at a rate of .003: not decidable, because one seed of GAT stayed at chance and its gate was open. "
            "Eight heads of GAT, reported beside the rule, found 0.85 (0.52 to 1.2). The rate became .002 and the seeds six, "
            "once; the arm of eight heads was left out.",
        ),
    )


def _looked_up(arm: str, seed: int, steps: int) -> tuple[float, float, list[float]]:
    with seeded(seed):
        model = Lookup(K, WIDTH, **BUILT[arm])
    losses = train_lookup(
        model, steps=steps, batch=BATCH, learning_rate=RATE, every=EVERY, patience=PATIENCE, seed=seed
    )
    orders = _drawn(TEST, seed + 1000)
    return lookup_accuracy(model, orders), model.agreement(orders[:LOOKS]), losses


def _drawn(count: int, seed: int) -> Int[Tensor, "count k"]:
    return torch.rand(count, K, generator=torch.Generator().manual_seed(seed)).argsort(1)


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, f"share of {K} words found")
