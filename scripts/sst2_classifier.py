"""A sentiment classifier to audit: MiniLM, its upper blocks and a head trained on SST-2 for one epoch.

The sentences are not part of cenote, as no licence of theirs is known; name the folder that holds train.tsv (sentence, label).

    python -m scripts.sst2_classifier --data DATA/sst2 --model models/minilm-l6-v2 --out sst2-classifier
    cenote explain sst2-classifier DATA/sst2/dev.tsv --names text,label --text-column text --label label
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForSequenceClassification

LABELS = ("negative", "positive")
BATCH = 32
RATE = 3e-4
FROZEN_BLOCKS = 4


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=3000)
    given = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = BertForSequenceClassification.from_pretrained(given.model, num_labels=2, **names).eval()
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN_BLOCKS]):
        part.requires_grad_(False)
    train, dev = read(given.data / "train.tsv")[: given.sentences], read(given.data / "dev.tsv")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    order = torch.randperm(len(train)).split(BATCH)
    for step, batch in enumerate(order):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / len(order))
        optimiser.zero_grad()
        texts, labels = zip(*(train[i] for i in batch.tolist()), strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor(labels)).loss.backward()
        optimiser.step()
    print(f"accuracy on {len(dev)} sentences of dev: {accuracy(model, tokenizer, dev):.3f}")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: object, sentences: list[tuple[str, int]]) -> float:
    """Share that is told right."""
    right = 0
    for start in range(0, len(sentences), BATCH):
        texts, labels = zip(*sentences[start : start + BATCH], strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")  # type: ignore[operator]
        right += int((model(**inputs).logits.argmax(1) == torch.tensor(labels)).sum())
    return right / len(sentences)


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences and labels."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) == 2]
    return [(text, int(label)) for text, label in rows]


if __name__ == "__main__":
    main()
