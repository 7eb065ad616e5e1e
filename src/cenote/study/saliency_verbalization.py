"""A reader who sees only the words of the verbalised summary, 8 at most, agrees with the explained classifier more often than
one who sees a random run of 8 words (by more than 5 points), and these words have at least twice its coverage.

Refuted if the agreement is no higher than with random runs, or if the coverage is no higher.

A text is 40 words: two runs of three words that speak for its class, one word that speaks for the other, and words that say
nothing. The explained classifier is linear in the words, so that its attributions are exact; the reader is another such
classifier, trained on other texts.

Knocked out: the places of the attributions (the same values, permuted over the words of each text; coverage by the true ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cenote.explain.saliency_verbalization.readers import (
    contiguity,
    first_words,
    random_span,
    simulatability,
    top_words,
)
from cenote.explain.saliency_verbalization.searches import coverage
from cenote.explain.saliency_verbalization.verbalizer import SaliencyVerbalizer
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study

WORDS = 40
BUDGET = 8
SPEAKING = 60
SILENT = 300
RUN = 3
RIGHT_SIDE = 0.95
TRAIN = 400
ABLE = 0.75
TEST: dict[Size, int] = {"smoke": 20, "small": 300, "full": 1000}

SUMMARY, RANDOM, FIRST, TOP, SHUFFLED = (
    "summary",
    "random run",
    "first words",
    "top words",
    "summary of permuted attributions",
)


class Corpus(NamedTuple):
    """Texts as numbers of words, and their classes."""

    texts: list[list[int]]
    labels: list[int]


@study
def run(seed: int, size: Size) -> Findings:
    """Explain a linear classifier's decisions, choose words by each arm, and let a reader guess the decision from these."""
    seeds = seeds_of(seed, size)
    agreement, covered, joined, counts, able = Arms(), Arms(), Arms(), Arms(), Arms()
    by_seed = [_measured(s, TEST[size]) for s in seeds]
    for arm in (SUMMARY, RANDOM, FIRST, TOP, SHUFFLED):
        for arms, column in ((agreement, 0), (covered, 1), (joined, 2), (counts, 3)):
            arms[arm] = tuple(found[arm][column] for found, _ in by_seed)
        able[arm] = tuple(least for _, least in by_seed)
    twice = {arm: [a - 2 * b for a, b in zip(covered[arm], covered[RANDOM], strict=True)] for arm in covered}

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"agreement, {arm} minus {RANDOM}", agreement.minus(arm, RANDOM), 0.05, 0.0),
            above(f"coverage, {arm} minus twice that of {RANDOM}", twice[arm], 0.0, -np.inf),
            above(f"coverage, {arm} minus {RANDOM}", covered.minus(arm, RANDOM), 0.0),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, SUMMARY, knocked_out=(SHUFFLED,), against=(RANDOM,)),),
        gates=(
            *(
                gate(arm, above("accuracy of classifier and reader", able[arm], ABLE), None)
                for arm in (SUMMARY, RANDOM)
            ),
            gate(SHUFFLED, None, None),
        ),
        checks=(
            above(f"agreement, {SUMMARY} minus {FIRST}", agreement.minus(SUMMARY, FIRST), 0.0, in_rule=False),
            above(f"agreement, {TOP} minus {SUMMARY}", agreement.minus(TOP, SUMMARY), 0.0, in_rule=False),
            above(f"contiguity, {SUMMARY} minus {TOP}", joined.minus(SUMMARY, TOP), 0.0, in_rule=False),
        ),
        table=agreement.table("agreement of the reader")
        + covered.table("coverage")
        + joined.table("contiguity")
        + counts.table("words"),
        figure=partial(_draw, agreement=agreement),
        notes=(
            "The seeds differ in the texts, and so in both classifiers.",
            "The best words need not stand together: what sentences add is that they can be read.",
        ),
    )


def _measured(seed: int, items: int) -> tuple[dict[str, tuple[float, float, float, float]], float]:
    """Of each arm agreement, coverage, contiguity and words; the smaller accuracy of the two classifiers."""
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(seed)
    own, others, test = (corpus(n, generator) for n in (TRAIN, TRAIN, items))
    model, reader = (LogisticRegression().fit(_counts(c.texts), c.labels) for c in (own, others))
    said = model.predict(_counts(test.texts)).tolist()
    least = min(float(m.score(_counts(test.texts), test.labels)) for m in (model, reader))
    verbalizer = SaliencyVerbalizer(maxwords=BUDGET, mincoverage=0.0)
    chosen: dict[str, list[Sequence[int]]] = {arm: [] for arm in (SUMMARY, RANDOM, FIRST, TOP, SHUFFLED)}
    scores = []
    for n, (text, label) in enumerate(zip(test.texts, said, strict=True)):
        a = (model.coef_[0][text] * (2 * label - 1)).tolist()
        names = [str(w) for w in text]
        scores.append(a)
        chosen[SUMMARY].append(verbalizer.verbalize(names, a).indices)
        chosen[SHUFFLED].append(verbalizer.verbalize(names, generator.permutation(a).tolist()).indices)
        chosen[RANDOM].append(random_span(len(text), BUDGET, items * seed + n))
        chosen[FIRST].append(first_words(len(text), BUDGET))
        chosen[TOP].append(top_words(a, BUDGET))
    words = [[str(w) for w in t] for t in test.texts]

    def read(seen: Sequence[str]) -> int:
        return int(reader.predict(_counts([[int(w) for w in seen]]))[0])

    found = {}
    for arm, of_texts in chosen.items():
        agreed = simulatability(read, words, of_texts, said)
        shares = [coverage(i, a) for i, a in zip(of_texts, scores, strict=True)]
        together, many = [contiguity(i) for i in of_texts], [len(i) for i in of_texts]
        found[arm] = agreed, float(np.mean(shares)), float(np.mean(together)), float(np.mean(many))
    return found, least


def corpus(items: int, generator: np.random.Generator) -> Corpus:
    """Texts of two classes; the first words of the vocabulary speak for class 0, the next for class 1, each as a rule.

    >>> made = corpus(3, np.random.default_rng(0))
    >>> [len(t) for t in made.texts]
    [40, 40, 40]
    """
    texts, labels = [], generator.integers(2, size=items).tolist()
    half = SPEAKING // 2
    for label in labels:
        text = generator.integers(SPEAKING, SPEAKING + SILENT, size=WORDS)
        starts = generator.choice(WORDS // RUN, size=2, replace=False) * RUN
        for start in starts:
            side = label if generator.random() < RIGHT_SIDE else 1 - label
            text[start : start + RUN] = generator.integers(half, size=RUN) + half * side
        free = [i for i in range(WORDS) if text[i] >= SPEAKING]
        text[generator.choice(free)] = generator.integers(half) + half * (1 - label)
        texts.append(text.tolist())
    return Corpus(texts, labels)


def _counts(texts: Sequence[Sequence[int]]) -> np.ndarray:
    found = np.zeros((len(texts), SPEAKING + SILENT))
    for row, text in zip(found, texts, strict=True):
        np.add.at(row, list(text), 1.0)
    return found


def _draw(figure: Any, agreement: Arms) -> None:
    draw_arms(figure.subplots(), agreement, f"agreement of a reader of at most {BUDGET} words with the classifier")
