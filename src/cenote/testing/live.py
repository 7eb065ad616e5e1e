"""The contract of what reaches into a running model, as a check that anybody can run on their own model."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
import tracemalloc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_several
from cenote.models.live import (
    AttentionCall,
    AttentionEdit,
    BlockEdit,
    Edit,
    HeadRecorder,
    InputsRecorder,
    RowEdit,
    RowRecorder,
    StateRecorder,
    Where,
    attentions,
    edited,
)
from cenote.testing.as_found import AsFound
from cenote.testing.contract import Rule, run_rules, title

Entering = Callable[..., AbstractContextManager[Any]]
LENGTHS = (7, 5, 3, 4)
ENTRIES = 200
MEGABYTES = 20


@dataclass
class LiveReport:
    """What was checked, and what could not be.

    Attributes:
        kept: names of the rules that hold.
        skipped: why a rule does not apply, by its name, or by "name (implementation)".
        rounds: how often each way of leaving was tried.
    """

    kept: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    rounds: int = 0


def check_live(
    model: nn.Module | Callable[[str], nn.Module],
    inputs: Mapping[str, Any],
    *,
    implementations: Sequence[str] = ("sdpa", "eager"),
    entering: Entering = edited,
    rounds: int = 3,
    leave_out: Collection[str] = (),
) -> LiveReport:
    """Check that a model can be reached into, and that it comes back as it was.

    Edits that change nothing and recorders leave outputs equal to the bit, under each implementation. Recorded rows equal
    eager's maps. After leaving, an exception, Ctrl-C, or a dropped generator, the model and the registries of transformers are
    as before. Contexts nest, may be left in any order, and do not reach other models or threads. A cache changes nothing; a
    batch padded on the left is its items. Empty spans and places out of reach raise. Entering 200 times leaves no memory.

    Args:
        model: in eval mode; or from the name of an attention implementation to such a model.
        inputs: of its forward.
        implementations: that a builder is asked for; of a module, its own is taken.
        entering: the context manager that is checked, called as `edited`.
        rounds: how often each way of leaving is tried.
        leave_out: names of rules that are not checked.

    Returns:
        Which rules hold, and which do not apply and why.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.
    """
    require_several(implementations=implementations)
    names = list(implementations) if not isinstance(model, nn.Module) else ["as given"]
    if not names or rounds < 1:
        raise InputError(f"implementations, rounds: expected at least one of each, got {names} and {rounds}")
    trials = [
        _Trial(model if isinstance(model, nn.Module) else model(name), inputs, name, entering, rounds) for name in names
    ]
    report = LiveReport(rounds=rounds)
    with torch.no_grad():
        run_rules(
            trials[0].model, [_of_all(rule, report) for rule in _RULES], trials, leave_out=leave_out,
            first=[_of_all(rule, report) for rule in _FIRST],
        )  # fmt: skip
    return report


class _NotApplicableError(Exception):
    """A rule says nothing about this model."""


class _OwnError(Exception):
    """Raised inside, and by nothing else."""


def _of_all(rule: Callable[[_Trial], str | None], report: LiveReport) -> Rule:
    @functools.wraps(rule)
    def of_all(trials: Sequence[_Trial]) -> str | None:
        name, tried = title(rule), 0
        for trial in trials:
            try:
                message = rule(trial)
            except _NotApplicableError as error:
                report.skipped[name if len(trials) == 1 else f"{name} ({trial.name})"] = str(error)
                continue
            tried += 1
            if message:
                return f"{name}: {message} (attention: {trial.name})"
            if trial.unknown:
                report.skipped[f"{name} ({trial.name}, {len(trial.unknown)} places)"] = ", ".join(trial.unknown)
                trial.unknown = []
        if tried:
            report.kept.append(name)
        return None

    return of_all


class _Trial:
    """One model, what it gives plainly, and the context manager that is checked."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], name: str, entering: Entering, rounds: int) -> None:
        self.model, self.inputs, self.name, self.entering, self.rounds = model, inputs, name, entering, rounds
        self.reachable = attentions(model)
        self.unknown: list[str] = []
        with torch.no_grad():
            self.found = AsFound(model, self.run_plainly)

    def run_plainly(self) -> None:
        self.plain = self.run()

    def run(self, model: nn.Module | None = None) -> list[Tensor]:
        return _tensors((self.model if model is None else model)(**self.inputs))

    def left(self, how: str) -> str | None:
        """What is not as it was."""
        if changed := self.found.changed():
            return f"{how}, {changed}"
        return self.differs(how)

    def differs(self, how: str) -> str | None:
        if not _same(self.run(), self.plain):
            return f"{how}, outputs differ from the plain model's, expected them equal to the bit"
        return None

    def decoder(self) -> Any:
        can = getattr(self.model, "can_generate", None)
        if can is None or not can():
            raise _NotApplicableError("the model does not generate")
        if set(self.inputs) - {"input_ids", "attention_mask"} or self.inputs["input_ids"].shape[1] < max(LENGTHS):
            raise _NotApplicableError(f"inputs are not input_ids of at least {max(LENGTHS)} tokens alone")
        return self.model


class _Silent(AttentionEdit):
    def context(self, call: AttentionCall, y: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(y)


class _Neutral(RowEdit):
    def queries(self, call: AttentionCall) -> Tensor:
        return call.last()

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:  # noqa: ARG002
        return weights.clone()


class _Failing(AttentionEdit):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:  # noqa: ARG002
        raise self.error("inside")


class _Towards(RowEdit):
    """Each query from a token on gives the span's keys three times the weight."""

    asks = ("named",)

    def __init__(self, first: int) -> None:
        self.first = first

    def queries(self, call: AttentionCall) -> Tensor:
        return call.numbers() + call.query_start >= self.first

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return torch.where(call.keys_in("named")[:, None, None], 3.0 * weights, weights)


def _rule_an_edit_acts(t: _Trial) -> str | None:
    with t.entering(t.model, _Silent()):
        return "heads set to zero leave the outputs as they are" if _same(t.run(), t.plain) else None


def _rule_determinism(t: _Trial) -> str | None:
    return t.differs("called again without anything entered") if t.plain else "the model gives no tensor"


def _rule_a_neutral_edit_keeps_every_bit(t: _Trial) -> str | None:
    with t.entering(t.model, AttentionEdit(), _Neutral()):
        return t.differs("under edits that change nothing")


def _rule_a_recorder_keeps_every_bit(t: _Trial) -> str | None:
    recorders: list[Edit] = [RowRecorder("all"), HeadRecorder(), InputsRecorder()]
    if any(place.stack for place in t.reachable):
        recorders.append(StateRecorder())
    with t.entering(t.model, *recorders):
        return t.differs("under recorders")


def _rule_recorded_rows_are_those_of_eager(t: _Trial) -> str | None:
    model: Any = copy.deepcopy(t.model)
    if not hasattr(model, "set_attn_implementation"):
        raise _NotApplicableError("the model has no eager implementation to compare with")
    recorder = RowRecorder("all")
    with t.entering(t.model, recorder):
        t.run()
    model.set_attn_implementation("eager")
    given: dict[str, list[Any]] = {}
    for place in t.reachable:
        model.get_submodule(place.path).register_forward_hook(
            lambda _, __, output, path=place.path: given.setdefault(path, []).append(output)
        )
    model(**t.inputs, output_attentions=True)
    for place, found in recorder.found.items():
        outputs = given.get(place.path, [])
        if len(outputs) != len(found):
            t.unknown.append(f"{place.path} computes {len(found)} times in {len(outputs)} calls")
            continue
        for ours, output in zip(found, outputs, strict=True):
            parts = output if isinstance(output, tuple) else ()
            maps = [x for x in parts if isinstance(x, Tensor) and x.shape == ours.shape]
            if not maps:
                t.unknown.append(f"{place.path} gives no map under eager")
            elif (apart := _apart(ours, maps[-1])) > 1e-5:
                return f"weights recorded at {place.path} differ from eager's by {apart:.3g}, expected at most 1e-5"
    if len(t.unknown) >= len(recorder.found):
        t.unknown = []
        raise _NotApplicableError("the model gives no maps under eager")
    return None


def _rule_leaving_restores(t: _Trial) -> str | None:
    for i in range(t.rounds):
        with t.entering(t.model, _Silent(), *_of_blocks(t)):
            t.run()
        if message := t.left(f"after leaving, round {i + 1}"):
            return message
    return None


def _rule_an_exception_restores(t: _Trial) -> str | None:
    return _after(t, _OwnError)


def _rule_an_interrupt_restores(t: _Trial) -> str | None:
    return _after(t, KeyboardInterrupt)


def _after(t: _Trial, error: type[BaseException]) -> str | None:
    for i in range(t.rounds):
        try:
            with t.entering(t.model, _Failing(error), *_of_blocks(t)):
                t.run()
        except error:
            pass
        else:
            return f"{error.__name__} raised inside did not come out"
        if message := t.left(f"after {error.__name__}, round {i + 1}"):
            return message
    return None


def _rule_a_dropped_generator_restores(t: _Trial) -> str | None:
    def suspended() -> Iterator[None]:
        with t.entering(t.model, _Silent()):
            t.run()
            yield

    for i in range(t.rounds):
        generator = suspended()
        next(generator)
        del generator
        gc.collect(0)
        if message := t.left(f"after a dropped generator, round {i + 1}"):
            return message
    return None


def _rule_contexts_nest(t: _Trial) -> str | None:
    with t.entering(t.model, _Silent()):
        silent = t.run()
        with t.entering(t.model, _Neutral()):
            if not _same(t.run(), silent):
                return "under a neutral edit inside of another, outputs are not those of the outer alone"
        if not _same(t.run(), silent):
            return "after the inner context, the outer does not act as before"
    return t.left("after nested contexts")


def _rule_any_order_of_leaving(t: _Trial) -> str | None:
    outer, inner = t.entering(t.model, _Silent()), t.entering(t.model, _Neutral())
    outer.__enter__()
    inner.__enter__()
    t.run()
    outer.__exit__(None, None, None)
    message = t.differs("with the outer context left first")
    inner.__exit__(None, None, None)
    return message or t.left("after contexts left in the order of entering")


def _rule_other_models_are_not_reached(t: _Trial) -> str | None:
    other = copy.deepcopy(t.model)
    with t.entering(t.model, _Silent()):
        silent = t.run()
        if not _same(t.run(other), t.plain):
            return "another model's outputs change too"
        with t.entering(other, _Neutral()):
            if not _same(t.run(other), t.plain) or not _same(t.run(), silent):
                return "with a second model entered, each is not edited by its own edits alone"
    return t.left("after two models")


def _rule_other_threads_are_not_reached(t: _Trial) -> str | None:
    found: dict[str, list[Tensor]] = {}
    together = threading.Barrier(2, timeout=60)

    def silent() -> None:
        with torch.no_grad(), t.entering(t.model, _Silent()):
            together.wait()
            found["silent"] = t.run()
            together.wait()

    def neutral() -> None:
        together.wait()
        with torch.no_grad(), t.entering(t.model, _Neutral()):
            found["neutral"] = t.run()
        with torch.no_grad():
            found["none"] = t.run()
        together.wait()

    with t.entering(t.model, _Silent()):
        expected = t.run()
    for i in range(t.rounds):
        found.clear()
        threads = [threading.Thread(target=work) for work in (silent, neutral)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) < 3:
            return f"of two threads that enter one model, one ends in an error, round {i + 1}"
        if not _same(found["silent"], expected):
            return f"a thread's own edit does not act beside another thread's, round {i + 1}"
        if not _same(found["neutral"], t.plain) or not _same(found["none"], t.plain):
            return f"a second thread's outputs are not the plain model's, round {i + 1}"
    return t.left("after two threads")


def _rule_a_cache_changes_nothing(t: _Trial) -> str | None:
    model = t.decoder()
    words = t.inputs["input_ids"]
    cut, tokens = words.shape[1] - 2, words.shape[1]
    span = {"named": torch.zeros(len(words), cut, dtype=torch.bool, device=words.device)}
    span["named"][:, 1] = True

    def cached() -> Tensor:
        out = model(input_ids=words[:, :cut], use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            raise _NotApplicableError("the model gives no cache")
        found = [out.logits]
        for i in range(cut, tokens):
            out = model(input_ids=words[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
        return torch.cat(found, 1)

    if _apart(cached(), model(input_ids=words).logits) > 2e-5:
        raise _NotApplicableError("the plain model's cache changes its outputs")
    with t.entering(t.model, _Towards(2), spans=span):
        by_step = cached()
    whole = {"named": torch.nn.functional.pad(span["named"], (0, tokens - cut))}
    with t.entering(t.model, _Towards(2), spans=whole):
        once = model(input_ids=words, use_cache=False).logits
    apart = _apart(by_step, once)
    return f"decoding with a cache differs from without by {apart:.3g}, expected at most 2e-5" if apart > 2e-5 else None


def _rule_a_padded_batch_is_its_items(t: _Trial) -> str | None:
    model = t.decoder()
    most = max(LENGTHS)
    words = t.inputs["input_ids"][:1, :most].repeat(len(LENGTHS), 1)
    mask = torch.ones_like(words)
    span = torch.zeros_like(words, dtype=torch.bool)
    for item, length in enumerate(LENGTHS):
        mask[item, : most - length] = 0
        span[item, most - length + 1] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def last(items: slice, length: int) -> Tensor:
        return model(
            input_ids=words[items, -length:],
            attention_mask=mask[items, -length:],
            position_ids=positions[items, -length:],
        ).logits[:, -1]

    def singles(edit: bool) -> Tensor:
        found = []
        for item, length in enumerate(LENGTHS):
            one = slice(item, item + 1)
            named = {"named": span[one, -length:]}
            with t.entering(t.model, _Towards(0), spans=named) if edit else contextlib.nullcontext():
                found.append(last(one, length))
        return torch.cat(found)

    try:
        own = _apart(last(slice(None), most), singles(False))
    except TypeError as error:
        raise _NotApplicableError("the model takes no position_ids") from error
    if own > 2e-5:
        raise _NotApplicableError("the plain model's padded batch is not its items")
    with t.entering(t.model, _Towards(0), spans={"named": span}):
        batch = last(slice(None), most)
    apart = _apart(batch, singles(True))
    return (
        f"a batch padded on the left differs from its items by {apart:.3g}, expected at most 2e-5"
        if apart > 2e-5
        else None
    )


def _rule_an_empty_span_is_an_error(t: _Trial) -> str | None:
    return _refused(t, AttentionEdit(), "a span without a token", {"named": torch.zeros(1, 3, dtype=torch.bool)})


def _rule_a_place_out_of_reach_is_an_error(t: _Trial) -> str | None:
    edit = AttentionEdit()
    edit.at = Where(blocks=[10**6])
    return _refused(t, edit, "an edit of block 1000000", None)


def _refused(t: _Trial, edit: Edit, what: str, spans: Mapping[str, Tensor] | None) -> str | None:
    try:
        with t.entering(t.model, edit, spans=spans):
            return f"{what} is let in, expected InputError at entry"
    except InputError:
        return t.left(f"after {what} was refused")


def _rule_memory_is_given_back(t: _Trial) -> str | None:
    def enter() -> None:
        with t.entering(t.model, HeadRecorder()):
            t.run()

    enter()
    gc.collect()
    tensors = _bytes_of_tensors()
    tracemalloc.start()
    try:
        for _ in range(ENTRIES):
            enter()
        gc.collect()
        grown = (tracemalloc.get_traced_memory()[0] + _bytes_of_tensors() - tensors) / 2**20
    finally:
        tracemalloc.stop()
    return f"{ENTRIES} entries leave {grown:.0f} MB, expected at most {MEGABYTES}" if grown > MEGABYTES else None


def _of_blocks(t: _Trial) -> list[Edit]:
    return [BlockEdit()] if any(place.stack for place in t.reachable) else []


def _bytes_of_tensors() -> int:
    alive = {x.data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor}
    return sum(alive.values())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = [value for key, value in output.items() if key != "past_key_values"]
    return [x for value in output for x in _tensors(value)] if isinstance(output, (list, tuple)) else []


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


_FIRST = (_rule_determinism,)
_RULES = (
    _rule_an_edit_acts, _rule_a_neutral_edit_keeps_every_bit, _rule_a_recorder_keeps_every_bit,
    _rule_recorded_rows_are_those_of_eager, _rule_leaving_restores, _rule_an_exception_restores,
    _rule_an_interrupt_restores, _rule_a_dropped_generator_restores, _rule_contexts_nest, _rule_any_order_of_leaving,
    _rule_other_models_are_not_reached, _rule_other_threads_are_not_reached, _rule_a_cache_changes_nothing,
    _rule_a_padded_batch_is_its_items, _rule_an_empty_span_is_an_error, _rule_a_place_out_of_reach_is_an_error,
    _rule_memory_is_given_back,
)  # fmt: skip
