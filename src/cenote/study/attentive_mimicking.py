"""Where few of a word's contexts say what it means, contexts weighed by their agreement give a vector closer to the true one
than contexts that weigh the same, and the contexts that say it get more weight than their share.

Refuted if the error on held-out words is not smaller with agreement, or if the three informative contexts of eight do not get
more than 3/8 of the weight.

A word's true vector is drawn from a normal distribution of 20 dimensions. Three of its eight contexts are that vector with
noise of deviation 0.5, the other five are noise of deviation 1.5. All models end in a linear map, trained on 1,000 words.

Knocked out: whose the weights are (those of a word's contexts are dealt out anew among them, in training and test), and the
other contexts (each weighs as it agrees with itself alone).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import Tokens
from cenote.pool import AgreementPool, MeanPool, Pool
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.batches import split_at, stacked
from cenote.study.harness.training import Together, epochs, fit

DIM, CONTEXTS, GOOD = 20, 8, 3
TRAIN, TEST = 1000, 1000
STEPS: dict[Size, int] = {"smoke": 20, "small": 800, "full": 3000}


class Shuffled(AgreementPool):
    """Agreement whose weights are dealt out anew among the contexts of each word."""

    def agreement(self, tokens: Tokens) -> Float[Tensor, "*rows 1"]:
        weights = super().agreement(tokens)
        return weights.gather(-2, torch.rand_like(weights).argsort(-2))


class Alone(AgreementPool):
    """Agreement of each context with itself: `|p_n|^2`, with the same map."""

    def agreement(self, tokens: Tokens) -> Float[Tensor, "*rows 1"]:
        own = self.map(tokens.values).square().sum(-1, keepdim=True)
        return own / tokens.spread(tokens.sum(own))


UNIFORM, AGREEMENT, SHUFFLED, ALONE = "uniform", "agreement", "agreement, weights moved", "agreement with itself"
POOLS: dict[str, type[Pool]] = {UNIFORM: MeanPool, AGREEMENT: AgreementPool, SHUFFLED: Shuffled, ALONE: Alone}


class Mapped(nn.Module):
    """`A pool(contexts)`."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.map = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Float[Tensor, "batch contexts dim"]) -> Float[Tensor, "batch dim"]:
        return self.map(self.pool(x))


@study
def run(seed: int, size: Size) -> Findings:
    """Mimic vectors from contexts with uniform and with agreement weights; compare on held-out words."""
    seeds = seeds_of(seed, size)
    train, (x, y) = split_at(stacked(map(_words, seeds)), TRAIN)
    errors, cosines, shares, losses = Arms(), Arms(), Arms(), {}
    for name, pool in POOLS.items():
        model = Together(lambda pool=pool: Mapped(pool(DIM)), seeds)  # type: ignore[misc]
        losses[name] = fit(model, epochs(*train, 100, seeds), F.mse_loss, STEPS[size], lr=1e-2)
        with torch.no_grad():
            guess = model(x)
        errors[name] = _per_seed((guess - y).square().mean(-1))
        cosines[name] = _per_seed(F.cosine_similarity(guess, y, dim=-1))
        with torch.no_grad():
            own = zip(model.modules(), x, strict=True)
            weights = torch.stack([m.pool.attend(contexts).weights for m, contexts in own])
        shares[name] = _per_seed(weights[:, :, 0, :GOOD].sum(-1))
    nothing = _per_seed(y.square().mean(-1))

    def rule(arm: str) -> tuple[Check, ...]:
        more = tuple(s - GOOD / CONTEXTS for s in shares[arm])
        return (
            above(f"mean squared error, uniform minus {arm}", errors.minus(UNIFORM, arm), expected=0.0),
            above(f"weight of the informative contexts minus 3/8, {arm}", more, expected=0.0),
        )

    def learned(arm: str) -> Check:
        gained = tuple(a - b for a, b in zip(nothing, errors[arm], strict=True))
        return above("mean squared error of the zero vector minus its own", gained, expected=0.0)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, AGREEMENT, knocked_out=(SHUFFLED, ALONE), against=(UNIFORM,)),),
        gates=tuple(gate(arm, learned(arm), losses[arm]) for arm in POOLS),
        checks=(
            above(
                "cosine to the true vector, agreement minus uniform",
                cosines.minus(AGREEMENT, UNIFORM),
                0.0,
                in_rule=False,
            ),
        ),
        table=errors.table("mean squared error")
        + cosines.table("cosine to the true vector")
        + shares.table("weight of the informative contexts"),
        figure=partial(_draw, arms=errors),
        notes=(
            "Synthetic contexts: this tests the pooling. The whole model on a text: docs/tables/mimicking.md.",
            "A linear map of the plain mean can at best reach an error of 0.571 here.",
        ),
    )


def _words(seed: int) -> tuple[Float[Tensor, "words contexts dim"], Float[Tensor, "words dim"]]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(TRAIN + TEST, DIM, generator=g)
    noise = torch.randn(TRAIN + TEST, CONTEXTS, DIM, generator=g)
    good = torch.arange(CONTEXTS).view(1, -1, 1) < GOOD
    return torch.where(good, y.unsqueeze(1) + 0.5 * noise, 1.5 * noise), y


def _per_seed(values: Float[Tensor, "seeds words"]) -> tuple[float, ...]:
    return tuple(values.double().mean(1).tolist())


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "mean squared error, 1,000 held-out words")
