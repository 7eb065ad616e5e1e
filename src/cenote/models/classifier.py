"""Classifiers of transformers, whole: the logits, the names of the classes, and how texts and images become their inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models import sources
from cenote.models.hugging_face import BIGGER_THAN_ANY, processor, quiet, required_transformers, why
from cenote.models.text import tokenizer_of

HEADS = {"ForSequenceClassification": "text", "ForImageClassification": "image"}


@dataclass(frozen=True)
class EncodedText:
    """A text as numbers.

    Attributes:
        ids: of its tokens, special ones included.
        pieces: what each token stands for in the text; empty of special ones.
        word: which word each token is of, split at white space; -1 of special ones.
        words: of the text.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    word: tuple[int, ...]
    words: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model with a trained head for classes.

    Attributes:
        name: as it was asked for.
        kind: text or image.
        model: in eval mode.
        labels: of its classes.
        folder: where it lies.
        digest: of its weights and small files.
        trust_remote_code: whether its own code may run.
    """

    name: str
    kind: str
    model: nn.Module
    labels: tuple[str, ...]
    folder: Path
    digest: str
    trust_remote_code: bool = False


class TextClassifier:
    """A classifier and its tokenizer.

    Args:
        loaded: the model.

    Raises:
        InputError: where its tokenizer cannot tell which part of a text a token is.
    """

    def __init__(self, loaded: Classifier) -> None:
        self.loaded = loaded
        with of_model():
            self.tokenizer = tokenizer_of(loaded.folder, loaded.trust_remote_code)
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"model: the tokenizer of {loaded.name} ({type(self.tokenizer).__name__}) does not tell which part of a text a "
                f"token is (no offsets), so that words cannot be scored; save a fast tokenizer (tokenizer.json) into the folder"
            )
        config: Any = loaded.model.config
        known = [
            limit
            for limit in (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
            if isinstance(limit, int) and 0 < limit < BIGGER_THAN_ANY
        ]
        self.max_length = min(known, default=BIGGER_THAN_ANY)

    @property
    def looks_from(self) -> str:
        """The token that the head reads: the first one ([CLS]) or the last one."""
        return "last" if self.tokenizer.cls_token_id is None else "first"

    def fill(self) -> tuple[str, int] | None:
        """What can stand for a word that is not there, by its name and number; `None` where the tokenizer has nothing."""
        t = self.tokenizer
        found = ((t.mask_token, t.mask_token_id), (t.unk_token, t.unk_token_id), (t.pad_token, t.pad_token_id))
        return next(((name, number) for name, number in found if number is not None), None)

    def encode(self, text: str, name: str = "text") -> EncodedText:
        """A text as numbers.

        Raises:
            InputError: where it is empty, or longer than the model reads.
        """
        if not text.strip():
            raise InputError(f"{name}: is empty; leave it out")
        made = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, offsets = made["input_ids"], made["offset_mapping"]
        if len(ids) > self.max_length:
            raise InputError(
                f"{name}: has {len(ids):,} tokens, and {self.loaded.name} reads {self.max_length:,}; shorten it or leave it out"
            )
        words, starts = _split(text)
        pieces, of = [], []
        for start, end in offsets:
            piece = text[start:end]
            pieces.append(piece)
            # some tokenizers count the space before a word as a part of it
            at = start + len(piece) - len(piece.lstrip())
            of.append(starts[at] if piece.strip() else -1)
        if max(of) < 0:
            raise InputError(f"{name}: holds no word that {self.loaded.name} knows; leave it out")
        return EncodedText(tuple(ids), tuple(pieces), tuple(of), tuple(words))


def load_classifier(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Classifier:
    """A classifier of texts or images.

    Args:
        name: a folder of a saved transformers model, or a model's name on the hub.
        revision: branch, tag or commit on the hub.
        device: to compute on.
        trust_remote_code: run Python code that lies with the model. Never without reading it.
        allow_pickle: also take weights from a pickle (read with `weights_only`).

    Raises:
        InputError: where there is no such model, or it has no trained head for two classes or more.
    """
    found = opened(name, revision, trust_remote_code, allow_pickle)
    kind = next((k for suffix, k in HEADS.items() if found.architecture.endswith(suffix)), None)
    if kind is None:
        raise InputError(
            f"model: {name} is {found.architecture}, and no classifier of texts or images (AutoModelForSequenceClassification, "
            f"AutoModelForImageClassification); name one that was trained to classify, or give your own from Python, see "
            f"cenote.jobs.explain.Subject"
        )
    auto = "AutoModelForSequenceClassification" if kind == "text" else "AutoModelForImageClassification"
    model = trained(found, auto, "classify", device)
    config: Any = model.config
    count = int(config.num_labels)
    if count < 2:
        raise InputError(f"model: {name} gives {count} output, and an explanation is of a class among 2 or more")
    labels = tuple(str(config.id2label[i]) for i in range(count))
    return Classifier(name, kind, model, labels, found.folder, found.digest, trust_remote_code)


@dataclass(frozen=True)
class Opened:
    """A saved model before its weights are read.

    Attributes:
        name: as it was asked for.
        folder: where it lies.
        architecture: the class that it says it is.
        digest: of its weights and small files.
        trust_remote_code, allow_pickle: what its reading may do.
    """

    name: str
    folder: Path
    architecture: str
    digest: str
    trust_remote_code: bool
    allow_pickle: bool


def opened(name: str, revision: str | None, trust_remote_code: bool, allow_pickle: bool) -> Opened:
    """A folder or hub name as what lies there.

    Raises:
        InputError: where there is no such model.
    """
    with of_model(), quiet():
        required_transformers()
        folder, _ = sources.model_folder(name, revision, allow_pickle, trust_remote_code)
        files = sources.require_safetensors(folder, allow_pickle)
        config = sources.json_of(folder / "config.json")
    architectures = config.get("architectures") or ["a class that it does not name"]
    digest = hashlib.sha256((sources.weights_sha256(files) + sources.config_sha256(folder)).encode()).hexdigest()
    return Opened(name, folder, architectures[0], digest, trust_remote_code, allow_pickle)


def trained(found: Opened, auto: str, to: str, device: str) -> nn.Module:
    """The model, in eval mode.

    Args:
        found: of `opened`.
        auto: class of transformers that reads it.
        to: what its head was trained to do, for errors.
        device: to compute on.

    Raises:
        InputError: where it cannot be read, or a part was never trained.
    """
    with of_model(), quiet():
        transformers = required_transformers()
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model, info = getattr(transformers, auto).from_pretrained(
                found.folder,
                trust_remote_code=found.trust_remote_code,
                use_safetensors=None if found.allow_pickle else True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (
            SafetensorError,
            UnpicklingError,
            ValueError,
            OSError,
            RuntimeError,
            KeyError,
            ImportError,
            TypeError,
        ) as error:
            raise InputError(f"model: {found.name}: {why(error, found.trust_remote_code)}") from error
    if odd := sorted(map(str, [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())])):
        raise InputError(f"model: {found.name} has no trained {odd[0]}; name a model that was trained to {to}")
    made: nn.Module = model.eval().to(device)
    return made


class ImageClassifier:
    """A classifier and its preprocessing.

    Args:
        loaded: the model.
    """

    def __init__(self, loaded: Classifier) -> None:
        self.loaded = loaded
        with of_model():
            self.processor = processor("AutoImageProcessor", loaded.folder, loaded.trust_remote_code, "images")

    @property
    def patch(self) -> int | None:
        """Side of the model's patches in pixels, where it has any."""
        found = getattr(self.loaded.model.config, "patch_size", None)
        return found if isinstance(found, int) else None

    def encode(self, image: Any) -> Tensor:
        """`[channels, height, width]` as the model takes it."""
        with quiet():
            found: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return found


@contextmanager
def of_model() -> Iterator[None]:
    """Sources and processors speak of a backbone; here it is the model."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("backbone:", "model:", 1)) from error


def _split(text: str) -> tuple[list[str], list[int]]:
    """The words between white space, and which word each character is of."""
    words: list[str] = []
    starts: list[int] = []
    inside = False
    for character in text:
        if character.isspace():
            inside = False
        elif inside:
            words[-1] += character
        else:
            words.append(character)
            inside = True
        starts.append(len(words) - 1)
    return words, starts
