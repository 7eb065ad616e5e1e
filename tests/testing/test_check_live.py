"""The contract of live models holds for the instrument, and broken seats are caught by the rule that they break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import Edit, edited
from cenote.testing import ContractError, check_live
from cenote.testing import live as contract

RULES = [contract.title(rule) for rule in (*contract._FIRST, *contract._RULES)]
KEPT: list[Tensor] = []


@contextmanager
def leaves_a_hook(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    model.register_forward_hook(lambda *_: None)
    with edited(model, *edits, **options) as run:
        yield run


@contextmanager
def flips_training(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    with edited(model, *edits, **options) as run:
        yield run
    model.train()


@contextmanager
def leaks_state(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    model.edits = edits
    with edited(model, *edits, **options) as run:
        yield run


@contextmanager
def swallows(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    try:
        with edited(model, *edits, **options) as run:
            yield run
    except (RuntimeError, KeyboardInterrupt):
        pass


@contextmanager
def leaks_memory(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    KEPT.append(torch.zeros(2**16))
    with edited(model, *edits, **options) as run:
        yield run


@contextmanager
def does_nothing(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    yield None


@contextmanager
def recomputes(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    """Written out by eager's function, whatever the user loaded."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        with edited(model, *edits, **options) as run:
            yield run
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


BROKEN: list[tuple[Callable[..., Any], str]] = [
    (leaves_a_hook, "leaving restores"),
    (flips_training, "leaving restores"),
    (leaks_state, "leaving restores"),
    (swallows, "an exception restores"),
    (swallows, "an interrupt restores"),
    (leaks_memory, "memory is given back"),
    (does_nothing, "an edit acts"),
    (does_nothing, "an empty span is an error"),
    (does_nothing, "a place out of reach is an error"),
    (recomputes, "a neutral edit keeps every bit"),
]


@pytest.mark.parametrize(("entering", "rule"), BROKEN)
def test_broken_seats_are_caught(entering: Callable[..., Any], rule: str) -> None:
    case = zoo.MODELS["llama"]("sdpa")
    others = [name for name in RULES if name not in (rule, "determinism")]
    with pytest.raises(ContractError) as error:
        check_live(case.model, case.inputs, entering=entering, rounds=1, leave_out=others)
    assert error.value.broken == (rule,)
    KEPT.clear()


@pytest.mark.parametrize(
    ("name", "skipped"), [("llama", set()), ("bert", {"a cache changes nothing", "a padded batch is its items"})]
)
def test_the_instrument_passes(name: str, skipped: set[str]) -> None:
    case = zoo.MODELS[name]("sdpa")
    report = check_live(case.model, case.inputs, rounds=1, leave_out=["memory is given back"])
    assert set(report.skipped) == skipped
    assert set(report.kept) | skipped == set(RULES) - {"memory is given back"}


def test_an_unknown_rule_is_named() -> None:
    case = zoo.MODELS["own"]("")
    with pytest.raises(InputError, match="there is no rule 'nonsense'"):
        check_live(case.model, case.inputs, leave_out=["nonsense"])
