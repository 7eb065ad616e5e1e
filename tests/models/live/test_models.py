"""The instrument on every way of attention: what it leaves alone, what it reads, what it changes, what it puts back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import (
    AblatedHeads,
    AttentionCall,
    AttentionEdit,
    Place,
    RowEdit,
    ScaledHeads,
    Where,
    attentions,
    edited,
    recorded,
)

pytestmark = pytest.mark.parametrize(("name", "attention"), zoo.REACHED)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def case(name: str, attention: str) -> zoo.Case:
    return zoo.MODELS[name](attention)


def run(case: zoo.Case, **more: Any) -> list[Tensor]:
    return zoo.tensors(case.model(**case.inputs, **more))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def fingerprint(model: nn.Module) -> list[Any]:
    """All that an edit could have left behind."""
    found: list[Any] = []
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not isinstance(value, (dict, nn.Module, Tensor))}
        hooks = [(key, list(value)) for key, value in vars(module).items() if isinstance(value, dict) and "hook" in key]
        config = module.config.to_dict() if hasattr(getattr(module, "config", None), "to_dict") else None
        found.append((path, sorted(own), hooks, module.training, "forward" in vars(module), str(config)))
    weights = [*model.named_parameters(), *model.named_buffers()]
    found += [(key, id(value), value._version, value.requires_grad) for key, value in weights]
    import transformers.modeling_utils as library

    registry = library.ALL_ATTENTION_FUNCTIONS
    found += [dict(registry), sorted(vars(type(registry)), key=str), type(registry).__getitem__, vars(registry).copy()]
    found += [getattr(type(registry), "get_interface", None)]
    return found


class Silent(AttentionEdit):
    """Every head gives zeros."""

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        return torch.zeros_like(y)


class Flat(AttentionEdit):
    """The same weight for all keys that may be read."""

    def scores(self, call: AttentionCall, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores > float("-inf"), 0.0)


class FlatRows(RowEdit):
    """As `Flat`, for all queries, by rows."""

    def queries(self, call: AttentionCall) -> Tensor:
        return torch.ones(call.batch, call.queries, dtype=torch.bool)

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return call.softmax(Flat().scores(call, call.scores()))


class Neutral(RowEdit):
    """Rows come back as they are, in another tensor."""

    def queries(self, call: AttentionCall) -> Tensor:
        return call.last()

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights.clone()


def test_looking_changes_nothing(case: zoo.Case) -> None:
    plain = run(case)
    with recorded(case.model, "rows", "heads", "inputs", "states", rows="all") as found:
        assert same(run(case), plain)
    places = attentions(case.model)
    assert set(found["rows"]) == set(found["heads"]) == set(found["inputs"]) == set(places)
    with edited(case.model, AttentionEdit(), Neutral()) as done:
        assert same(run(case), plain)
    assert {place for place, _ in done.effect} == set(places)


def test_recorded_weights_make_the_recorded_outputs(case: zoo.Case) -> None:
    with recorded(case.model, "rows", "heads", "inputs", rows="all") as found:
        run(case)
    for place in attentions(case.model):
        for weights, y, call in zip(found["rows"][place], found["heads"][place], found["inputs"][place], strict=True):
            able = call.softmax(call.scores()).sum(-1) > 0
            assert torch.allclose(call.mixed(weights)[able], y[able], atol=1e-5)


def test_recorded_weights_are_those_of_eager(case: zoo.Case, name: str) -> None:
    if name in zoo.OF_ONE_KIND:
        pytest.skip("gives no weights")
    with recorded(case.model, "rows", rows="all") as found, recorded(case.model, "rows", rows="last") as last:
        run(case)
    case.model.set_attn_implementation("eager")
    given: dict[Place, list[Tensor]] = {}
    handles = [
        place.module.register_forward_hook(
            lambda _, __, output, place=place: given.setdefault(place, []).append(
                [x for x in output if x is not None][-1]
            )
        )
        for place in found["rows"]
        # the tower of Qwen2-VL attends image by image, and gives no weights
        if not (name == "qwen2_vl" and "visual" in place.stack)
    ]
    run(case, output_attentions=True)
    for handle in handles:
        handle.remove()
    assert len(given) == len(handles) > 0
    for place, maps in given.items():
        for weights, expected in zip(found["rows"][place], maps, strict=True):
            assert torch.allclose(weights, expected, atol=1e-5)
    for place, rows in last["rows"].items():
        for row, whole in zip(rows, found["rows"][place], strict=True):
            assert torch.allclose(row, whole[:, :, -1:], atol=1e-6)


def test_rows_all_edited_equal_scores_edited(case: zoo.Case) -> None:
    plain = run(case)
    with edited(case.model, Flat()):
        whole = run(case)
    with edited(case.model, FlatRows()):
        rows = run(case)
    assert not same(whole, plain)
    assert all(torch.allclose(a, b, atol=2e-4, rtol=1e-3) for a, b in zip(whole, rows, strict=True))


def test_leaving_puts_everything_back(case: zoo.Case) -> None:
    plain, before = run(case), fingerprint(case.model)
    with edited(case.model, Silent()):
        assert not same(run(case), plain)
    assert fingerprint(case.model) == before
    assert same(run(case), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_puts_everything_back_after_an_error(case: zoo.Case, error: type[BaseException]) -> None:
    class Failing(AttentionEdit):
        def context(self, call: AttentionCall, y: Tensor) -> Tensor:
            raise error("inside")

    plain, before = run(case), fingerprint(case.model)
    with pytest.raises(error, match="inside"), edited(case.model, Failing()):
        run(case)
    assert fingerprint(case.model) == before
    assert same(run(case), plain)
    assert torch._C._len_torch_function_stack() == 0


def test_contexts_may_be_left_in_any_order(case: zoo.Case) -> None:
    plain, before = run(case), fingerprint(case.model)
    outer, inner = edited(case.model, Silent()), edited(case.model, Neutral())
    outer.__enter__()
    inner.__enter__()
    assert not same(run(case), plain)
    outer.__exit__(None, None, None)
    assert same(run(case), plain)
    inner.__exit__(None, None, None)
    assert fingerprint(case.model) == before

    def dropped() -> Iterator[None]:
        with edited(case.model, Silent()):
            yield

    generator = dropped()
    next(generator)
    del generator
    gc.collect()
    assert fingerprint(case.model) == before
    assert same(run(case), plain)


def test_an_ablated_head_is_zeroed_columns_of_the_projection(case: zoo.Case, name: str) -> None:
    place = attentions(case.model)[-1]
    projection = output_projection(case.model, place)
    if projection is None or name == "albert":
        pytest.skip("keeps its projection elsewhere, or runs the module several times")
    head = 1
    with edited(case.model, AblatedHeads([(place.block, head)], Where(kinds=[place.kind], stack=place.stack))):
        ours = run(case)
    heads = recorded_heads(case, place)

    def zero(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        width = args[0].shape[-1] // heads
        x = args[0].clone()
        x[..., head * width : (head + 1) * width] = 0.0
        return (x,)

    if name == "torch":
        weight = projection.weight.clone()
        width = weight.shape[1] // heads
        projection.weight[:, head * width : (head + 1) * width] = 0.0
        theirs = run(case)
        projection.weight.copy_(weight)
    else:
        handle = projection.register_forward_pre_hook(zero)
        theirs = run(case)
        handle.remove()
    assert len(ours) == len(theirs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert not same(ours, run(case))
    factors = torch.ones(heads)
    factors[head] = 0.0
    with edited(case.model, ScaledHeads({place.block: factors}, Where(kinds=[place.kind], stack=place.stack))):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run(case), ours, strict=True))


def recorded_heads(case: zoo.Case, place: Place) -> int:
    with recorded(case.model, "heads") as found:
        run(case)
    return found["heads"][place][0].shape[1]


def output_projection(model: nn.Module, place: Place) -> Any:
    names = ("o_proj", "out_proj", "c_proj", "proj", "dense", "o")
    for name in names:
        if isinstance(getattr(place.module, name, None), nn.Module):
            return getattr(place.module, name)
    if isinstance(getattr(place.module, "to_out", None), nn.ModuleList):
        return place.module.to_out[0]
    beside = getattr(model.get_submodule(place.path.rpartition(".")[0]), "output", None)
    return getattr(beside, "dense", None)


def test_a_place_that_does_not_exist_is_an_error(case: zoo.Case) -> None:
    silent = Silent()
    silent.at = Where(blocks=[99])
    with pytest.raises(InputError, match="has no place"), edited(case.model, silent):
        pass
