"""Text encoders and causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.base import Identity, Kind, Prepared
from cenote.models.hugging_face import BIGGER_THAN_ANY, HuggingFaceBackbone, plain, processor

SAMPLE = "A cenote is a natural pool at the bottom of a sinkhole."
LONGEST_UNKNOWN = 512


class TextBackbone(HuggingFaceBackbone):
    """Tokens of a text, special tokens included; padding is marked in the mask.

    Args:
        model: takes `input_ids`.
        folder: with the tokenizer's files.
        identity: which model.
        notes: on loading.
        trust_remote_code: allow a tokenizer's own code.
        max_length: longer texts are cut; default: the longest that tokenizer and model allow.
        lower_case: as a saved sentence-transformers model may ask for.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        identity: Identity,
        notes: Sequence[str],
        trust_remote_code: bool,
        max_length: int | None = None,
        lower_case: bool = False,
    ) -> None:
        self.tokenizer = tokenizer_of(folder, trust_remote_code)
        self.lower_case = lower_case
        notes = list(notes)
        if self.tokenizer.pad_token_id is None:
            # masked, and to the right of every real token: what stands there is never seen
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.tokenizer.padding_side = "right"
        # trained without a mask, as SigLIP: it must see the padding that it saw in training
        self.masks_padding = "attention_mask" in self.tokenizer.model_input_names
        config: Any = model.config
        known = [
            limit
            for limit in (
                getattr(config, "max_position_embeddings", None),
                getattr(self.tokenizer, "model_max_length", 0),
            )
            if isinstance(limit, int) and 0 < limit < BIGGER_THAN_ANY
        ]
        if not known and max_length is None:
            notes.append(f"neither model nor tokenizer says how long a text may be: cut at {LONGEST_UNKNOWN} tokens")
        self.max_length = min([max_length or BIGGER_THAN_ANY, *known]) if known or max_length else LONGEST_UNKNOWN
        special = self.tokenizer.num_special_tokens_to_add()
        if self.max_length <= special:
            raise InputError(
                f"max_length: {special} of the tokens of every text are special ones such as [CLS], so that {self.max_length} "
                f"leave none for the text; give {special + 1} or more"
            )
        embeddings = _embeddings(model)
        self.words_known = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
        if self.words_known is not None and len(self.tokenizer) > self.words_known:
            notes.append(
                f"its tokenizer has {len(self.tokenizer):,} tokens, the model {self.words_known:,}: do they fit?"
            )
        super().__init__(model, identity, notes)

    def kind(self) -> Kind:
        return "text"

    def sample(self) -> tuple[Any, str]:
        return SAMPLE, f"the text {SAMPLE!r}"

    def prepare(self, items: Sequence[Any]) -> Prepared:
        """Token numbers, padded on the right."""
        texts = [text.lower() if self.lower_case else text for text in items]
        made = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            padding="longest" if self.masks_padding else "max_length",
            return_attention_mask=True,
        )
        inputs = {name: torch.tensor(numbers) for name, numbers in made.items()}
        if self.words_known is not None and int(inputs["input_ids"].max()) >= self.words_known:
            number = int(inputs["input_ids"].max())
            raise InputError(
                f"backbone: the tokenizer gives token {number} ({self.tokenizer.convert_ids_to_tokens(number)!r}), but the "
                f"model knows {self.words_known} only; save the tokenizer that belongs to it into its folder"
            )
        # only what fills the whole length can have been cut
        lengths = inputs["attention_mask"].sum(1).tolist()
        full = [text for text, length in zip(texts, lengths, strict=True) if length >= self.max_length]
        whole = self.tokenizer(full, truncation=False, verbose=False)["input_ids"] if full else []
        return Prepared(inputs, sum(len(ids) > self.max_length for ids in whole))

    def lengths(self, items: Sequence[Any], layer: int) -> list[int]:  # noqa: ARG002 - the same in every layer
        """How many real tokens each text has, counted by the tokenizer alone."""
        return self.prepare(items).inputs["attention_mask"].sum(1).tolist()

    def arguments(self, prepared: Prepared) -> dict[str, Tensor]:
        """Without the mask, where the model was trained without one."""
        found = super().arguments(prepared)
        if not self.masks_padding:
            found.pop("attention_mask", None)
        return found

    def mask(self, prepared: Prepared, output: Any) -> Tensor | None:  # noqa: ARG002 - the padding tells all
        mask = prepared.inputs["attention_mask"].bool()
        return None if bool(mask.all()) else mask.to(self.device)

    def lie(self, prepared: Prepared, tokens: int) -> tuple[int, tuple[int, int] | None]:  # noqa: ARG002
        # a word that the vocabulary lacks is a word all the same
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        ids = prepared.inputs["input_ids"][0].tolist()
        return next((i for i, number in enumerate(ids) if number not in special), 0), None

    def settings(self) -> Mapping[str, Any]:
        return plain(
            {
                "tokenizer": type(self.tokenizer).__name__,
                "vocabulary": len(self.tokenizer),
                "max_length": self.max_length,
                "lower_case": self.lower_case,
                "padding": "longest" if self.masks_padding else "max_length",
                "cut": self.tokenizer.truncation_side,
            }
        )

    @torch.inference_mode()
    def words(self, text: str) -> list[str]:
        """The pieces that the tokens stand for."""
        return list(self.tokenizer.convert_ids_to_tokens(self.prepare([text]).inputs["input_ids"][0].tolist()))


def tokenizer_of(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that is saved beside a model.

    Raises:
        InputError: where none is.
    """
    tokenizer = processor("AutoTokenizer", folder, trust_remote_code, "texts")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers makes such a one where there are no files to read it from
        raise InputError(
            f"backbone: the tokenizer of {folder} knows no word; save the model's tokenizer into the folder"
        )
    return tokenizer


def _embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
