"""Requirements that many arguments share."""

import math
import re
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cenote.core import InputError
from cenote.core.requirements import (
    require_all_positive,
    require_at_least,
    require_floating,
    require_one_of,
    require_positive,
    require_rate,
)
from cenote.features.raw import open_raw
from cenote.models.live.spans import of_texts
from cenote.pool import MeanPool
from cenote.pool.sequence.attention_conditioning.attention import Lexicon
from cenote.pool.sequence.attentive_mimicking.mimic import train_mimic
from cenote.pool.sequence.attentive_mimicking.word_contexts import contexts_of
from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors
from cenote.testing import check_live, check_pool


@pytest.mark.parametrize(
    ("require", "fits", "does_not"),
    [
        (lambda **given: require_at_least(2, **given), (2, 2.5, math.inf), (1, 1.99, -math.inf, math.nan)),
        (require_positive, (1e-30, 1, math.inf), (0, -1e-30, math.nan)),
        (require_all_positive, ([1], (2, 0.5)), ((), (1, 0), (1, -1e-30), (math.nan,))),
        (require_rate, (0, 0.5, 1 - 1e-9), (-1e-9, 1, math.nan)),
        (lambda **given: require_one_of((3, None), **given), (3, None), (0, "3", "")),
    ],
)
def test_what_fits_passes_and_what_does_not_is_named(
    require: Callable[..., None], fits: tuple[object, ...], does_not: tuple[object, ...]
) -> None:
    for value in fits:
        require(here=value, there=value)
    for value in does_not:
        with pytest.raises(InputError, match=rf"^there: expected .*, got {re.escape(repr(value))}$"):
            require(here=fits[0], there=value)


def test_one_known_value_is_named_alone() -> None:
    with pytest.raises(InputError, match=r"^kind: expected 'text', got 'image'$"):
        require_one_of(["text"], kind="image")


def test_floating_point_of_any_width_fits() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        require_floating(torch.zeros(1, dtype=dtype))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(InputError, match=rf"x: expected floating point features, got {dtype}; use x\.float"):
            require_floating(torch.zeros(1, dtype=dtype))


LEXICON = Lexicon({"mood": {"good": [1.0]}})
KNOWN = WordVectors(["red", "pie"], torch.eye(2))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: LEXICON.lookup("good"), "words"),
        (lambda: LEXICON.lookup_batch(["good"]), "words"),
        (lambda: contexts_of("red", ["red pie"], {"pie": 0}), "words"),
        (lambda: train_mimic(KNOWN, ["red pie"], leave_out="red"), "leave_out"),
        (lambda: check_pool(MeanPool(2), leave_out="determinism"), "leave_out"),
        (lambda: check_live(torch.nn.Linear(2, 2), {}, implementations="sdpa"), "implementations"),
        (lambda: open_raw(Path(__file__).parent, names="text,label"), "names"),
        (lambda: of_texts(types.SimpleNamespace(is_fast=True), "a text", {}), "texts"),
        (lambda: of_texts(types.SimpleNamespace(is_fast=True), ["a text"], {"question": "a"}), "parts"),
    ],
)
def test_one_text_is_no_list_of_names(call: Callable[[], object], named: str) -> None:
    with pytest.raises(InputError, match=f"{named}: expected names, such as .*, got the one text"):
        call()
