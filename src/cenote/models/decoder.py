"""Causal language models of transformers, whole, with their tokenizers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import nn

from cenote.core import InputError
from cenote.models.classifier import of_model, opened, trained
from cenote.models.text import tokenizer_of

ENDINGS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, eq=False)
class Decoder:
    """A causal language model.

    Attributes:
        name: as it was asked for.
        model: in eval mode.
        tokenizer: its own.
        digest: of its weights and small files.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    digest: str

    @property
    def plain_tokens(self) -> tuple[int, int]:
        """The longest run of numbers of tokens that are no special ones: the first, and the one behind the last."""
        count = min(len(self.tokenizer), self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        special = sorted({i for i in self.tokenizer.all_special_ids if i < count} | {-1, count})
        return max(((a + 1, b) for a, b in itertools.pairwise(special)), key=lambda run: run[1] - run[0])


def load_decoder(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Decoder:
    """A language model that reads from left to right.

    Args:
        name: a folder of a saved transformers model, or a model's name on the hub.
        revision: branch, tag or commit on the hub.
        device: to compute on.
        trust_remote_code: run Python code that lies with the model. Never without reading it.
        allow_pickle: also take weights from a pickle (read with `weights_only`).

    Raises:
        InputError: where there is no such model, or it has no trained head for the next token.
    """
    found = opened(name, revision, trust_remote_code, allow_pickle)
    if not found.architecture.endswith(ENDINGS):
        raise InputError(
            f"model: {name} is {found.architecture}, and no decoder (AutoModelForCausalLM); name one that was trained to tell "
            f"the next token"
        )
    model = trained(found, "AutoModelForCausalLM", "tell the next token", device)
    with of_model():
        tokenizer = tokenizer_of(found.folder, trust_remote_code)
    return Decoder(name, model, tokenizer, found.digest)
