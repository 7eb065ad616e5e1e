"""A saved probe on new data: what it says of each item, and where it looked."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cenote.features import TokenDataset
from cenote.features.raw import RawItems
from cenote.jobs.extract.result import OnProgress
from cenote.jobs.probe.saved import SavedProbe, load
from cenote.jobs.probe.unseen import Reading, views

TOKENS_LISTED = 5


@dataclass(frozen=True)
class Prediction:
    """What a probe says of one item.

    Attributes:
        id: of the item.
        prediction: in words: class, labels separated by `;`, or numbers.
        scores: of every class, label or target.
        looked: the tokens that the pool took most from, each with its weight; empty where it has no weights.
    """

    id: str
    prediction: str
    scores: Mapping[str, float]
    looked: tuple[tuple[int, float], ...] = ()


def predict(
    probe: SavedProbe | str | Path,
    data: str | Path | TokenDataset | RawItems,
    reading: Reading | None = None,
    *,
    on_progress: OnProgress = lambda _: None,
    on_message: Callable[[str], None] = lambda _: None,
) -> list[Prediction]:
    """What a saved probe says of new items.

    Args:
        probe: or the folder that it lies in, `OUT/best` or `OUT/recommended`.
        data: raw, where the probe was trained with a model that it can find again, or features; see `views`.
        reading: how, see `Reading`.
        on_progress: called after every batch of the model.
        on_message: called with what a person should know.

    Raises:
        InputError: where the tokens are not those that the probe was trained on, and this is not to be forced; and where
            something else cannot be used.

    Example:
        `cenote.predict("out/best", "new.tsv")[0].prediction`
    """
    saved = probe if isinstance(probe, SavedProbe) else load(probe)
    return [
        made
        for view in views(saved, data, reading, on_progress=on_progress, on_message=on_message)
        for made in _predicted(saved, view)
    ]


def _predicted(saved: SavedProbe, view: TokenDataset) -> Iterator[Prediction]:
    for i, name in enumerate(view.ids):
        x = view.copies(i)
        scores = saved.scores(x).squeeze(0)
        weights = saved.attend(x).weights
        looked: tuple[tuple[int, float], ...] = ()
        if weights is not None and weights.shape[-1]:
            top = weights.flatten(0, -2).mean(0).topk(min(TOKENS_LISTED, weights.shape[-1]))
            numbers = [n + saved.probe.drop for n in top.indices.tolist()]
            looked = tuple(zip(numbers, top.values.tolist(), strict=True))
        yield Prediction(name, saved.word(scores), dict(zip(saved.classes, scores.tolist(), strict=True)), looked)


def as_csv(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    """A line per item."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["id", "prediction", *(f"score {c}" for c in classes), "tokens looked at", "their weights"])
    for made in predictions:
        looked = " ".join(str(token) for token, _ in made.looked)
        share = " ".join(f"{weight:.3f}" for _, weight in made.looked)
        table.writerow([made.id, made.prediction, *(f"{s:.6g}" for s in made.scores.values()), looked, share])
    return text.getvalue()
