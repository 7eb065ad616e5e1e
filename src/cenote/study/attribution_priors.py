"""Trained to attend to what a class-aware prior marks, a student of few texts is right more often where a spurious word
misleads than one trained on labels alone (by more than 2 points), than one with a class-blind prior and than one with a
random prior, and more of its attribution lies on the word that tells confusable classes apart (by more than 5 points).

Refuted if in misleading texts it is right no more often than any of the three, or if no more of its attribution lies on
that word.

A class is a topic and an action. A text has three words of its topic, which three classes share, one word of its action,
words that say nothing, and a word that goes with the class in nine of ten training texts, and in the misleading texts with
another class. The scorer knows how texts are made, but for that word.

Knocked out: the contrast to the other classes (the same masks, ridge and loss on the likelihood of the class alone), and
the places of the prior (its values permuted over the words of each text).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cenote.explain.attention_classifiers import attention_classifier
from cenote.explain.attribution_priors.priors import class_aware_prior, hybrid_prior, random_prior
from cenote.explain.attribution_priors.training import attribution_mass, train_with_priors
from cenote.explain.deceptive_attention.training import accuracy
from cenote.explain.fitting import Texts
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study

TOPICS = 3
ACTIONS = 3
CLASSES = TOPICS * ACTIONS
WORDS_OF_TOPIC = 6
WORDS_OF_ACTION = 3
SILENT = 60
TOPIC_WORDS = 3
LENGTH = 10
PER_CLASS = 8
TEST_PER_CLASS = 40
SPURIOUS = 0.9
KNOWN = 6.0
WIDTH = 32
LAM = 1.0
BATCH = 16
LEARNING_RATE = 5e-3
BETTER_THAN_GUESSING = 0.22
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 120, "full": 120}

FIRST_ACTION = 1 + TOPICS * WORDS_OF_TOPIC
FIRST_SPURIOUS = FIRST_ACTION + ACTIONS * WORDS_OF_ACTION
FIRST_SILENT = FIRST_SPURIOUS + CLASSES
VOCABULARY = FIRST_SILENT + SILENT

NONE, AWARE, BLIND, PERMUTED, RANDOM, HYBRID = (
    "no prior",
    "class-aware prior",
    "class-blind prior",
    "permuted prior",
    "random prior",
    "hybrid with LIME",
)
ARMS = (NONE, AWARE, BLIND, PERMUTED, RANDOM, HYBRID)


@study
def run(seed: int, size: Size) -> Findings:
    """Train a student with each prior on a few texts; test it where the spurious word helps and where it misleads."""
    seeds = seeds_of(seed, size)
    clean, misled, mass = Arms(), Arms(), Arms()
    losses: dict[str, list[tuple[float, ...]]] = {}
    for arm in ARMS:
        of_seeds = [_measured(arm, s, EPOCHS[size]) for s in seeds]
        for arms, column in ((clean, 0), (misled, 1), (mass, 2)):
            arms[arm] = tuple(row[column] for row, _ in of_seeds)
        losses[arm] = [curve for _, curve in of_seeds]

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"accuracy where misled, {arm} minus {NONE}", misled.minus(arm, NONE), 0.02, 0.0),
            above(f"accuracy where misled, {arm} minus {BLIND}", misled.minus(arm, BLIND), 0.0),
            above(f"accuracy where misled, {arm} minus {RANDOM}", misled.minus(arm, RANDOM), 0.0),
            above(f"attribution on the action's word, {arm} minus {NONE}", mass.minus(arm, NONE), 0.05, 0.0),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, AWARE, knocked_out=(BLIND, PERMUTED), against=(NONE, RANDOM)),),
        gates=tuple(
            gate(arm, above("accuracy where not misled", clean[arm], BETTER_THAN_GUESSING), losses[arm])
            for arm in (AWARE, NONE, RANDOM, BLIND, PERMUTED)
        ),
        checks=(
            above(f"accuracy where misled, {HYBRID} minus {AWARE}", misled.minus(HYBRID, AWARE), 0.0, in_rule=False),
        ),
        table=clean.table("accuracy where not misled")
        + misled.table("accuracy where misled")
        + mass.table("attribution on the action's word"),
        figure=partial(_draw, misled=misled, mass=mass),
        notes=(
            "The seeds differ in texts, masks, initialisation and order of training.",
            "How the paper defines its prior is not known in full; `class_aware_prior` is a reconstruction.",
        ),
    )


def intents(per_class: int, right: float, generator: torch.Generator) -> Texts:
    """Texts of all classes, whose spurious word is that of their class with a chance `right`, else of another; the word of the
    action is marked.

    >>> texts = intents(2, 0.9, torch.Generator().manual_seed(0))
    >>> texts.input_ids.shape, texts.marked.sum(1).unique().tolist()
    (torch.Size([18, 10]), [1])
    """
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    items = len(labels)

    def drawn(most: int, count: int) -> Tensor:
        return torch.randint(most, (items, count), generator=generator)

    topic = 1 + WORDS_OF_TOPIC * (labels // ACTIONS)[:, None] + drawn(WORDS_OF_TOPIC, TOPIC_WORDS)
    action = FIRST_ACTION + WORDS_OF_ACTION * (labels % ACTIONS)[:, None] + drawn(WORDS_OF_ACTION, 1)
    other = (labels + 1 + drawn(CLASSES - 1, 1)[:, 0]) % CLASSES
    own = torch.rand(items, generator=generator) < right
    spurious = FIRST_SPURIOUS + torch.where(own, labels, other)[:, None]
    silent = FIRST_SILENT + drawn(SILENT, LENGTH - TOPIC_WORDS - 2)
    ids = torch.cat([action, spurious, topic, silent], 1)
    order = torch.rand(items, LENGTH, generator=generator).argsort(1)
    return Texts(ids.gather(1, order), torch.ones_like(ids, dtype=torch.bool), labels, order == 0)


def log_likelihoods(texts: Sequence[str]) -> Tensor:
    """Of each class, over that of words that say nothing; what the scorer knows.

    >>> log_likelihoods(["1"]).tolist()
    [[6.0, 6.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    found = torch.zeros(len(texts), CLASSES, dtype=torch.float64)
    classes = torch.arange(CLASSES)
    for row, text in zip(found, texts, strict=True):
        for word in map(int, text.split()):
            if word < FIRST_ACTION:
                row += KNOWN * (classes // ACTIONS == (word - 1) // WORDS_OF_TOPIC)
            elif word < FIRST_SPURIOUS:
                row += KNOWN * (classes % ACTIONS == (word - FIRST_ACTION) // WORDS_OF_ACTION)
    return found


def _priors(arm: str, train: Texts, seed: int) -> Tensor | None:
    if arm == NONE:
        return None
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for n, (ids, label) in enumerate(zip(train.input_ids.tolist(), train.labels.tolist(), strict=True)):
        words = [str(w) for w in ids]
        if arm == RANDOM:
            found.append(random_prior(LENGTH, 1000 * seed + n))
            continue
        against = "none" if arm == BLIND else "nearest"
        prior = class_aware_prior(log_likelihoods, words, label, against=against, random_state=n)  # type: ignore[arg-type]
        if arm == PERMUTED:
            prior = prior[torch.randperm(LENGTH, generator=generator)]
        elif arm == HYBRID:
            lime = class_aware_prior(_posterior, words, label, against="probability", random_state=n)
            prior = hybrid_prior([prior, lime])
        found.append(prior)
    return torch.stack(found)


def _posterior(texts: Sequence[str]) -> Tensor:
    return log_likelihoods(texts).log_softmax(1)


def _measured(arm: str, seed: int, epochs: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Accuracy where the spurious word helps and where it misleads, attribution on the action's word; losses."""
    generator = torch.Generator().manual_seed(seed)
    train = intents(PER_CLASS, SPURIOUS, generator)
    same, other = intents(TEST_PER_CLASS, SPURIOUS, generator), intents(TEST_PER_CLASS, 1 - SPURIOUS, generator)
    model = attention_classifier(VOCABULARY, CLASSES, dim=WIDTH, scorer="additive", random_state=seed)
    fitted = train_with_priors(
        model,
        train,
        _priors(arm, train, seed),
        lam=LAM,
        epochs=epochs,
        batch=BATCH,
        lr=LEARNING_RATE,
        random_state=seed,
    )
    mass = float(attribution_mass(model, other).mean())
    return (accuracy(model, same), accuracy(model, other), mass), fitted.losses


def _draw(figure: Any, misled: Arms, mass: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, misled, "accuracy where misled")
    draw_arms(right, mass, "attribution on the action's word")
