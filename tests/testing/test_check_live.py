"""The contract of live models holds for the instrument, and broken seats are caught by the rule that they break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import (
    AttentionCall,
    AttentionEdit,
    Edit,
    HeadRecorder,
    Place,
    RowRecorder,
    Run,
    attentions,
    edited,
)
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
    except (contract._OwnError, KeyboardInterrupt):
        pass


@contextmanager
def leaks_memory(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    KEPT.append(torch.zeros(2**19))
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


class _Nearly(AttentionEdit):
    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        return y * (1 + 1e-6)


@contextmanager
def recorders_round(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    more = [_Nearly()] if any(isinstance(edit, HeadRecorder) for edit in edits) else []
    with edited(model, *edits, *more, **options) as run:
        yield run


@contextmanager
def mixes_up_heads(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    """Query head h reads key head `h % kv_heads`."""
    with edited(model, *edits, **options) as run:
        yield run
    for edit in edits:
        if isinstance(edit, RowRecorder):
            for place, found in edit.found.items():
                edit.found[place] = [x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for x in found]


@contextmanager
def patched(cls: type, name: str, new: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, name, new)
        yield


@contextmanager
def loses_causality(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    with patched(AttentionCall, "readable", lambda call: None), edited(model, *edits, **options) as run:
        yield run


@contextmanager
def forgets_the_prompt(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    """Every step counts its queries from 0."""
    own = Run.arrives

    def arrives(run: Run, place: Place, call: AttentionCall) -> Any:
        return {**own(run, place, call), "query_start": 0}

    with patched(Run, "arrives", arrives), edited(model, *edits, **options) as run:
        yield run


@contextmanager
def forgets_padding(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    """Spans of a batch are taken as if padding stood on the right."""
    spans = options.pop("spans", None) or {}
    first = {name: span[:1].expand_as(span) for name, span in spans.items()}
    with edited(model, *edits, **options, spans=first) as run:
        yield run


class Around:
    """A context around `edited`, to be broken."""

    def __init__(self, model: nn.Module, *edits: Edit, **options: Any) -> None:
        self.model, self.inner = model, edited(model, *edits, **options)

    def __enter__(self) -> Any:
        return self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.inner.__exit__(*error)


class IgnoresGenerators(Around):
    """A context that takes the end of a generator for no end."""

    def __exit__(self, *error: Any) -> Any:
        if error[0] is GeneratorExit:
            LEFT_OPEN.append(self.inner)
            return None
        return super().__exit__(*error)


class OneAtATime(Around):
    """Entering ends what was entered before."""

    current: ClassVar[list[Any]] = []

    def __enter__(self) -> Any:
        while self.current:
            self.current.pop().__exit__(None, None, None)
        self.current.append(self.inner)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        if self.inner in self.current:
            self.current.remove(self.inner)
            return super().__exit__(*error)
        return None


class PutsBack(Around):
    """On leaving the model's forward is what it was on entering, whoever entered since."""

    def __enter__(self) -> Any:
        self.before = self.model.__dict__.get("forward")
        own = self.model.forward
        self.model.__dict__["forward"] = lambda *args, **kwargs: own(*args, **kwargs)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self.model.__dict__.pop("forward", None)
        if self.before is not None:
            self.model.__dict__["forward"] = self.before
        return super().__exit__(*error)


@contextmanager
def by_class(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    """A hook that every module of the class feels, of any model and in any thread."""
    place = attentions(model)[0]

    def silenced(module: nn.Module, _: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if type(module) is type(place.module) else None

    hook = nn.modules.module.register_module_forward_hook(silenced) if not_neutral(edits) else None
    try:
        yield None
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def for_all_threads(model: nn.Module, *edits: Edit, **options: Any) -> Iterator[Any]:
    hooks = [
        place.module.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]), *output[1:]))
        for place in attentions(model)
        if not_neutral(edits)
    ]
    try:
        yield None
    finally:
        for hook in hooks:
            hook.remove()


def not_neutral(edits: tuple[Edit, ...]) -> bool:
    return any(type(edit).__name__ == "_Silent" for edit in edits)


class LeavesTheDispatcher(Around):
    """The registry of transformers keeps handing out functions inside a dispatcher."""

    def __enter__(self) -> Any:
        other = edited(zoo.MODELS["bert"]("sdpa").model, AttentionEdit())
        other.__enter__()
        LEFT_OPEN.append(other)
        return super().__enter__()


LEFT_OPEN: list[Any] = []

BROKEN: list[tuple[Callable[..., Any], str]] = [
    (does_nothing, "an edit acts"),
    (recomputes, "a neutral edit keeps every bit"),
    (recorders_round, "a recorder keeps every bit"),
    (mixes_up_heads, "recorded rows are those of eager"),
    (loses_causality, "recorded rows are those of eager"),
    (leaves_a_hook, "leaving restores"),
    (flips_training, "leaving restores"),
    (leaks_state, "leaving restores"),
    (LeavesTheDispatcher, "leaving restores"),
    (swallows, "an exception restores"),
    (swallows, "an interrupt restores"),
    (IgnoresGenerators, "a dropped generator restores"),
    (OneAtATime, "contexts nest"),
    (PutsBack, "any order of leaving"),
    (by_class, "other models are not reached"),
    (for_all_threads, "other threads are not reached"),
    (forgets_the_prompt, "a cache changes nothing"),
    (forgets_padding, "a padded batch is its items"),
    (does_nothing, "an empty span is an error"),
    (does_nothing, "a place out of reach is an error"),
    (leaks_memory, "memory is given back"),
]


@pytest.fixture
def _closed() -> Iterator[None]:
    yield
    KEPT.clear()
    OneAtATime.current.clear()
    while LEFT_OPEN:
        with contextlib.suppress(InputError):
            LEFT_OPEN.pop().__exit__(None, None, None)


@pytest.mark.usefixtures("_closed")
@pytest.mark.parametrize(("entering", "rule"), BROKEN)
def test_broken_seats_are_caught(entering: Callable[..., Any], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # of what is left behind, 2 MB an entry, a few entries are enough
    monkeypatch.setattr(contract, "ENTRIES", 20)
    case = zoo.MODELS["llama"]("sdpa")
    others = [name for name in RULES if name not in (rule, "determinism")]
    with pytest.raises(ContractError) as error:
        check_live(case.model, case.inputs, entering=entering, rounds=1, leave_out=others)
    assert error.value.broken == (rule,)


def test_every_rule_is_broken_by_a_seat() -> None:
    assert {rule for _, rule in BROKEN} == set(RULES) - {"determinism"}


def test_a_model_that_is_random_is_named() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    model = nn.Sequential(case.model.get_submodule("model.embed_tokens"), nn.Dropout(0.5)).train()
    with pytest.raises(ContractError, match="determinism"):
        check_live(model, {"input": case.inputs["input_ids"]})


@pytest.fixture
def _no_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_no_fast_path")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "attention"), zoo.one_by_one(zoo.REACHED))
def test_the_instrument_passes(name: str, attention: str) -> None:
    case = zoo.MODELS[name](attention)
    report = check_live(case.model, case.inputs, rounds=2, leave_out=["memory is given back"])
    assert {*report.kept, *(rule.partition(" (")[0] for rule in report.skipped)} == set(RULES) - {
        "memory is given back"
    }
    own = {"recorded rows are those of eager"} if name in zoo.OF_ONE_KIND else set()
    # what makes text of text alone
    decodes = set() if case.decoder and name != "llava" else {"a cache changes nothing", "a padded batch is its items"}
    assert {rule for rule in report.skipped if "(" not in rule} == own | decodes


def test_a_builder_is_asked_for_each_implementation() -> None:
    asked: list[str] = []

    def bert(attention: str) -> nn.Module:
        asked.append(attention)
        return zoo.MODELS["bert"](attention).model

    few = [rule for rule in RULES if rule not in ("determinism", "an edit acts", "a cache changes nothing")]
    report = check_live(bert, zoo.MODELS["bert"]("sdpa").inputs, leave_out=few)
    assert asked == ["sdpa", "eager"]
    assert report.kept == ["determinism", "an edit acts"]
    assert set(report.skipped) == {"a cache changes nothing (sdpa)", "a cache changes nothing (eager)"}

    def deaf_to_eager(model: Any, *edits: Edit, **options: Any) -> Any:
        return (does_nothing if model.config._attn_implementation == "eager" else edited)(model, *edits, **options)

    with pytest.raises(ContractError, match=r"an edit acts: .*\(attention: eager\)"):
        check_live(bert, zoo.MODELS["bert"]("sdpa").inputs, entering=deaf_to_eager, leave_out=few)


def test_entering_200_times_leaves_no_memory() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    others = [name for name in RULES if name not in ("memory is given back", "determinism")]
    assert "memory is given back" in check_live(case.model, case.inputs, leave_out=others).kept


@pytest.mark.slow("1,000 rounds of each way of leaving")
def test_a_thousand_ways_out() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    report = check_live(case.model, case.inputs, rounds=1000, leave_out=["memory is given back"])
    assert report.rounds == 1000
    assert not report.skipped


def test_an_unknown_rule_is_named() -> None:
    case = zoo.MODELS["own"]("")
    with pytest.raises(InputError, match="there is no rule 'nonsense'"):
        check_live(case.model, case.inputs, leave_out=["nonsense"])
