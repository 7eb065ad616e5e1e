"""Where a lexicon says which words carry feeling, but not which feeling, attention conditioned on it by an affine map
classifies better than the lexicon's features joined to the embeddings, which is better than no lexicon.

Refuted if the affine map is at most 5 points above no lexicon, or not above joined embeddings, or if those are not above no
lexicon.

A vocabulary has 400 words with feeling, whose sign shows weakly in 16 fixed channels, and 800 without. A sentence has 12 words
without and one or two with; the task is their sign. An LSTM of 16 channels reads it, attention pools its states; 400 sentences
train, 400 test.

Knocked out: whose entries they are (every word has the entry of another word, drawn once per seed, with the map and with
joined embeddings), and the attention (all words weigh the same, and what is pooled are the states as the map conditions them:
the lexicon as a feature, with the same parameters).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import Tokens
from cenote.pool import AffectiveClassifier, AttentionalAffine, AttentionalConcat, AttentionalGate, Pooled
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.batches import split_at, stacked, unstacked
from cenote.study.harness.training import Together, accuracy, constant, cross_entropy, epochs, fit

EMBEDDED, WIDTH, LENGTH = 16, 16, 14
WITH, WITHOUT = 400, 800
TRAIN, TEST = 400, 400
SIGN = 0.6
STEPS: dict[Size, int] = {"smoke": 2, "small": 1200, "full": 2400}
SEEDS = {"small": 5, "full": 10}
CHANCE = 0.5


class Conditioned(AttentionalAffine):
    """The affine map without attention: the states that it conditions are pooled, all with the same weight."""

    def _attended(
        self,
        x: Float[Tensor, "batch tokens dim"] | Tokens,
        features: Float[Tensor, "*rows features"],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> tuple[Tokens, Pooled]:
        tokens, _ = super()._attended(x, features, mask)
        return tokens, Pooled(tokens.mean(self.condition(tokens.values, features)), tokens.uniform())


class Untold(AttentionalConcat):
    """Plain attention with as many parameters: the features beside the states are always 0."""

    def condition(
        self, h: Float[Tensor, "*rows dim"], c: Float[Tensor, "*rows features"]
    ) -> Float[Tensor, "*rows scored"]:
        return super().condition(h, torch.zeros_like(c))


NONE, JOINED, AFFINE = "no lexicon", "joined to the embeddings", "affine"
ASTRAY, JOINED_ASTRAY, EVEN = (
    "affine, entries of other words",
    "joined, entries of other words",
    "affine, uniform weights",
)
LAYERS = {
    "concat": AttentionalConcat,
    "gate": AttentionalGate,
    AFFINE: AttentionalAffine,
    ASTRAY: AttentionalAffine,
    EVEN: Conditioned,
}
ARMS = (NONE, JOINED, *LAYERS, JOINED_ASTRAY)


class Sentences(NamedTuple):
    """Vectors of the words, of each word 1 where the lexicon says that it carries feeling, and what it says of another word."""

    words: Float[Tensor, "*items words channels"]
    lexicon: Float[Tensor, "*items words 1"]
    astray: Float[Tensor, "*items words 1"]


class Reader(nn.Module):
    """The whole classifier, with what the arm is told of each word."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        joined = arm in (JOINED, JOINED_ASTRAY)
        self.astray = arm in (ASTRAY, JOINED_ASTRAY)
        quiet: Any = {"noise": 0.0, "dropout": 0.0, "dropout_states": 0.0}
        self.model = AffectiveClassifier(
            1,
            2,
            dim=EMBEDDED,
            way=LAYERS.get(arm, Untold),
            joined="embeddings" if joined else "nowhere",
            hidden=WIDTH,
            **quiet,
        )

    def forward(self, x: Sentences) -> Float[Tensor, "batch classes"]:
        return self.look(x)[0]

    def look(self, x: Sentences) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch tokens"]]:
        """Scores of the classes, and the weight of each word."""
        entries = x.astray if self.astray else x.lexicon
        return self.model.attend(x.words, entries)


@study
def run(seed: int, size: Size) -> Findings:
    """Name the sign of sentences with each way to use the lexicon; look where the attention lies."""
    seeds = seeds_of(seed, size, **SEEDS)
    train, (x, y) = split_at(stacked(map(_sentences, seeds)), TRAIN)
    right, mass, losses = Arms(), Arms(), {}
    for arm in ARMS:
        model = Together(partial(Reader, arm), seeds, in_turn=True)
        batches = epochs(*train, 64, seeds)
        losses[arm] = fit(
            model, batches, cross_entropy, STEPS[size], lr=5e-3, optimiser=torch.optim.Adam, decay=constant
        )
        right[arm] = accuracy(model, x, y)
        mass[arm] = tuple(map(_mass, model.modules(), unstacked(x, len(seeds))))

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"accuracy, {arm} minus no lexicon", right.minus(arm, NONE), 0.05),
            above(f"accuracy, {arm} minus joined", right.minus(arm, JOINED), 0.0),
        )

    def rule_of_joined(arm: str) -> tuple[Check, ...]:
        return (above(f"accuracy, {arm} minus no lexicon", right.minus(arm, NONE), 0.0),)

    return Findings(
        seeds=seeds,
        parts=(
            Part(rule, AFFINE, knocked_out=(ASTRAY, EVEN), against=(NONE, JOINED)),
            Part(rule_of_joined, JOINED, knocked_out=(JOINED_ASTRAY,), against=(NONE,)),
        ),
        gates=(
            *(gate(arm, above("accuracy", right[arm], CHANCE), losses[arm]) for arm in (NONE, JOINED, AFFINE, EVEN)),
            *(gate(arm, None, losses[arm]) for arm in (ASTRAY, JOINED_ASTRAY)),
        ),
        checks=(
            above("accuracy, concat minus no lexicon", right.minus("concat", NONE), 0.0, in_rule=False),
            above("accuracy, gate minus no lexicon", right.minus("gate", NONE), 0.0, in_rule=False),
        ),
        table=right.table("accuracy") + mass.table("attention on words with feeling"),
        figure=partial(_draw, arms=right),
        notes=(
            "The paper finds the gate the most consistent way. A gate can only rescale the states: the scorer must find a "
            "direction in which they have one sign.",
            "No state is chosen on validation data: all arms train for the same number of steps.",
        ),
    )


@torch.no_grad()
def _mass(model: Any, x: Sentences) -> float:
    weights = model.look(x)[1]
    return float((weights * x.lexicon.squeeze(-1)).sum(1).mean())


def _sentences(seed: int) -> tuple[Sentences, Int[Tensor, "items"]]:
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(WITH + WITHOUT, EMBEDDED, generator=g)
    direction = nn.functional.normalize(torch.randn(EMBEDDED, generator=g), dim=0)
    # the first half of the words with feeling is positive
    sign = torch.where(torch.arange(WITH) < WITH // 2, 1.0, -1.0)
    vectors[:WITH] += 2 * SIGN * sign.unsqueeze(1) * direction
    items = TRAIN + TEST
    y = torch.randint(2, (items,), generator=g)
    words = WITH + torch.randint(WITHOUT, (items, LENGTH), generator=g)
    felt = torch.randint(WITH // 2, (items, 2), generator=g) + (1 - y).unsqueeze(1) * (WITH // 2)
    places = torch.rand(items, LENGTH, generator=g).argsort(1)[:, :2]
    both = torch.rand(items, 1, generator=g) < 0.5
    second = torch.where(both, felt[:, 1:], words.gather(1, places[:, 1:]))
    words = words.scatter(1, places, torch.cat([felt[:, :1], second], 1))
    lexicon = (words < WITH).float().unsqueeze(-1)
    other = torch.randperm(WITH + WITHOUT, generator=g)
    return Sentences(vectors[words], lexicon, (other[words] < WITH).float().unsqueeze(-1)), y


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "accuracy, 400 test sentences")
