"""Attitudes of whole documents: votes over contexts, and the measure of the task.

Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cenote.core.errors import InputError
from cenote.pool.sequence.sentiment_attitudes.terms import NEUTRAL, Context

Attitudes = Mapping[str, Mapping[tuple[str, str], str]]
"""From a document to the attitude of each pair of names, neutral ones included."""


class AttitudeScores(NamedTuple):
    """How well the attitudes of documents are found.

    Attributes:
        f1: mean of both below.
        positive, negative: mean over the documents of the F1 of each.
    """

    f1: float
    positive: float
    negative: float


def document_attitudes(contexts: Sequence[Context], labels: Sequence[str]) -> dict[str, dict[tuple[str, str], str]]:
    """The attitude of each pair of a document, by vote over its contexts; positive and negative in equal number are neutral.

    A neutral context votes too; where it has as many votes as one of the others, that other counts.

    Args:
        contexts: of any number of documents.
        labels: of each.

    Raises:
        InputError: where there are not as many labels.

    Example:
        >>> context = Context(("A", "B"), ("entity",) * 2, 0, 1, (), (), (), ("a", "b"), "text 1")
        >>> document_attitudes([context] * 3, ["positive", "neutral", "positive"])
        {'text 1': {('a', 'b'): 'positive'}}

    Note:
        That contexts vote is a reading of the task; how ties are settled is ours.
    """
    if len(labels) != len(contexts):
        raise InputError(f"labels: expected one for each of {len(contexts)} contexts, got {len(labels)}")
    votes: dict[str, dict[tuple[str, str], Counter[str]]] = {}
    for context, label in zip(contexts, labels, strict=True):
        votes.setdefault(context.document, {}).setdefault(context.pair, Counter())[label] += 1
    return {doc: {pair: _elected(count) for pair, count in pairs.items()} for doc, pairs in votes.items()}


def attitude_f1(found: Attitudes, truth: Attitudes) -> AttitudeScores:
    """F1 of positive and of negative attitudes, in each document, then the mean over all documents and over both.

    A document without attitudes of a sign in the truth counts 1 for it where none is found, else 0; documents in which no pair
    is neutral, or nothing was found at all, count as the others.

    Args:
        found: attitudes by document.
        truth: likewise; its documents are those that count.

    Raises:
        InputError: where there is no document.

    Example:
        >>> truth = {"d": {("a", "b"): "positive", ("b", "a"): "neutral", ("a", "c"): "negative"}}
        >>> attitude_f1({"d": {("a", "b"): "positive", ("b", "a"): "positive"}}, truth)
        AttitudeScores(f1=0.3333333333333333, positive=0.6666666666666666, negative=0.0)

    Source: Rusnachenko, Loukachevitch, "Studying Attention Models in Sentiment Attitude Extraction Task", NLDB 2020; documents
    without neutral answers count, as since the repair of their evaluation of 2020-12-18.
    """
    if not truth:
        raise InputError("truth: expected at least one document, got none")
    means = []
    for sign in ("positive", "negative"):
        by_document = []
        for document, pairs in truth.items():
            wanted = {pair for pair, label in pairs.items() if label == sign}
            given = {pair for pair, label in found.get(document, {}).items() if label == sign}
            both = len(wanted & given)
            total = len(wanted) + len(given)
            by_document.append(2 * both / total if total else 1.0)
        means.append(sum(by_document) / len(by_document))
    return AttitudeScores(sum(means) / 2, *means)


def folds_of_documents(contexts: Sequence[Context], folds: int = 3) -> list[list[str]]:
    """Documents in folds with about as many contexts each: the largest document first, each to the smallest fold so far.

    Args:
        contexts: of at least as many documents.
        folds: 3 in the paper.

    Raises:
        InputError: where there are fewer documents.

    Example:
        >>> contexts = [Context((), (), 0, 1, (), (), (), ("a", "b"), name) for name in "aaabbcd"]
        >>> folds_of_documents(contexts, 2)
        [['a', 'd'], ['b', 'c']]
    """
    sizes = Counter(context.document for context in contexts)
    if not 1 <= folds <= len(sizes):
        raise InputError(f"folds: expected 1 to {len(sizes)}, the number of documents, got {folds}")
    found: list[list[str]] = [[] for _ in range(folds)]
    for document in sorted(sizes, key=lambda name: (-sizes[name], name)):
        min(found, key=lambda fold: sum(sizes[name] for name in fold)).append(document)
    return found


def _elected(votes: Counter[str]) -> str:
    signs = {label: count for label, count in votes.items() if label != NEUTRAL}
    most = max(signs.values(), default=0)
    winners = [label for label, count in signs.items() if count == most]
    return winners[0] if len(winners) == 1 and most >= votes[NEUTRAL] else NEUTRAL
