"""Pre-training on masked words and the order of segments, from text files; fine-tuning.

Source: Tan et al., "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences", ICLR 2022.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.fitting import in_training
from cenote.mix.ponet.model import ORDERS, PoNetForPretraining

PAD, UNKNOWN, CLS, SEP, MASK = range(5)
FIRST = 5
Document = list[list[int]]
"""Sentences of token ids."""


class Texts(NamedTuple):
    """Documents as ids, and the words that these stand for, the five special ones first."""

    documents: list[Document]
    words: list[str]


def read_texts(paths: Iterable[str | Path], vocabulary: int = 30_000) -> Texts:
    """Text files, one sentence a line, documents apart by an empty line, as ids of their most frequent words.

    Args:
        paths: of the files.
        vocabulary: number of ids at most, special ones included.

    Raises:
        InputError: where there is no sentence.
    """
    require_at_least(FIRST + 1, vocabulary=vocabulary)
    found: list[list[list[str]]] = []
    for path in paths:
        for part in Path(path).read_text("utf-8").split("\n\n"):
            sentences = [line.lower().split() for line in part.splitlines() if line.strip()]
            found += [sentences] if sentences else []
    if not found:
        raise InputError("paths: the files hold no sentence")
    counts = Counter(word for document in found for sentence in document for word in sentence)
    frequent = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][: vocabulary - FIRST]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *frequent]
    of = {word: i for i, word in enumerate(words)}
    documents = [[[of.get(word, UNKNOWN) for word in sentence] for sentence in document] for document in found]
    return Texts(documents, words)


class Pairs(NamedTuple):
    """Two segments each, `[CLS] a [SEP] b [SEP]`, 0 behind; types are 1 from `b` on; order is a number of `ORDERS`."""

    ids: Int[Tensor, "batch tokens"]
    types: Int[Tensor, "batch tokens"]
    order: Int[Tensor, "batch"]


def segment_pairs(documents: Sequence[Document], count: int, length: int, generator: torch.Generator) -> Pairs:
    """Segments of neighbouring sentences, one behind the other, in wrong order, or of two documents, a third each.

    Args:
        documents: one of them with two sentences or more.
        count: of pairs.
        length: of a pair in tokens; a segment takes whole sentences up to half of it, and the beginning of one that is longer.
        generator: of the draws.

    Raises:
        InputError: where no document has two sentences.
    """
    require_at_least(5, length=length)
    long = [i for i, document in enumerate(documents) if len(document) > 1]
    if not long:
        raise InputError("documents: none has two sentences, so that nothing has an order")

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    half = (length - 3) // 2
    ids, types = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, length, dtype=torch.long)
    order = torch.zeros(count, dtype=torch.long)
    for row in range(count):
        which = draw(len(ORDERS)) if len(documents) > 1 else draw(2)
        own = long[draw(len(long))]
        document = documents[own]
        cut = 1 + draw(len(document) - 1)
        a, b = _filled(document[:cut][::-1], half, turned=True), _filled(document[cut:], half)
        if which == 1:
            a, b = b, a
        if which == 2:
            other = documents[(own + 1 + draw(len(documents) - 1)) % len(documents)]
            b = _filled(other[draw(len(other)) :], half)
        whole = [CLS, *a, SEP, *b, SEP]
        ids[row, : len(whole)] = torch.tensor(whole)
        types[row, len(a) + 2 : len(whole)] = 1
        order[row] = which
    return Pairs(ids, types, order)


def _filled(sentences: Sequence[Sequence[int]], room: int, turned: bool = False) -> list[int]:
    taken: list[list[int]] = []
    for sentence in sentences:
        if taken and sum(map(len, taken)) + len(sentence) > room:
            break
        taken.append(list(sentence)[:room])
    return [word for sentence in (taken[::-1] if turned else taken) for word in sentence]


def masked_words(
    ids: Int[Tensor, "batch tokens"], vocabulary: int, generator: torch.Generator, share: float = 0.15
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Ids of which some are hidden, and which: of these 80 % become [MASK], 10 % another word, 10 % stay.

    Args:
        ids: with the special tokens of this module, which are never hidden.
        vocabulary: number of ids.
        generator: of the draws.
        share: of the words that are hidden.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < share) & ((ids >= FIRST) | (ids == UNKNOWN))
    fate = torch.rand(ids.shape, generator=generator)
    drawn = torch.randint(FIRST, vocabulary, ids.shape, generator=generator)
    shown = torch.where(fate < 0.8, torch.full_like(ids, MASK), torch.where(fate < 0.9, drawn, ids))
    return torch.where(chosen, shown, ids), chosen


def pretrain_ponet(
    model: PoNetForPretraining,
    documents: Sequence[Document],
    *,
    steps: int,
    batch: int = 192,
    length: int = 512,
    learning_rate: float = 1e-4,
    warm_up: int = 5000,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Train on masked words and the order of segments, by Adam with a rate that rises in a line and falls in one.

    Args:
        model: trained in place, left in eval mode.
        documents: as of `read_texts`.
        steps: of the training.
        batch, length: pairs of a step, and their tokens.
        learning_rate: the largest.
        warm_up: steps in which it rises.
        seed: of all draws, dropout included.

    Returns:
        Both losses of each step.

    Note:
        That the rate falls in a line is inferred.
    """
    require_at_least(1, steps=steps, batch=batch)
    vocabulary = len(model.encoder.words.weight)
    generator = torch.Generator().manual_seed(seed)
    found = []

    def loss() -> Tensor:
        pairs = segment_pairs(documents, batch, length, generator)
        ids, hidden = masked_words(pairs.ids, vocabulary, generator)
        predicted = model(ids, pairs.types)
        words = (
            F.cross_entropy(predicted.words[hidden], pairs.ids[hidden]) if hidden.any() else predicted.words.sum() * 0
        )
        order = F.cross_entropy(predicted.order, pairs.order)
        found.append((float(words.detach()), float(order.detach())))
        return words + order

    _train(model, torch.optim.Adam(model.parameters(), lr=learning_rate), loss, steps, warm_up, seed)
    return found


def finetune(
    model: nn.Module,
    ids: Int[Tensor, "items tokens"],
    labels: Int[Tensor, "items"],
    *,
    epochs: int = 4,
    batch: int = 32,
    learning_rate: float = 3e-5,
    warm_up: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """Train a classifier of texts by Adam, the rate falling in a line.

    Args:
        model: ids to logits; trained in place, left in eval mode.
        ids, labels: of the training.
        epochs: 4 for GLUE.
        batch: 8 to 128 for GLUE.
        learning_rate: the largest: 3e-5 to 3e-4 for GLUE, 1e-4 for LRA.
        warm_up: share of the steps in which it rises; 0 for LRA.
        seed: of orders and dropout.

    Returns:
        The loss of each step.
    """
    require_at_least(1, epochs=epochs, batch=batch, items=len(labels))
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(labels) / batch)
    queue: list[Tensor] = []
    losses = []

    def loss() -> Tensor:
        if not queue:
            queue.extend(torch.randperm(len(labels), generator=generator).split(batch))
        chosen = queue.pop(0)
        found = F.cross_entropy(model(ids[chosen]), labels[chosen])
        losses.append(float(found.detach()))
        return found

    _train(model, torch.optim.Adam(model.parameters(), lr=learning_rate), loss, steps, round(warm_up * steps), seed)
    return losses


def _train(
    model: nn.Module, stepper: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int, warm_up: int, seed: int
) -> None:
    def factor(step: int) -> float:
        return (step + 1) / warm_up if step < warm_up else (steps - step) / max(steps - warm_up, 1)

    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, factor)
    with in_training(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            stepper.zero_grad(set_to_none=True)
            loss().backward()
            stepper.step()
            schedule.step()
