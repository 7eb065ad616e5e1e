"""The words that a text model's tokens stand for, without the model: its tokenizer is enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from cenote.core import InputError
from cenote.models import sources
from cenote.models.hugging_face import processor

Words = Callable[[str], tuple[str, ...]]
"""From a text to a word, or a part of one, for each of its tokens; what begins with a space does not go on with the last."""


def words_of(model: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> Words:
    """The words of texts, cut as they were when the model saw them. Nothing is fetched, and no code of the model's is run.

    Args:
        model: its identity, as the manifest of a feature store has it.
        preprocessing: the settings of its preprocessing, likewise.

    Raises:
        InputError: where the model is not here any more, or its files are others.
    """
    tokenizer = _tokenizer(str(model["name"]), model.get("revision"), str(model["config_sha256"]))
    whole = preprocessing.get("padding") == "max_length"
    fast = bool(getattr(tokenizer, "is_fast", False))

    def words(text: str) -> tuple[str, ...]:
        shown = text.lower() if preprocessing.get("lower_case") else text
        made = tokenizer(
            shown,
            truncation=True,
            max_length=preprocessing.get("max_length"),
            padding="max_length" if whole else False,
            return_offsets_mapping=fast,
        )
        names = tokenizer.convert_ids_to_tokens(made["input_ids"])
        if not fast:
            return tuple(f" {name}" for name in names)
        return _from_places(shown, names, made["offset_mapping"])

    return words


def _from_places(text: str, names: list[str], places: list[tuple[int, int]]) -> tuple[str, ...]:
    """As the text has them; tokens that stand nowhere in it, such as [CLS], by their names.

    >>> _from_places("It sings", ["[CLS]", "it", "sing", "##s"], [(0, 0), (0, 2), (3, 7), (7, 8)])
    (' [CLS]', ' It', ' sing', 's')
    """
    words, last = [], -1
    for name, (start, end) in zip(names, places, strict=True):
        word = text[start:end]
        goes_on = start == last and word[:1].strip()
        words.append((word.strip() if goes_on else f" {word.strip()}") if word.strip() else f" {name}")
        last = end if word.strip() else -1
    return tuple(words)


@lru_cache(maxsize=1)
def _tokenizer(name: str, revision: str | None, config_sha256: str) -> Any:
    folder, _ = sources.transformer_inside(sources.model_folder(name, revision, False, False, cached=True)[0])
    sources.require_own_files(folder, False)
    if sources.config_sha256(folder) != config_sha256:
        raise InputError(f"backbone: the files beside {name} are not those that the tokens were made with")
    return processor("AutoTokenizer", folder, False, "texts")
