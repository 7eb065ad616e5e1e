"""On frozen patch tokens of a masked autoencoder, efficient probing beats the linear probe on their mean by at least 4 points
with less than a third of the parameters of multi-head cross-attention, and 4 queries are better than one, which is better
than the linear probe.

Refuted if efficient probing with 4 queries is not better than the linear probe, or if cross-attention has less than 3 times
its parameters.

Also measured, not part of the rule: whether efficient probing reaches multi-head cross-attention, on tokens with and without
the backbone's last LayerNorm, after 50 and after 150 epochs.

Knocked out: the attention (the queries are 0 and frozen, so that all tokens weigh the same), for each lead over the linear
probe; and the difference of the queries (one vector for all four, each with its slice of the values), for the lead of four over
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from cenote.core import Tokens, cross_attention
from cenote.jobs.probe import Probe
from cenote.pool import EfficientProbing, MeanPool, MHCAPool, Pool, Pooled
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.data import Digits, backbone
from cenote.study.harness.training import Together, accuracy, cross_entropy, epochs, fit, steps_of

DIM = 64
BATCH = 128
LEARNING_RATE = 5e-3
EPOCHS: dict[Size, tuple[int, int]] = {"smoke": (1, 2), "small": (50, 150), "full": (50, 150)}

CHANCE = 0.11


class Even(EfficientProbing):
    """Efficient probing without attention: every token weighs the same."""

    def __init__(self, dim: int, queries: int) -> None:
        super().__init__(dim, queries)
        nn.init.zeros_(self.cls_token).requires_grad_(False)


class Tied(EfficientProbing):
    """Efficient probing with one vector for all queries; each still has its own slice of the values."""

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.cls_token.mean(1, keepdim=True).expand_as(self.cls_token).flatten(1)
        settings: dict[str, Any] = {"scale": self.dim**-0.5, "plan": self.plan, "need_weights": need_weights}
        output, weights = cross_attention(tokens, query, value=self.v, heads=self.queries, **settings)
        return Pooled(output.squeeze(1), weights)


LINEAR, ONE, FOUR, CROSS = "linear probe", "EP, 1 query", "EP, 4 queries", "cross-attention, 8 heads"
ONE_EVEN, FOUR_EVEN = "EP, 1 query, uniform weights", "EP, 4 queries, uniform weights"
TIED = "EP, 4 queries, all the same"
POOLS: dict[str, Callable[[], Pool]] = {
    LINEAR: partial(MeanPool, DIM),
    ONE: partial(EfficientProbing, DIM, queries=1),
    FOUR: partial(EfficientProbing, DIM, queries=4),
    "EP, 8 queries": partial(EfficientProbing, DIM, queries=8),
    "EP, 16 queries": partial(EfficientProbing, DIM, queries=16),
    CROSS: partial(MHCAPool, DIM, heads=8),
}
KNOCKED_OUT: dict[str, Callable[[], Pool]] = {
    ONE_EVEN: partial(Even, DIM, queries=1),
    FOUR_EVEN: partial(Even, DIM, queries=4),
    TIED: partial(Tied, DIM, queries=4),
}
LONGER = (LINEAR, FOUR, "EP, 16 queries", CROSS)


@study
def run(seed: int, size: Size) -> Findings:
    """Train every probe on the same frozen tokens, raw and normalised, short and long."""
    seeds = seeds_of(seed, size)
    short, long = EPOCHS[size]
    raw, normed = _tokens(normed=False), _tokens(normed=True)
    arms, parameters, losses = _probes(POOLS | KNOCKED_OUT, *raw, seeds, short)
    others = {
        f"normalised tokens, {short} epochs": _probes(POOLS, *normed, seeds, short)[0],
        f"{long} epochs": _probes({k: POOLS[k] for k in LONGER}, *raw, seeds, long)[0],
        f"normalised tokens, {long} epochs": _probes({k: POOLS[k] for k in LONGER}, *normed, seeds, long)[0],
    }
    ratio = parameters[CROSS] / parameters[FOUR]

    def leads(arm: str) -> tuple[Check, ...]:
        lead = arms.minus(arm, LINEAR)
        return (
            above(f"accuracy, {arm} minus linear probe", lead, expected=0.04, refuted=0.0),
            above("parameters, cross-attention over EP with 4 queries", [ratio] * len(seeds), expected=3.0),
        )

    def gains(arm: str) -> tuple[Check, ...]:
        return (above(f"accuracy, {arm} minus EP with 1", arms.minus(arm, ONE), expected=0.0, refuted=-math.inf),)

    def suffices(arm: str) -> tuple[Check, ...]:
        lead = arms.minus(arm, LINEAR)
        return (above(f"accuracy, {arm} minus linear probe", lead, expected=0.0, refuted=-math.inf),)

    return Findings(
        seeds=seeds,
        parts=(
            Part(leads, FOUR, knocked_out=(FOUR_EVEN,), against=(LINEAR,)),
            Part(gains, FOUR, knocked_out=(TIED,), against=(ONE,)),
            Part(suffices, ONE, knocked_out=(ONE_EVEN,), against=(LINEAR,)),
        ),
        gates=tuple(
            gate(name, above("accuracy", arms[name], CHANCE), losses[name])
            for name in (FOUR, ONE, LINEAR, *KNOCKED_OUT)
        ),
        checks=(
            *(
                above(
                    f"accuracy, EP with {q} queries minus cross-attention{name}",
                    a.minus(f"EP, {q} queries", CROSS),
                    0.0,
                    in_rule=False,
                )
                for name, a in {"": arms, **{f", {name}": a for name, a in others.items()}}.items()
                for q in (4, 16)
            ),
        ),
        table=[
            *arms.table("accuracy", parameters=parameters),
            *(row for name, a in others.items() for row in a.table(f"accuracy, {name}", parameters=parameters)),
        ],
        figure=partial(_draw, raw=arms, normed=others[f"normalised tokens, {short} epochs"], parameters=parameters),
        notes=(
            "One frozen backbone (the digits masked autoencoder of this package), 16 patch tokens of width 64, without [CLS]. "
            "The seeds differ in the initialisation of the probe and in the order of training. All probes end in a BatchNorm "
            "without affine part and a linear classifier, and are trained alike.",
            "The rule is judged on tokens without the backbone's last LayerNorm, 50 epochs.",
        ),
    )


def _tokens(normed: bool) -> tuple[Digits, Digits]:
    encoder, train, test = backbone()
    if not normed:
        encoder.register_module("norm", nn.Identity())
    with torch.no_grad():
        return Digits(encoder(train.x)[:, 1:], train.y), Digits(encoder(test.x)[:, 1:], test.y)


def _probes(
    pools: dict[str, Callable[[], Pool]], train: Digits, test: Digits, seeds: tuple[int, ...], passes: int
) -> tuple[Arms, dict[str, int], dict[str, list[float]]]:
    """Accuracy over the seeds, how many numbers a probe trains, and the losses."""
    x, y, test_x, test_y = (v.expand(len(seeds), *v.shape) for v in (*train, *test))
    arms, parameters, losses = Arms(), {}, {}
    steps = steps_of(len(train.y), BATCH, passes)
    for name, pool in pools.items():
        model = Together(partial(_probe, pool), seeds)
        fit(model, epochs(x, y, BATCH, seeds), cross_entropy, steps, LEARNING_RATE)
        arms[name] = accuracy(model, test_x, test_y)
        parameters[name], losses[name] = model.size(), model.losses
    return arms, parameters, losses


def _probe(pool: Callable[[], Pool]) -> Probe:
    return Probe(pool(), outputs=10)


def _draw(figure: Any, raw: Arms, normed: Arms, parameters: dict[str, int]) -> None:
    left, right = figure.subplots(1, 2, sharex=True)
    draw_arms(left, Arms({f"{name}\n({parameters[name]:,} parameters)": v for name, v in raw.items()}), "accuracy")
    draw_arms(right, normed, "accuracy, normalised tokens")
    right.set_yticks([])
