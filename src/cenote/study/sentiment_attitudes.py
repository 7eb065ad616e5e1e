"""Attention makes encoders of an attitude between two entities better: in at least two of three comparisons (bidirectional LSTM
with Zhou's or Yang's attention against its last states; convolutions with attention asked by the entities against none).

Refuted if in the median of the three comparisons attention does not raise the macro F1.

A sentence has 18 terms, two entities with the frame that counts (positive, negative, or none: three classes) between them, and
two frames of random polarity outside. Terms are embedded with their distances to both entities.

Knocked out: the attention of all three (what scores the terms is 0 and frozen, so that every term weighs the same).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import AttitudeBatch, AttitudeModel, TermVectors, ZhouAttention
from cenote.pool.sequence.sentiment_attitudes.models import Name
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.batches import split_at, stacked, unstacked
from cenote.study.harness.training import Together, cross_entropy, epochs, fit

TERMS, EMBEDDED, PLACED, HIDDEN, CLASSES = 18, 16, 4, 16, 3
FRAMES, NEUTRAL = 20, 80
ENTITY = 2 * FRAMES + NEUTRAL
ITEMS: dict[Size, tuple[int, int]] = {"smoke": (64, 64), "small": (2000, 1000), "full": (4000, 1000)}
STEPS: dict[Size, int] = {"smoke": 2, "small": 600, "full": 1200}
SEEDS = {"small": 3, "full": 10}
# a guess without looking has a macro F1 of about a third
GUESS = 0.34
PAIRS = (("LSTM + Zhou", "LSTM"), ("LSTM + Yang", "LSTM"), ("CNN + MLP", "CNN"))
EVEN = ", uniform weights"
FAMILIES = {"attention": PAIRS, "uniform weights": tuple((arm + EVEN, bare) for arm, bare in PAIRS)}
ARMS = ("LSTM", "CNN", *(arm for pairs in FAMILIES.values() for arm, _ in pairs))


class Sentences(NamedTuple):
    """Terms, and the places of the two entities among them."""

    terms: Int[Tensor, "*items terms"]
    entities: Int[Tensor, "*items 2"]


class Reader(nn.Module):
    """The whole model of an arm, without dropout; where all terms weigh the same, what scores them is 0 and frozen."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        vectors = TermVectors(ENTITY + 2, EMBEDDED, reach=TERMS, placed=PLACED)
        self.model = AttitudeModel(
            _model_of(arm.removesuffix(EVEN)),
            vectors,
            filters=2 * HIDDEN,
            hidden=HIDDEN,
            attention_hidden=32,
            dropout=0.0,
            dropout_states=0.0,
        )
        if arm.endswith(EVEN):
            attention, keyed = self.model.attention, self.model.keyed
            scored_by = cast(ZhouAttention, attention).u if keyed is None else keyed.score.weight
            nn.init.zeros_(scored_by).requires_grad_(False)

    def forward(self, x: Sentences) -> Float[Tensor, "batch classes"]:
        return self.model(AttitudeBatch(*x))

    def weights(self, x: Sentences) -> Float[Tensor, "batch rows terms"] | None:
        """What attention from the text alone took from each term."""
        return None if self.model.attention is None else self.model.attend(AttitudeBatch(*x)).weights


def _model_of(arm: str) -> Name:
    """What the system calls the model of an arm."""
    names: dict[str, Name] = {
        "LSTM + Zhou": "bilstm-zhou",
        "LSTM + Yang": "bilstm-yang",
        "CNN + MLP": "att-cnn",
        "LSTM": "bilstm",
        "CNN": "cnn",
    }
    return names[arm]


@study
def run(seed: int, size: Size) -> Findings:
    """Train every encoder with and without attention; compare macro F1, and look where the attention lies."""
    seeds = seeds_of(seed, size, **SEEDS)
    count = ITEMS[size]
    train, (x, y) = split_at(stacked(_sentences(s, sum(count)) for s in seeds), count[0])
    arms, mass, losses = Arms(), Arms(), {}
    for arm in ARMS:
        model = Together(partial(Reader, arm), seeds, in_turn=True)
        fit(model, epochs(*train, 64, seeds), cross_entropy, STEPS[size], lr=5e-3)
        modules, losses[arm] = model.modules(), model.losses
        own = unstacked(x, len(seeds))
        arms[arm] = tuple(map(_macro_f1, modules, own, y))
        if modules[0].model.attention is not None and not arm.endswith(EVEN):
            mass[arm] = tuple(map(_more_than_share, modules, own))
    gains = {name: [arms.minus(arm, bare) for arm, bare in pairs] for name, pairs in FAMILIES.items()}

    def rule(family: str) -> tuple[Check, ...]:
        middle = tuple(sorted(of_seed)[1] for of_seed in zip(*gains[family], strict=True))
        return (above(f"macro F1, median gain of the three comparisons, {family}", middle, expected=0.0),)

    without = [
        above(f"macro F1, {arm} minus that with{EVEN[1:]}", arms.minus(arm, arm + EVEN), 0.0, in_rule=False)
        for arm, _ in PAIRS
    ]
    in_place = {"LSTM": ["LSTM"], "CNN": ["CNN"]} | {
        name: [arm for arm, _ in pairs] for name, pairs in FAMILIES.items()
    }
    each = [
        above(f"macro F1, {a} minus {b}", gain, 0.0, in_rule=False)
        for (a, b), gain in zip(PAIRS, gains["attention"], strict=True)
    ]
    shares = [above(f"weight on frames minus their share, {arm}", mass[arm], 0.0, in_rule=False) for arm in mass]
    return Findings(
        seeds=seeds,
        parts=(Part(rule, "attention", knocked_out=("uniform weights",), against=("LSTM", "CNN")),),
        gates=tuple(
            gate(name, above(f"macro F1, {arm}", arms[arm], GUESS), losses[arm])
            for name, of_name in in_place.items()
            for arm in of_name
        ),
        checks=(*each, *without, *shares),
        table=arms.table("macro F1") + mass.table("weight on frames minus their share"),
        figure=partial(_draw, arms=arms),
        notes=("Sentences made from a template: nothing of RuSentRel or of documents is checked.",),
    )


def _sentences(seed: int, count: int) -> tuple[Sentences, Int[Tensor, "items"]]:
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    ids = draw(2 * FRAMES, ENTITY, count, TERMS)
    first = draw(3, TERMS - 9, count)
    second = first + draw(4, 7, count)
    y = draw(0, CLASSES, count)
    frame = torch.where(y == 2, draw(2 * FRAMES, ENTITY, count), y * FRAMES + draw(0, FRAMES, count))
    rows = torch.arange(count)
    ids[rows, first], ids[rows, second] = ENTITY, ENTITY + 1
    ids[rows, first + 1 + (torch.rand(count, generator=g) * (second - first - 1)).long()] = frame
    ids[rows, (torch.rand(count, generator=g) * first).long()] = draw(0, 2 * FRAMES, count)
    ids[rows, second + 1 + (torch.rand(count, generator=g) * (TERMS - 1 - second)).long()] = draw(0, 2 * FRAMES, count)
    return Sentences(ids, torch.stack([first, second], 1)), y


@torch.no_grad()
def _macro_f1(model: Any, x: Sentences, y: Tensor) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(y.numpy(), model(x).argmax(-1).numpy(), average="macro", zero_division=0))


@torch.no_grad()
def _more_than_share(model: Any, x: Sentences) -> float:
    weights = model.weights(x).squeeze(1)
    frames = (x.terms < 2 * FRAMES).float()
    return float((weights * frames).sum(1).mean() - frames.mean())


def _draw(figure: Any, arms: Arms) -> None:
    draw_arms(figure.subplots(), arms, "macro F1, test sentences")
