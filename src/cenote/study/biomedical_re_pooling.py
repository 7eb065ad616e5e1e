"""Where the word that names a relation stands on the way between two mentions in the dependency tree, pooling that way
(ENT-DEP0) classifies the relation better than pooling the pieces of the sentence that the mentions cut (ENT-DYM).

Refuted if ENT-DEP0 is not above ENT-DYM there. A control shows that the claim is not built in: where the word stands beside a
mention in the text instead, ENT-DYM should win; it is reported only.

Sentences are 14 random words under a random tree, with two one-word mentions, one trigger word of three classes in the place
that counts and two triggers of other classes elsewhere. A bidirectional LSTM with embeddings of the distance to both mentions
reads them; only the pooling differs.

Knocked out: whose tree it is (each sentence has that of another sentence, in training and test), and the way (as many random
words of the sentence stand in for it; the mentions as before).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import DependencyPool, DynamicPool, EntityPool, IndexSetPool, RelationSentences
from cenote.pool.sequence.biomedical_re_pooling.pools import IndexSets
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.batches import split_at, stacked
from cenote.study.harness.training import Together, accuracy, cross_entropy, epochs, fit

WORDS, HIDDEN, EMBEDDED = 14, 16, 16
CLASSES, OF_CLASS, NEUTRAL = 3, 3, 60
MENTIONS = CLASSES * OF_CLASS + NEUTRAL
ITEMS: dict[Size, tuple[int, int]] = {"smoke": (64, 64), "small": (800, 400), "full": (2000, 1000)}
STEPS: dict[Size, int] = {"smoke": 2, "small": 300, "full": 1500}
SEEDS = {"small": 3, "full": 10}
CHANCE = 1 / CLASSES


class WholeSentence(IndexSetPool):
    """SENT-MAX: one set, all words."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        return [sentences.real], torch.zeros_like(sentences.real[:, 0])


class AnotherTree(DependencyPool):
    """ENT-DEP0 in the tree of another sentence of the batch."""

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        assert sentences.heads is not None
        return super().index_sets(sentences._replace(heads=sentences.heads.roll(1, 0)))


class RandomWords(DependencyPool):
    """ENT-DEP0 with as many words as the way has, drawn from the sentence."""

    def index_sets(self, sentences: RelationSentences) -> IndexSets:
        (subject, object_, way), fallback = super().index_sets(sentences)
        rank = torch.rand(way.shape).argsort(1).argsort(1)
        return [subject, object_, rank < way.sum(1, keepdim=True)], fallback


ANOTHER, RANDOM = "ENT-DEP0, tree of another sentence", "ENT-DEP0, random words"
POOLS: dict[str, Callable[[], IndexSetPool]] = {
    "SENT-MAX": partial(WholeSentence, 2 * HIDDEN),
    "ENT-SENT": partial(EntityPool, 2 * HIDDEN),
    "ENT-DYM": partial(DynamicPool, 2 * HIDDEN),
    "ENT-DEP0": partial(DependencyPool, 2 * HIDDEN, 0),
    "ENT-DEP1": partial(DependencyPool, 2 * HIDDEN, 1),
    ANOTHER: partial(AnotherTree, 2 * HIDDEN, 0),
    RANDOM: partial(RandomWords, 2 * HIDDEN, 0),
}


class Sentences(NamedTuple):
    """Words, the head of each in the tree (-1 for the root), and the places of the two mentions."""

    words: Int[Tensor, "*items words"]
    heads: Int[Tensor, "*items words"]
    mentions: Int[Tensor, "*items 2"]


class Reader(nn.Module):
    """Embeddings of words and distances, LSTM, pool, linear."""

    def __init__(self, pool: IndexSetPool) -> None:
        super().__init__()
        self.words = nn.Embedding(MENTIONS + 2, EMBEDDED)
        self.places = nn.Embedding(2 * WORDS, 4)
        self.lstm = nn.LSTM(EMBEDDED + 8, HIDDEN, batch_first=True, bidirectional=True)
        self.pool = pool
        self.classifier = nn.Linear(pool.out_dim, CLASSES)

    def forward(self, x: Sentences) -> Float[Tensor, "batch classes"]:
        mentions = x.mentions.split(1, 1)
        near = [self.places(torch.arange(WORDS) - mention + WORDS) for mention in mentions]
        states, _ = self.lstm(torch.cat([self.words(x.words), *near], -1))
        spans = [torch.cat([mention, mention + 1], 1) for mention in mentions]
        return self.classifier(self.pool(states, *spans, x.heads))


@study
def run(seed: int, size: Size) -> Findings:
    """Classify relations whose word stands on the tree's path, and relations whose word stands beside a mention."""
    seeds = seeds_of(seed, size, **SEEDS)
    count = ITEMS[size]
    arms: dict[str, Arms] = {}
    losses: dict[str, dict[str, list[float]]] = {"tree": {}, "text": {}}
    for task in ("tree", "text"):
        train, test = split_at(stacked(_sentences(s, task, sum(count)) for s in seeds), count[0])
        arms[task] = Arms()
        for name, pool in POOLS.items():
            model = Together(lambda pool=pool: Reader(pool()), seeds, in_turn=True)  # type: ignore[misc]
            losses[task][name] = fit(model, epochs(*train, 64, seeds), cross_entropy, STEPS[size], lr=1e-2)
            arms[task][name] = accuracy(model, *test)
    tree, text = arms["tree"], arms["text"]
    reported = (
        ("word on the path: accuracy, ENT-DYM minus ENT-SENT", tree.minus("ENT-DYM", "ENT-SENT")),
        ("word on the path: accuracy, ENT-SENT minus SENT-MAX", tree.minus("ENT-SENT", "SENT-MAX")),
        ("word beside a mention: accuracy, ENT-DYM minus ENT-DEP0", text.minus("ENT-DYM", "ENT-DEP0")),
    )

    def rule(arm: str) -> tuple[Check, ...]:
        return (above(f"word on the path: accuracy, {arm} minus ENT-DYM", tree.minus(arm, "ENT-DYM"), 0.0),)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, "ENT-DEP0", knocked_out=(ANOTHER, RANDOM), against=("ENT-DYM",)),),
        gates=(
            gate("ENT-DEP0", above("word on the path: accuracy", tree["ENT-DEP0"], CHANCE), losses["tree"]["ENT-DEP0"]),
            # nothing that it reads tells where the path is, so it is asked for what stands in the text
            gate(
                "ENT-DYM", above("word beside a mention: accuracy", text["ENT-DYM"], CHANCE), losses["text"]["ENT-DYM"]
            ),
            *(gate(arm, None, losses["tree"][arm]) for arm in (ANOTHER, RANDOM)),
        ),
        checks=tuple(above(what, values, 0.0, in_rule=False) for what, values in reported),
        table=tree.table("accuracy, word on the path of the tree") + text.table("accuracy, word beside a mention"),
        figure=partial(_draw, arms=arms),
        notes=("The trees are random and exact: what errors of a parser cost is not seen here.",),
    )


def _sentences(seed: int, task: str, count: int) -> tuple[Sentences, Int[Tensor, "items"]]:
    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int], list[int]]] = []
    labels: list[int] = []
    while len(rows) < count:
        heads = _tree(rng)
        subject, object_ = rng.sample(range(WORDS), 2)
        path = _path(heads, subject, object_)[1:-1]
        beside = {m + d for m in (subject, object_) for d in (-1, 1)} - {subject, object_}
        free = [n for n in range(WORDS) if n not in (subject, object_) and n not in path and n not in beside]
        # on the path and not beside a mention, or the other way round
        counts, not_ = (path, beside) if task == "tree" else (beside, path)
        inside = [n for n in counts if 0 <= n < WORDS and n not in not_]
        if not inside or len(free) < CLASSES - 1:
            continue
        label = rng.randrange(CLASSES)
        ids = [CLASSES * OF_CLASS + rng.randrange(NEUTRAL) for _ in range(WORDS)]
        ids[subject], ids[object_] = MENTIONS, MENTIONS + 1
        others = [c for c in range(CLASSES) if c != label]
        for place, c in zip([rng.choice(inside), *rng.sample(free, CLASSES - 1)], [label, *others], strict=True):
            ids[place] = c * OF_CLASS + rng.randrange(OF_CLASS)
        rows.append((ids, heads, [subject, object_]))
        labels.append(label)
    return Sentences(*map(torch.tensor, zip(*rows, strict=True))), torch.tensor(labels)


def _tree(rng: random.Random) -> list[int]:
    """Head of each word, -1 for the root; every word hangs below one that came earlier in a random order."""
    order = rng.sample(range(WORDS), WORDS)
    heads = [-1] * WORDS
    for i, word in enumerate(order[1:], 1):
        heads[word] = order[rng.randrange(i)]
    return heads


def _path(heads: list[int], first: int, second: int) -> list[int]:
    def above_of(word: int) -> list[int]:
        found = [word]
        while heads[found[-1]] >= 0:
            found.append(heads[found[-1]])
        return found

    left, right = above_of(first), above_of(second)
    meet = next(n for n in left if n in right)
    return left[: left.index(meet) + 1] + right[: right.index(meet)][::-1]


def _draw(figure: Any, arms: dict[str, Arms]) -> None:
    panels = figure.subplots(1, 2)
    for axes, (task, where) in zip(panels, (("tree", "on the path"), ("text", "beside a mention")), strict=True):
        draw_arms(axes, arms[task], f"accuracy, word {where}")
    figure.set_layout_engine("constrained")
