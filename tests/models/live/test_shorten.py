"""Fewer tokens from a block on: what the survivors read, where they stand, what the cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models.live import test_decoding, zoo
from torch import Tensor

from cenote.core import InputError
from cenote.core.reduced import Reduced
from cenote.models.live import AttentionCall, AttentionEdit, Shorten, Where, edited, places, shortened

STACKS = {
    "llama": "model.layers", "qwen3": "model.layers", "vit": None, "dinov2": None, "clip": "vision_model.layers",
    "siglip": "vision_model.layers", "llava": "model.language_model.layers", "qwen2_vl": "model.language_model.layers",
    "timm": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def dropping(keep: Tensor) -> Any:
    """Only these tokens, `[tokens]`, of those that it may touch."""

    def reduce(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        real = keep[-x.shape[1] :].to(x.device) & mask
        number = torch.arange(x.shape[1]).expand(len(x), -1)
        return Reduced(x, sizes * real, number.masked_fill(~real, -1), real)

    return reduce


def same(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
    number = torch.arange(x.shape[1]).expand(len(x), -1)
    return Reduced(x, sizes, number.masked_fill(~mask, -1), mask)


def stack_of(model: Any, name: str) -> str:
    wanted = STACKS[name]
    found = [path for path in places.stacks(model) if wanted is None or path.endswith(wanted.split(".", 1)[-1])]
    vision = [path for path in found if "vision" in path]
    return (vision or found)[-1] if name in ("clip", "siglip") else found[-1]


@pytest.mark.parametrize("name", STACKS)
def test_all_tokens_kept_is_the_same_to_the_bit(name: str) -> None:
    case = zoo.MODELS[name]("sdpa")
    plain = zoo.tensors(case.model(**case.inputs))
    stack = stack_of(case.model, name)
    with pytest.raises(InputError, match="Shorten did nothing"), shortened(case.model, {0: same}, stack=stack):
        ours = zoo.tensors(case.model(**case.inputs))
    assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_a_cache_equals_recomputation_of_survivors(attention: str) -> None:
    model = zoo.MODELS["llama"](attention).model
    keep = torch.tensor([True, False, True, True, False, True, True, False, True, True, True])
    words = zoo.ids(2, 11)
    with shortened(model, {0: dropping(keep)}):
        whole = model(input_ids=words, use_cache=False).logits
    assert whole.shape[1] == int(keep.sum())
    with shortened(model, {0: dropping(keep[:9])}) as run:
        first = model(input_ids=words[:, :9], use_cache=True)
        steps = [first.logits]
        for i in (9, 10):
            cache = first.past_key_values
            steps.append(model(input_ids=words[:, i : i + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    assert run.origin is not None
    assert run.origin[0].tolist() == keep[:9].nonzero()[:, 0].tolist()


def test_cross_attention_is_refused() -> None:
    with (
        pytest.raises(InputError, match="cross"),
        shortened(zoo.MODELS["bart"]("sdpa").model, {0: same}, stack="decoder.layers"),
    ):
        pass


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_shortenings_decode_and_padded_batches_are_their_items(attention: str) -> None:
    model = zoo.MODELS["llama"](attention).model
    words, mask = zoo.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    one = torch.tensor([True, True, True, True, False, True, True, False, True])
    two = torch.ones(7, dtype=torch.bool)
    two[-3] = False

    def out(rows: slice, start: int) -> list[Tensor]:
        inputs = {"input_ids": words[rows, start:], "attention_mask": mask[rows, start:]}
        with shortened(model, {0: dropping(one), 1: dropping(two)}):
            first = model(**inputs, position_ids=positions[rows, start:], use_cache=True)
            longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            after = model(
                input_ids=words[rows, :1], attention_mask=longer, position_ids=positions[rows, -1:] + 1,
                past_key_values=first.past_key_values,
            )  # fmt: skip
        return [first.logits[:, -3:], after.logits]

    batch = out(slice(0, 2), 0)
    for i, start in ((0, 0), (1, 3)):
        for ours, alone in zip(batch, out(slice(i, i + 1), start), strict=True):
            assert torch.allclose(ours[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merged_copies_weigh_as_many(attention: str) -> None:
    case = zoo.MODELS["vit"](attention)

    def copies(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        number = torch.arange(x.shape[1]).expand(len(x), -1).clamp(max=4)
        left = x[:, :5]
        return Reduced(left, torch.zeros(len(x), 5).scatter_add_(1, number, sizes), number)

    def copied(_: Any, __: Any, h: Tensor) -> Tensor:
        return torch.cat([h[:, :5], h[:, 4:5].expand(-1, h.shape[1] - 5, -1)], 1)

    stack = stack_of(case.model, "vit")
    handle = case.model.get_submodule(f"{stack}.0").register_forward_hook(copied)
    plain = zoo.tensors(case.model(**case.inputs))[0]
    with shortened(case.model, {0: copies}, proportional=True) as run:
        short = zoo.tensors(case.model(**case.inputs))[0]
    handle.remove()
    assert short.shape[1] == 5
    assert torch.allclose(run.expand(short), plain, atol=1e-5)


class Hiding(AttentionEdit):
    """Keys that nothing may read from block 1 on."""

    def __init__(self, keep: Tensor, stack: str) -> None:
        self.keep, self.at = keep, Where(blocks=range(1, 9), stack=stack)

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, keep = call.readable(), self.keep.view(1, 1, 1, -1)
        return call.replace(allowed=lambda rows: keep if before is None else before & keep)


@pytest.mark.parametrize("name", ["llama", "qwen3", "vit", "dinov2", "llava", "qwen2_vl"])
def test_dropped_tokens_are_as_hidden_ones_and_protected_ones_stay(name: str) -> None:
    case = zoo.MODELS[name]("sdpa")
    stack = stack_of(case.model, name)
    plain = zoo.tensors(case.model(**case.inputs))[0]
    tokens = plain.shape[1]
    keep = torch.arange(tokens) % 3 != 1
    protect = torch.zeros(1, tokens, dtype=torch.bool)
    protect[0, 1] = True
    with edited(case.model, Hiding(keep | protect[0], stack)):
        hidden = zoo.tensors(case.model(**case.inputs))[0]
    with shortened(case.model, {0: dropping(keep)}, stack=stack, protect=protect):
        short = zoo.tensors(case.model(**case.inputs))[0]
    assert torch.allclose(short, hidden[:, keep | protect[0]], atol=1e-5)
    assert torch.equal(zoo.tensors(case.model(**case.inputs))[0], plain)


class Dropping:
    """Of the prompt's tokens these alone, `[batch, tokens]`, an item may keep more than another."""

    needs = ("keep",)

    def __call__(self, x: Tensor, sizes: Tensor, mask: Tensor, keep: Tensor) -> Reduced:
        real = keep & mask
        number = torch.arange(x.shape[1]).expand(len(x), -1)
        return Reduced(x, sizes * real, number.masked_fill(~real, -1), real)


def hidden_by_hooks(model: Any, stack: str, keep: Tensor) -> list[Any]:
    """As `Hiding`, where attention is written out: through the masks that blocks are given."""

    def hide(_: Any, args: Any, given: dict[str, Any]) -> Any:
        mask = given["attention_mask"]
        hidden = mask.masked_fill(~keep[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**given, "attention_mask": hidden}

    return [block.register_forward_pre_hook(hide, with_kwargs=True) for block in model.get_submodule(stack)[1:]]


@pytest.mark.parametrize(("name", "attention"), [*test_decoding.ATTENTIONS, ("bloom", "eager")])
def test_generating_behind_an_uneven_padded_batch_equals_recomputation(name: str, attention: str) -> None:
    model: Any = zoo.MODELS[name](attention).model
    inputs, spans = test_decoding.padded()
    real = inputs["attention_mask"].bool()
    keep = torch.rand(real.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    keep = real & (keep | (torch.arange(9) == 8))
    assert len({int(count) for count in keep.sum(1)}) > 1
    stack = next(iter(places.stacks(model)))
    # GPT-2 gives its output the shape of its input
    shorten = Shorten(Dropping(), 0, signals={"keep": keep}, restore=-1 if name == "gpt2" else None)
    with edited(model, shorten):
        made = test_decoding.generated(model, inputs, max_new_tokens=6)
    assert shorten.found is not None
    assert shorten.found.counts == {0: (int(real.sum()), int(keep.sum()))}
    for step, logits in enumerate(made.logits):
        longer = torch.nn.functional.pad
        shown = {
            "input_ids": made.sequences[:, : 9 + step],
            "attention_mask": longer(inputs["attention_mask"], (0, step), value=1),
        }
        seen = longer(keep, (0, step), value=True)
        # what is padding reads nothing either way
        if name == "bloom":
            handles = hidden_by_hooks(model, stack, seen)
            again = test_decoding.generated(model, shown, max_new_tokens=1, use_cache=False)
            for handle in handles:
                handle.remove()
        else:
            with edited(model, HidingItems(seen, stack)):
                again = test_decoding.generated(model, shown, max_new_tokens=1, use_cache=False)
        torch.testing.assert_close(logits, again.logits[0], rtol=1e-4, atol=1e-4)


class HidingItems(AttentionEdit):
    """Keys that nothing may read from block 1 on, by item."""

    def __init__(self, keep: Tensor, stack: str) -> None:
        self.keep, self.at = keep, Where(blocks=range(1, 9), stack=stack)

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, keep = call.readable(), self.keep[:, None, None]
        return call.replace(allowed=lambda rows: keep if before is None else before & keep)
