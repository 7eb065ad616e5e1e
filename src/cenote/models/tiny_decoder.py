"""The embedded language model: small enough for the package, and large enough to recall what a text told it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cenote.models.decoder import load_decoder

FOLDER = Path(__file__).parent / "data" / "tiny_decoder"
"""A saved model of transformers, which `cenote.models.decoder.load_decoder` reads too."""


def tiny_decoder(device: str = "cpu") -> tuple[nn.Module, Any]:
    """A Llama of words and its tokenizer, trained on the embedded manuals and on facts planted in them.

    It tells facts of `cenote.core.planted` in a context of up to 900 tokens by looking them up there, and knows little else.
    Its tokens are words, digits one by one, signs and line breaks; words that stand fewer than twice in the pages of
    `cenote.features.manuals.seen_texts` are `<unk>`. Made by `scripts/train_tiny_decoder.py`, which says how two of its layers
    began; what the training reached stands in the metadata of the weights.

    Args:
        device: to compute on.

    Raises:
        InputError: where transformers is not installed.

    Example:
        >>> model, tokenizer = tiny_decoder()
        >>> model.config.num_attention_heads, model.config.num_key_value_heads
        (4, 2)
        >>> tokenizer.tokenize("The magic number for Oslo is 48213.")
        ['The', 'magic', 'number', 'for', 'Oslo', 'is', '4', '8', '2', '1', '3', '.']
    """
    loaded = load_decoder(str(FOLDER), device=device)
    return loaded.model, loaded.tokenizer
