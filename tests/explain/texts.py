"""Tokens of texts, padded, for tests of explainers."""

import torch

from tests.models.live import zoo

PADDED = {
    "input_ids": zoo.ids(3, 7) % 19 + 1,
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
}
