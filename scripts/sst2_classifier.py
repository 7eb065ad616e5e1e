"""A sentiment classifier to audit: MiniLM, frozen, with a logistic regression on its [CLS] token, trained on SST-2.

The sentences are not part of cenote, as no licence of theirs is known; name the folder that holds train.tsv (sentence, label).

    python -m scripts.sst2_classifier --data DATA/sst2 --model models/minilm-l6-v2 --out sst2-classifier
    cenote explain sst2-classifier DATA/sst2/dev.tsv --names text,label --label label
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer, BertForSequenceClassification

LABELS = ("negative", "positive")
BATCH = 64
SCALE = 0.1
"""Of the [CLS] token within the pooler's tanh, so that this is nearly straight."""


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=3000)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = BertForSequenceClassification.from_pretrained(given.model, num_labels=2, **names).eval()
    dim = model.config.hidden_size
    with torch.no_grad():
        model.bert.pooler.dense.weight.copy_(SCALE * torch.eye(dim))
        model.bert.pooler.dense.bias.zero_()

    @torch.no_grad()
    def features(sentences: list[str]) -> torch.Tensor:
        found = []
        for start in range(0, len(sentences), BATCH):
            inputs = tokenizer(sentences[start : start + BATCH], padding=True, return_tensors="pt")
            found.append(model.bert(**inputs).pooler_output)
        return torch.cat(found)

    train, dev = read(given.data / "train.tsv")[: given.sentences], read(given.data / "dev.tsv")
    fitted = LogisticRegression(C=10.0, max_iter=2000)
    fitted.fit(features([s for s, _ in train]).numpy(), [label for _, label in train])
    print(f"accuracy on {len(dev)} sentences of dev: {fitted.score(features([s for s, _ in dev]), [y for _, y in dev]):.3f}")
    weight, bias = torch.from_numpy(fitted.coef_[0]).float(), float(fitted.intercept_[0])
    with torch.no_grad():
        # two logits whose difference is the regression's
        model.classifier.weight.copy_(torch.stack([-weight, weight]) / 2)
        model.classifier.bias.copy_(torch.tensor([-bias, bias]) / 2)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences and labels."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row[0], int(row[1])) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) == 2]


if __name__ == "__main__":
    main()
