"""Training the translator: translation and imagination together or in turn, and the mean of its last states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_rate
from cenote.pool.sequence.cuni_multimodal.memories import imagination_loss
from cenote.pool.sequence.cuni_multimodal.translator import Translator
from cenote.pool.sequence.subwords import END, PAD, START
from cenote.pool.training import History, averaged, in_batches, inverse_root_schedule, train


class TranslationBatch(NamedTuple):
    """Texts with what is known of each.

    Attributes:
        source: `[batch, tokens]`, subwords with the end, 0 behind it, as `Subwords.batch` gives them.
        target: likewise, or `None`: pictures with captions alone, which only imagination learns from.
        image: maps or patches of the pictures, for a decoder that attends to them.
        vector: `[batch, image_dim]`, one vector of each picture, for imagination.
    """

    source: Int[Tensor, "batch tokens"]
    target: Int[Tensor, "batch words"] | None = None
    image: Tensor | None = None
    vector: Float[Tensor, "batch image_dim"] | None = None


def translation_loss(
    logits: Float[Tensor, "batch words vocabulary"], target: Int[Tensor, "batch words"], smoothing: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy of the words with smoothed labels: `1 - smoothing` on the word, the rest even over all; mean over words.

    Args:
        logits: of each word, given those before it.
        target: the words, 0 where there is none.
        smoothing: share that goes to all words alike.

    Example:
        >>> logits = torch.zeros(1, 2, 4)
        >>> round(translation_loss(logits, torch.tensor([[3, 0]])).item(), 4)
        1.3863

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.
    """
    require_rate(smoothing=smoothing)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)


def shifted(target: Int[Tensor, "batch words"]) -> Int[Tensor, "batch words"]:
    """What the decoder reads: START, and each word but the last; nothing behind the end.

    >>> shifted(torch.tensor([[5, 6, 2], [7, 2, 0]])).tolist()
    [[1, 5, 6], [1, 7, 0]]
    """
    before = target[:, :-1].masked_fill(target[:, :-1] == END, PAD)
    return torch.cat([torch.full_like(target[:, :1], START), before], 1)


def total_loss(
    model: Translator, batch: TranslationBatch, weight: float = 0.5, smoothing: float = 0.1, margin: float = 0.1
) -> Float[Tensor, ""]:
    """`w translation + (1 - w) imagination`, or the one of both that the batch is for.

    Args:
        model: a translator.
        batch: with target, or vector, or both.
        weight: `w`, 0.5 to 0.9.
        smoothing: of the labels.
        margin: of the imagination.

    Raises:
        InputError: where the batch has nothing to learn from, or the model has no imagination for its vectors.
    """
    losses = []
    if batch.target is not None:
        encoded = model.encode(batch.source, batch.image)
        states = encoded.states
        losses.append(translation_loss(model.decode(shifted(batch.target), encoded).logits, batch.target, smoothing))
    else:
        # imagination reads the text alone
        states = model.read(batch.source, batch.source != PAD)
    if batch.vector is not None:
        if model.imagination is None:
            raise InputError(
                "vector: this translator has no imagination to learn it; give TranslatorConfig(imagination=width)"
            )
        predicted = model.imagination(states, batch.source != PAD)
        losses.append(imagination_loss(predicted, batch.vector, margin))
    if not losses:
        raise InputError("batch: has neither a target nor a vector of the picture, so there is nothing to learn from")
    return losses[0] if len(losses) == 1 else weight * losses[0] + (1 - weight) * losses[1]


def train_translator(
    model: Translator,
    batches: Callable[[], Iterable[TranslationBatch]],
    *,
    passes: int,
    lr: float | None = None,
    warm_up: int = 4000,
    weight: float = 0.5,
    in_turn: bool = False,
    smoothing: float = 0.1,
    margin: float = 0.1,
    average: int = 1,
    score: Callable[[], float] | None = None,
    patience: int | None = None,
) -> History:
    """Train a translator with Adam, warm-up, smoothed labels, and imagination where the batches have vectors of pictures.

    Args:
        model: a translator.
        batches: gives those of one pass, in a fresh order each time; among them may be pictures with captions alone.
        passes: over the batches.
        lr: highest rate, reached after the warm-up; default `(dim warm_up)^-0.5`.
        warm_up: steps in which the rate rises; it then falls with the root of the steps.
        weight: of the translation where a batch teaches both; imagination has the rest.
        in_turn: whether such a batch gives two steps, translation first, instead of one with the weighted total.
        smoothing: of the labels.
        margin: of the imagination.
        average: the mean of the states after so many last passes is what the model has in the end.
        score: of the model on texts that it is not trained on (BLEU, say); the best state is kept.
        patience: passes without a better score after which training stops.

    Returns:
        How it went.

    Raises:
        InputError: where a batch has nothing to learn from, or both an average and a best state are wanted.

    Example:
        >>> from cenote.pool import MultimodalTransformer, Subwords, TranslatorConfig, translate_lines
        >>> texts, translations = ["a dog", "a cat"], ["ein hund", "eine katze"]
        >>> subwords = Subwords.learn(texts + translations, merges=20)
        >>> config = TranslatorConfig(len(subwords), dim=32, layers=1, hidden=64, heads=4, dropout=0.0, image_channels=6)
        >>> _ = torch.manual_seed(0)
        >>> model = MultimodalTransformer(config)
        >>> pictures = torch.randn(2, 6, 4, 4)
        >>> batch = TranslationBatch(subwords.batch(texts), subwords.batch(translations), pictures)
        >>> history = train_translator(model, lambda: [batch], passes=60, lr=5e-3, warm_up=10)
        >>> translate_lines(model, subwords, texts, pictures, beam=4)
        ['ein hund', 'eine katze']

    Source: Helcl, Libovicky, Varis, "CUNI System for the WMT18 Multimodal Translation Task", WMT 2018; imagination as in
    Elliott, Kadar, "Imagination Improves Multimodal Translation", IJCNLP 2017.

    Note:
        The rates, the weights and whether both tasks come together or in turn are not published; all are arguments.
    """
    require_at_least(1, passes=passes, average=average, warm_up=warm_up)
    if not 0 <= weight <= 1:
        raise InputError(f"weight: expected a share from 0 to 1, got {weight}")
    if average > 1 and score is not None:
        raise InputError("average: the mean of the last states is not the best state; give either average or score")
    rate = (model.config.dim * warm_up) ** -0.5 if lr is None else lr
    adam = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98), eps=1e-9)
    schedule = inverse_root_schedule(adam, warm_up)
    states: list[dict[str, Tensor]] = []
    done = 0

    def one_pass() -> Iterator[TranslationBatch]:
        nonlocal done
        if average > 1 and done > passes - average:
            states.append(_copy(model))
        done += 1
        for batch in batches():
            if in_turn and batch.target is not None and batch.vector is not None:
                yield batch._replace(vector=None)
                yield batch._replace(target=None)
            else:
                yield batch

    history = train(
        model,
        one_pass,
        lambda batch: total_loss(model, batch, weight, smoothing, margin),
        adam,
        passes=passes,
        schedule=schedule,
        score=score,
        patience=patience,
    )
    if average > 1:
        model.load_state_dict(averaged([*states, _copy(model)]))
    return history


def batches_of(
    items: TranslationBatch, size: int, generator: torch.Generator | None = None
) -> Sequence[TranslationBatch]:
    """The items of one large batch in batches, in an order drawn anew; padding that all of one share is cut off.

    Example:
        >>> items = TranslationBatch(torch.tensor([[4, 2, 0], [5, 6, 2], [7, 2, 0]]))
        >>> [len(batch.source) for batch in batches_of(items, 2)]
        [2, 1]
    """
    return [
        TranslationBatch(
            _cut(items.source[chosen]),
            None if items.target is None else _cut(items.target[chosen]),
            *(None if t is None else t[chosen] for t in items[2:]),
        )
        for chosen in in_batches(len(items.source), size, generator)
    ]


def _cut(words: Int[Tensor, "batch words"]) -> Int[Tensor, "batch _longest"]:
    return words[:, : max(1, int((words != PAD).sum(1).max()))]


def _copy(model: Translator) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
