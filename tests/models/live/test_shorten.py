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
from cenote.models.live import (
    AttentionCall,
    AttentionEdit,
    RowRecorder,
    Shorten,
    StateRecorder,
    Where,
    edited,
    places,
    recorded,
    shortened,
)
from cenote.models.live import shorten as shorten_module
from cenote.models.live.calls import causal

STACKS = {
    "llama": "model.layers", "qwen3": "model.layers", "vit": None, "dinov2": None, "clip": "vision_model.layers",
    "siglip": "vision_model.layers", "llava": "model.language_model.layers", "qwen2_vl": "model.language_model.layers",
    "timm": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(True)


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


def halves(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
    """Neighbours that may both be touched become their mean."""
    number = torch.arange(x.shape[1]).expand(len(x), -1)
    both = mask[:, 0::2][:, : x.shape[1] // 2] & mask[:, 1::2]
    paired = both.repeat_interleave(2, 1)
    paired = torch.nn.functional.pad(paired, (0, x.shape[1] - paired.shape[1]))
    to = torch.where(paired, number // 2 * 2, number).masked_fill(~mask, -1)
    index = to.masked_fill(to < 0, x.shape[1])
    made = torch.zeros(len(x), x.shape[1] + 1)
    weights = made.scatter_add(1, index, sizes)[:, :-1]
    sums = torch.zeros(len(x), x.shape[1] + 1, x.shape[2])
    sums = sums.scatter_add(1, index[..., None].expand_as(x), x * sizes[..., None])[:, :-1]
    return Reduced(sums / weights.clamp(min=1e-9)[..., None], weights, to)


def test_it_stands_beside_recorders_in_one_context_and_spans_follow() -> None:
    case = zoo.MODELS["llava"]("sdpa")
    image = case.inputs["input_ids"] == 39
    stack = stack_of(case.model, "llava")
    question = torch.zeros_like(image)
    question[:, -4:] = True
    spans = {"image": image, "question": question}
    shorten = Shorten(halves, 0, span="image", stack=stack)
    rows, states, calls = RowRecorder("question", Where(stack=stack)), StateRecorder(Where(stack=stack)), Looking()
    with edited(case.model, shorten, rows, states, calls, spans=spans) as run:
        out = case.model(**case.inputs)
    assert out.logits.shape[1] == 3 + 9 + 4
    assert [rows.found[place][0].shape[2:] for place in rows.found] == [(4, 23), (4, 16), (4, 16)]
    assert [x[0].shape[1] for x in states.written.values()] == [16, 16, 16]
    assert calls.images == [16, 9, 9]
    found = shorten.found
    assert found is not None
    assert found.counts == {0: (46, 32)}
    assert found.sizes is not None
    assert found.sizes[0].tolist() == [1.0] * 4 + [2.0] * 7 + [1.0] * 5
    # a merged token stands where its last original stood, as nothing may read what is behind it
    assert found.origin is not None
    assert found.origin[0].tolist() == [0, 1, 2, 3, *range(5, 18, 2), 18, 19, 20, 21, 22]
    (place, step), = [key for key in run.effect if key[0].kind == "block" and run.effect[key] == 14 + 1]
    assert (place.block, step) == (0, 0)


class Looking(AttentionEdit):
    """How many keys are of the image."""

    asks = ("image",)
    at = Where(stack="model.language_model.layers")

    def begins(self) -> None:
        self.images: list[int] = []

    def inputs(self, call: AttentionCall) -> AttentionCall:
        self.images.append(int(call.keys_in("image")[0].sum()))
        return call


@pytest.mark.parametrize("outside", [True, False])
def test_nested_both_ways_is_the_same(outside: bool) -> None:
    case = zoo.MODELS["llama"]("sdpa")
    keep = torch.arange(9) % 2 == 0
    span = torch.zeros(2, 9, dtype=torch.bool)
    span[:, :4] = True
    contexts = [
        lambda: edited(case.model, Shorten(dropping(keep), 0)),
        lambda: edited(case.model, RowRecorder("first"), Ablating(), spans={"first": span}),
    ]  # fmt: skip
    with edited(case.model, Shorten(dropping(keep), 0), Ablating(), spans={"first": span}):
        beside = case.model(**case.inputs).logits
    outer, inner = contexts if outside else contexts[::-1]
    with outer(), inner():
        nested = case.model(**case.inputs).logits
    assert torch.equal(nested, beside)
    with edited(case.model, Shorten(dropping(keep), 0)):
        assert not torch.equal(case.model(**case.inputs).logits, beside)


class Ablating(AttentionEdit):
    """Nothing reads the span."""

    asks = ("first",)

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, seen = call.allowed, ~call.keys_in("first")[:, None, None]
        seen = seen | (torch.arange(call.keys) == 0)
        return call.replace(allowed=lambda rows: seen & (before(rows) if before else causal(call.keys)(rows)))


@pytest.mark.parametrize("way", ["one context", "nested", "short form"])
def test_two_cuts_however_they_are_entered(way: str) -> None:
    case = zoo.MODELS["llama"]("eager")
    one, two = torch.arange(9) != 3, torch.arange(8) != 1
    with shortened(case.model, {0: dropping(one), 1: dropping(two)}) as run:
        expected = case.model(**case.inputs).logits
    first, second = Shorten(dropping(one), 0), Shorten(dropping(two), 1)
    if way == "one context":
        with edited(case.model, second, first):
            ours = case.model(**case.inputs).logits
    elif way == "nested":
        with edited(case.model, second), edited(case.model, first):
            ours = case.model(**case.inputs).logits
    else:
        with shortened(case.model, {1: dropping(two)}) as other, shortened(case.model, {0: dropping(one)}) as run:
            assert other is run
            ours = case.model(**case.inputs).logits
    assert torch.equal(ours, expected)
    assert run.counts == {0: (18, 16), 1: (16, 14)}
    assert run.origin is not None
    assert run.origin[0].tolist() == [0, 2, 4, 5, 6, 7, 8]


def test_reducers_read_signals_of_their_block_by_name() -> None:
    case = zoo.MODELS["qwen3"]("sdpa")
    seen: dict[str, Tensor] = {}
    words = case.inputs["input_ids"]
    mask = torch.ones_like(words)
    mask[1, :2] = 0
    saliency = torch.arange(18.0).view(2, 9)

    def reduce(x: Tensor, sizes: Tensor, mask: Tensor, attention: Tensor, keys: Tensor, saliency: Tensor) -> Reduced:
        seen.update(attention=attention, keys=keys, saliency=saliency)
        return dropping(torch.arange(9) > 0)(x, sizes, mask)

    for rows, wanted in (("last", "last"), ("first", "first"), ("all", "all"), ("named", "named")):
        span = torch.zeros(2, 9, dtype=torch.bool)
        span[:, 3:6] = True
        at = Where(blocks=[1])
        with (
            recorded(case.model, "rows", "inputs", rows="all", at=at, spans={"named": span}) as found,
            edited(case.model, Shorten(reduce, 1, rows=rows, signals={"saliency": saliency}), spans={"named": span}),
        ):
            case.model(input_ids=words, attention_mask=mask)
        (weights,), (call,) = next(iter(found["rows"].values())), next(iter(found["inputs"].values()))
        expected = torch.stack([
            item[:, rows_of(wanted, start)].mean(1) for item, start in zip(weights, (0, 2), strict=True)
        ])  # fmt: skip
        torch.testing.assert_close(seen["attention"], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(seen["keys"], call.k)
        assert torch.equal(seen["saliency"], saliency)


def rows_of(wanted: str, start: int) -> Any:
    return {"last": [8], "first": [start], "all": slice(start, None), "named": slice(3, 6)}[wanted]


def test_signals_are_never_a_full_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    case, most = zoo.MODELS["vit"]("sdpa"), [0]
    softmax = AttentionCall.softmax

    def watched(call: AttentionCall, scores: Tensor) -> Tensor:
        most[0] = max(most[0], scores.shape[2])
        return softmax(call, scores)

    def reduce(x: Tensor, sizes: Tensor, mask: Tensor, attention: Tensor) -> Reduced:
        assert attention.shape == (2, 4, 17)
        return dropping(torch.arange(17) % 2 == 0)(x, sizes, mask)

    monkeypatch.setattr(AttentionCall, "softmax", watched)
    monkeypatch.setattr(shorten_module, "CHUNK", 5)
    for rows, number in (("first", 1), ("all", 5)):
        most[0] = 0
        with edited(case.model, Shorten(reduce, 0, rows=rows, protect=1)):
            case.model(**case.inputs)
        assert most[0] == number


def test_a_signal_that_nobody_gives_is_an_error() -> None:
    def reduce(x: Tensor, sizes: Tensor, mask: Tensor, saliency: Tensor) -> Reduced:
        raise AssertionError

    with pytest.raises(InputError, match="asks for saliency; there are attention, keys, values"):
        Shorten(reduce, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip", "wav2vec2", "bert", "torch", "bloom", "t5"])
def test_k_equal_tokens_as_one_of_size_k(name: str, attention: str) -> None:
    if (name, attention) in {("torch", "eager"), ("bloom", "sdpa")}:
        pytest.skip("there is one way of attention")
    case = zoo.MODELS[name](attention)
    model = case.model
    stack = "encoder.block" if name == "t5" else stack_of(model, name) if name in STACKS else next(iter(places.stacks(model)))
    blocks = model.get_submodule(stack)
    inputs = dict(case.inputs)
    if name == "torch":
        inputs.pop("src_key_padding_mask")
    # block 1 must not know positions of its own, so that equal tokens are read equally
    first = 3 if name != "t5" else 2
    tokens = [0]

    def copied(_: Any, __: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        tokens[0] = h.shape[1]
        new = torch.cat([h[:, :first], h[:, first - 1 : first].expand(-1, h.shape[1] - first, -1)], 1)
        if isinstance(output, Tensor):
            return new
        return (new, *[part * 0 if part is not None else None for part in output[1:]])

    def merging(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        to = torch.arange(x.shape[1]).expand(len(x), -1).clamp(max=first - 1)
        return Reduced(x[:, :first], torch.zeros(len(x), first).scatter_add(1, to, sizes), to)

    def states() -> Tensor:
        with recorded(model, "states", at=Where(stack=stack)) as found:
            model(**inputs)
        return list(found["states"].values())[1][0]

    flat = without_alibi(blocks) if name == "bloom" else []
    handle = blocks[0].register_forward_hook(copied)
    try:
        whole = states()
        crossing = {"uneven": True} if name == "torch" else {}
        with shortened(model, {0: merging}, stack=stack, proportional=True, **crossing) as run:
            # causal models read a prefix, whose length sizes cannot tell
            short = states()
        with shortened(model, {0: merging}, stack=stack, **crossing):
            unweighted = states()
    finally:
        for hook in [handle, *flat]:
            hook.remove()
    assert short.shape[1] == first
    last = slice(-1, None) if name == "bloom" else slice(None)
    torch.testing.assert_close(run.expand(short)[:, last], whole[:, last], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(unweighted[:, last], short[:, last], atol=1e-6)


def without_alibi(blocks: Any) -> list[Any]:
    return [
        block.register_forward_pre_hook(lambda _, args, given: (args, {**given, "alibi": given["alibi"] * 0}), with_kwargs=True)
        for block in blocks
    ]
