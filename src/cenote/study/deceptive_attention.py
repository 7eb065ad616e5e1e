"""Trained with a penalty on the attention to the words that decide, a classifier of embeddings with attention, and one of
BiLSTM states, puts less than 5 % of its attention there, loses less than 3 points of accuracy, and needs the words as
before: without them it loses more than 30 points.

Refuted if attention on the key stays at 5 % or more, if accuracy falls by 30 points or more, or if without the key no more
than 10 points are lost.

A text is 12 random words of 200 types, one place of which holds one of 6 key words that fixes which of two classes it is of.

Knocked out: the word (taken out of the texts in training and test; model, penalty and steps as before), so that accuracy
must be that of guessing; and the aim of the penalty (on one random other word of each text), so that attention must stay on
the key.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from cenote.explain.deceptive_attention.bench import (
    Kind,
    Occlusion,
    audit_attention,
    finds,
    pronoun_task,
    small_classifier,
)
from cenote.explain.deceptive_attention.training import accuracy, train_deceptive
from cenote.explain.fitting import Texts
from cenote.explain.input_gradients import InputGradients
from cenote.explain.shown_attention import ClassifierAttention
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, draw_arms, gate, seeds_of, study

TRAIN = 1000
TEST = 500
BATCH = 50
LEARNING_RATE = 1e-2
LAM = 1.0
BETTER_THAN_GUESSING = 0.6
EPOCHS: dict[Size, dict[str, int]] = {
    "smoke": {"embedding": 2, "bilstm": 1},
    "small": {"embedding": 60, "bilstm": 20},
    "full": {"embedding": 60, "bilstm": 20},
}
MODELS: dict[Kind, str] = {"embedding": "embeddings", "bilstm": "BiLSTM"}
PENALTY, HONEST, OTHERS, REMOVED = "penalty", "no penalty", "penalty on another word", "key taken out"
ARMS = (HONEST, PENALTY, OTHERS, REMOVED)


@study
def run(seed: int, size: Size) -> Findings:
    """Train each model with and without the penalty, and each knock-out; look at attention, accuracy and the key's worth."""
    seeds = seeds_of(seed, size)
    right, mass, lost, blocked, found = Arms(), Arms(), Arms(), Arms(), Arms()
    losses: dict[str, list[tuple[float, ...]]] = {}
    for kind, name in MODELS.items():
        measured = {arm: [_measured(kind, arm, s, EPOCHS[size][kind]) for s in seeds] for arm in ARMS}
        for arm, of_seeds in measured.items():
            for arms, column in ((right, 0), (mass, 1), (lost, 2), (blocked, 3)):
                arms[f"{name}, {arm}"] = tuple(row[column] for row, _, _ in of_seeds)
            losses[f"{name}, {arm}"] = [curve for _, curve, _ in of_seeds]
        for explainer in measured[PENALTY][0][2]:
            found[f"{name}, {explainer}"] = tuple(areas[explainer] for _, _, areas in measured[PENALTY])

    def rule(name: str) -> Any:
        def checks(arm: str) -> tuple[Check, ...]:
            return (
                below(f"attention on the key, {arm}", mass[arm], 0.05),
                above(f"accuracy, {arm} minus {HONEST}", right.minus(arm, f"{name}, {HONEST}"), -0.03, -0.30),
                above(f"accuracy lost without the key, {arm}", lost[arm], 0.30, 0.10),
            )

        return checks

    return Findings(
        seeds=seeds,
        parts=tuple(
            Part(
                rule(name),
                f"{name}, {PENALTY}",
                knocked_out=(f"{name}, {OTHERS}", f"{name}, {REMOVED}"),
                against=(f"{name}, {HONEST}",),
            )
            for name in MODELS.values()
        ),
        gates=tuple(
            g
            for name in MODELS.values()
            for g in (
                *(
                    gate(
                        f"{name}, {arm}",
                        above("accuracy", right[f"{name}, {arm}"], BETTER_THAN_GUESSING),
                        losses[f"{name}, {arm}"],
                    )
                    for arm in (PENALTY, HONEST, OTHERS)
                ),
                # it goes on learning its texts by heart for as long as it is trained
                gate(f"{name}, {REMOVED}", None, losses[f"{name}, {REMOVED}"], allowed=1.0),
            )
        ),
        checks=(
            *(
                above(f"attention on the key, {name}, {HONEST}", mass[f"{name}, {HONEST}"], 0.50, in_rule=False)
                for name in MODELS.values()
            ),
            *(above(f"area under ROC of finding the key, {arm}", found[arm], 0.9, 0.6, in_rule=False) for arm in found),
        ),
        table=right.table("accuracy")
        + mass.table("attention on the key")
        + lost.table("accuracy lost without the key")
        + blocked.table("accuracy with attention on the key set to 0")
        + found.table("area under ROC of finding the key"),
        figure=partial(_draw, mass=mass, right=right),
        notes=(
            "The seeds differ in texts, initialisation and order of training.",
            "Of two classes one can be told by what is not there: where a model does so, its key has no part in the decision, "
            "and no explanation finds it. The bench of this system has a third class, without a key, for that reason.",
        ),
    )


def _measured(
    kind: Kind, arm: str, seed: int, epochs: int
) -> tuple[tuple[float, ...], tuple[float, ...], dict[str, float]]:
    """Accuracy, mass on the key, accuracy lost without it and accuracy with it blocked; losses; areas of finding it."""
    generator = torch.Generator().manual_seed(seed)
    train, test = pronoun_task(TRAIN, generator), pronoun_task(TEST, generator)
    read = train.without_marked() if arm == REMOVED else _elsewhere(train, generator) if arm == OTHERS else train
    model = small_classifier(kind, seed)
    lam = 0.0 if arm == HONEST else LAM
    fitted = train_deceptive(model, read, lam=lam, epochs=epochs, batch=BATCH, lr=LEARNING_RATE, random_state=seed)
    if arm == REMOVED:
        right = accuracy(model, test.without_marked())
        return (right, 0.0, 0.0, right), fitted.losses, {}
    audit = audit_attention(model, test)
    areas = _areas(model, test) if arm == PENALTY else {}
    return (audit.accuracy, audit.mass, audit.accuracy - audit.removed, audit.blocked), fitted.losses, areas


def _areas(model: nn.Module, test: Texts) -> dict[str, float]:
    explainers = {
        "attention": ClassifierAttention(),
        "norms": ClassifierAttention("norms"),
        "gradient times input": InputGradients(),
        "integrated gradients": InputGradients("integrated"),
        "occlusion": Occlusion(),
    }
    return {name: float(finds(e.explain(model, test.inputs), test.marked).mean()) for name, e in explainers.items()}


def _elsewhere(texts: Texts, generator: torch.Generator) -> Texts:
    """One random word that is no key is marked in each text."""
    place = torch.rand(texts.marked.shape, generator=generator).masked_fill(texts.marked | ~texts.mask, -1.0).argmax(1)
    return texts._replace(marked=nn.functional.one_hot(place, texts.mask.shape[1]).bool())


def _draw(figure: Any, mass: Arms, right: Arms) -> None:
    left, other = figure.subplots(1, 2)
    draw_arms(left, mass, "attention on the key")
    draw_arms(other, right, "accuracy")
