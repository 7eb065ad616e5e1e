"""A tiny decoder with random weights, a tokenizer of words and digits, and texts that it reads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tests import tiny

from cenote.core.planted import CITIES

WORDS = (
    "The", "special", "magic", "number", "for", "is", "flow", "separates", "It", "joins", "again", "Heat", "goes", "to",
    "the", "wall", "and", "of", "a", "thin", "plate", "cone", "slows", "down", "near", "edge",
)  # fmt: skip
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 160,
}  # fmt: skip


def tokenizer() -> Any:
    """Words, and each digit by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "<eos>", *WORDS, *CITIES, *"0123456789", ".", "\n"]
    rules = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", unk_token="<pad>", eos_token="<eos>")


def model(**settings: Any) -> Any:
    library = tiny.transformers()
    torch.manual_seed(0)
    config = library.LlamaConfig(vocab_size=len(tokenizer()), pad_token_id=0, **{**SIZES, **settings})
    return library.LlamaForCausalLM(config).eval()


def texts(sentences: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    told = [" ".join(draw.choices(WORDS, k=7)) + "." for _ in range(sentences)]
    return [" ".join(told[at : at + 10]) for at in range(0, sentences, 10)]


def saved(folder: Path, **settings: Any) -> Path:
    model(**settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
