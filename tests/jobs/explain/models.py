"""Tiny classifiers with random weights, saved as transformers saves them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tests import tiny

LABELS = {0: "sad", 1: "glad", 2: "plain"}


def text_classifier(folder: Path, **settings: Any) -> Path:
    """Letters are its words; it reads 32 tokens."""
    given = {**tiny.TEXT, "id2label": LABELS, "label2id": {n: i for i, n in LABELS.items()}, "initializer_range": 0.4}
    return tiny.made(folder, "BertForSequenceClassification", tiny.words, **{**given, **settings})


def image_classifier(folder: Path) -> Path:
    given = {**tiny.SMALL, **tiny.VISION, "id2label": LABELS, "label2id": {n: i for i, n in LABELS.items()}}
    return tiny.made(folder, "ViTForImageClassification", tiny.images, **given, initializer_range=0.4)


def sentences(path: Path, count: int = 16) -> Path:
    """Texts of 3 to 9 letters, each with a class."""
    rows = [("text", "mood")]
    for i in range(count):
        letters = [chr(97 + (7 * i + 5 * k + i * k) % 26) for k in range(3 + i % 7)]
        rows.append((" ".join(letters), LABELS[i % 3]))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def decoder(folder: Path, **settings: Any) -> Path:
    """Letters are its words; it reads 48 tokens."""
    given = {"vocab_size": 28, "max_position_embeddings": 48, **tiny.SMALL, "initializer_range": 0.4}
    return tiny.made(folder, "LlamaForCausalLM", tiny.words_without_padding, **{**given, **settings})
