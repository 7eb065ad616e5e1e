"""A trainable pooling of all layers classifies better than one of the last layer where a middle layer carries the answer (by
more than 20 points), and hardly worse where the last layer does (by less than 5 points).

Refuted if it is at most 5 points better in the first case, or at least 10 points worse in the second.

Stacks of 6 layers with 5 tokens of 16 channels are noise, but in one layer the tokens are shifted by the vector of one of four
classes. Only the pooling and a linear layer are trained.

Knocked out: the look-up (a learned weighted sum of the layers, the same for all stacks), and the choice among layers (the
queries' map 0 and frozen, so that every layer weighs the same; values, latents and feed-forward as before).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import LastLayerTrainable, MultiLayerTrainable, WeightedLayerSum
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, draw_arms, gate, seeds_of, study
from cenote.study.harness.batches import split_at, stacked
from cenote.study.harness.training import Together, accuracy, cross_entropy, epochs, fit

LAYERS, TOKENS, DIM, CLASSES = 6, 5, 16, 4
TRAIN, TEST = 400, 400
# the commonest of four classes among 400 stacks
CHANCE = 0.3
MIDDLE, LAST = 2, LAYERS - 1
STEPS: dict[Size, int] = {"smoke": 6, "small": 250, "full": 1000}


class LastLayerMean(nn.Module):
    """Mean of the last layer's tokens."""

    def forward(self, x: Float[Tensor, "batch layers tokens dim"]) -> Float[Tensor, "batch dim"]:
        return x[:, -1].mean(1)


class OfLastLayer(nn.Module):
    """A pool of tokens on the last layer of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = LastLayerTrainable(DIM, latents=8, heads=2, head_dim=8)

    def forward(self, x: Float[Tensor, "batch layers tokens dim"]) -> Float[Tensor, "batch dim"]:
        return self.pool(x[:, -1])


class Even(MultiLayerTrainable):
    """All layers, trainable, each with the same weight."""

    def __init__(self) -> None:
        super().__init__(DIM, LAYERS, "mean", 8, 2, 8)
        nn.init.zeros_(self.look_up.to_q.weight).requires_grad_(False)


OURS, THEIRS, SUM = "all layers, trainable", "last layer, trainable", "all layers, weighted sum"
EVEN = "all layers, trainable, uniform weights"
POOLS = {
    "last layer, mean": LastLayerMean,
    THEIRS: OfLastLayer,
    SUM: partial(WeightedLayerSum, DIM, LAYERS),
    OURS: partial(MultiLayerTrainable, DIM, LAYERS, "mean", 8, 2, 8),
    EVEN: Even,
}


@study
def run(seed: int, size: Size) -> Findings:
    """Classify stacks whose answer is in a middle or in the last layer."""
    seeds = seeds_of(seed, size)
    arms: dict[int, Arms] = {}
    losses: dict[tuple[int, str], list[float]] = {}
    for layer in (MIDDLE, LAST):
        train, test = split_at(stacked(_stacks(s, layer) for s in seeds), TRAIN)
        arms[layer] = Arms()
        for name, pool in POOLS.items():
            model = Together(lambda pool=pool: nn.Sequential(pool(), nn.Linear(DIM, CLASSES)), seeds)  # type: ignore[misc]
            fit(model, epochs(*train, 50, seeds), cross_entropy, STEPS[size], lr=5e-3)
            arms[layer][name], losses[layer, name] = accuracy(model, *test), model.losses

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"answer in layer 3 of 6: {arm} minus last layer", arms[MIDDLE].minus(arm, THEIRS), 0.20, 0.05),
            below(f"answer in the last layer: last layer minus {arm}", arms[LAST].minus(THEIRS, arm), 0.05, 0.10),
        )

    # where the answer is in layer 3 the last layer can know nothing, so that its training shows where the answer is its own
    answered = [(OURS, MIDDLE), (OURS, LAST), (THEIRS, LAST), (SUM, MIDDLE), (SUM, LAST), (EVEN, MIDDLE), (EVEN, LAST)]
    return Findings(
        seeds=seeds,
        parts=(Part(rule, OURS, knocked_out=(SUM, EVEN), against=(THEIRS,)),),
        gates=tuple(
            gate(arm, above(f"accuracy, answer in layer {at + 1}", arms[at][arm], CHANCE), losses[at, arm])
            for arm, at in answered
        ),
        checks=(
            above(
                "answer in layer 3 of 6: trainable minus weighted sum",
                arms[MIDDLE].minus(OURS, SUM),
                expected=0.0,
                in_rule=False,
            ),
        ),
        table=arms[MIDDLE].table("accuracy, answer in layer 3") + arms[LAST].table("accuracy, answer in layer 6"),
        figure=partial(_draw, arms=arms),
        notes=(
            "The first case is made so that the last layer knows nothing: it shows that the pooling finds a layer, not that "
            "real models hide answers in their middle. docs/tables/minilm.md has real text.",
            "8 latents and 2 heads of 8 channels, where the paper has 768 latents and 32 heads.",
            "What the paper says about bidirectional attention in large language models is not checked here.",
        ),
    )


def _stacks(seed: int, layer: int) -> tuple[Float[Tensor, "items layers tokens dim"], Int[Tensor, "items"]]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=g) * 0.5
    y = torch.randint(CLASSES, (TRAIN + TEST,), generator=g)
    x = torch.randn(TRAIN + TEST, LAYERS, TOKENS, DIM, generator=g)
    x[:, layer] += centres[y].unsqueeze(1)
    return x, y


def _draw(figure: Any, arms: dict[int, Arms]) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (layer, found) in zip(panels, arms.items(), strict=True):
        draw_arms(axes, found, f"accuracy, answer in layer {layer + 1}")
    # the shared axis was turned twice
    panels[0].invert_yaxis()
