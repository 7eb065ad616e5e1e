"""Fewer tokens from a block on: what the survivors read, where they stand, what the cache holds."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.live import test_decoding, test_models, zoo
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
    left,
    places,
    recorded,
    shortenable,
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


OTHERS = {
    "falcon": zoo.text("FalconForCausalLM", True, alibi=True, new_decoder_architecture=False),
    "gptj": zoo.text("GPTJForCausalLM", True, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=32),
    "phi3": zoo.text("Phi3ForCausalLM", True, num_key_value_heads=2, sliding_window=4),
}
"""Positions in other ways: a bias of keys, rotations inside of attention, a window that stands in the configuration alone."""


@pytest.mark.parametrize(
    ("name", "attention"),
    [*test_decoding.ATTENTIONS, ("bloom", "eager"), *[(name, "sdpa") for name in OTHERS]],
)
def test_generating_behind_an_uneven_padded_batch_equals_recomputation(name: str, attention: str) -> None:
    model: Any = {**zoo.MODELS, **OTHERS}[name](attention).model
    inputs, _ = test_decoding.padded()
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
    ((place, step),) = [key for key in run.effect if key[0].kind == "block" and run.effect[key] == 14 + 1]
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


def test_all_rows_of_a_batch_without_padding_are_read() -> None:
    case, seen = zoo.MODELS["vit"]("sdpa"), list[Tensor]()

    def reduce(x: Tensor, sizes: Tensor, mask: Tensor, attention: Tensor) -> Reduced:
        seen.append(attention)
        return dropping(torch.arange(17) % 2 == 0)(x, sizes, mask)

    with (
        recorded(case.model, "rows", rows="all") as found,
        edited(case.model, Shorten(reduce, 0, rows="all", protect=1)),
    ):
        case.model(**case.inputs)
    weights = next(w for place, (w, *_) in found["rows"].items() if place.block == 0)
    torch.testing.assert_close(seen[0], weights.mean(2), rtol=1e-5, atol=1e-6)


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
    stack = (
        "encoder.block"
        if name == "t5"
        else stack_of(model, name)
        if name in STACKS
        else next(iter(places.stacks(model)))
    )
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
        block.register_forward_pre_hook(
            lambda _, args, given: (args, {**given, "alibi": given["alibi"] * 0}), with_kwargs=True
        )
        for block in blocks
    ]


@pytest.mark.parametrize(("name", "attention"), [(n, a) for n in ("t5", "bart", "whisper") for a in ("sdpa", "eager")])
@pytest.mark.parametrize("proportional", [False, True])
def test_what_reads_a_shortened_encoder_follows(name: str, attention: str, proportional: bool) -> None:
    case = zoo.MODELS[name](attention)
    stack = "encoder.block" if name == "t5" else "encoder.layers"
    inputs = dict(case.inputs)
    tokens = 20 if name == "whisper" else 7
    if name != "whisper":
        inputs["attention_mask"] = torch.ones(2, tokens, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
    keep = torch.ones(2, tokens, dtype=torch.bool)
    keep[:, 1] = keep[0, 3] = keep[0, 4] = False
    # a decoder that comes behind starts with what the encoder wrote
    with edited(case.model, HidingItems(keep, stack), HidingFromCross(keep)):
        hidden = case.model(**inputs)
    shorten = Shorten(Dropping(), 0, stack=stack, signals={"keep": keep}, proportional=proportional)
    with edited(case.model, shorten):
        short = case.model(**inputs, use_cache=True)
        words = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        made = case.model.get_encoder()(**words)
        cut = inputs["decoder_input_ids"][:, :3]
        first = case.model(**{**inputs, "decoder_input_ids": cut}, encoder_outputs=made, use_cache=True)
        after = case.model(
            **{**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, 3:4]}, encoder_outputs=made,
            past_key_values=first.past_key_values, use_cache=True,
        )  # fmt: skip
    torch.testing.assert_close(short.last_hidden_state, hidden.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.last_hidden_state[:, 0], hidden.last_hidden_state[:, 3], rtol=1e-4, atol=1e-5)
    assert shorten.found is not None
    real = inputs.get("attention_mask", torch.ones(2, tokens)).bool()
    assert short.encoder_last_hidden_state.shape[1] == int((keep & real).sum(1).max()) < tokens


class HidingFromCross(AttentionEdit):
    """Keys of the encoder that the decoder may not read."""

    at = Where(kinds=["cross"])

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def inputs(self, call: AttentionCall) -> AttentionCall:
        before, keep = call.readable(), self.keep[:, None, None]
        return call.replace(allowed=lambda rows: keep if before is None else before & keep)


def test_spans_follow_to_what_reads_the_encoder() -> None:
    case = zoo.MODELS["bart"]("sdpa")
    span = torch.zeros(2, 7, dtype=torch.bool)
    span[:, 2:5] = True
    found: list[list[int]] = []

    class LookingAcross(AttentionEdit):
        at = Where(kinds=["cross"])

        def inputs(self, call: AttentionCall) -> AttentionCall:
            found.append(call.keys_in("named")[0].int().tolist())
            return call

    # 0-1, 2-3, 4-5, 6
    with edited(case.model, LookingAcross(), Shorten(halves, 0, stack="encoder.layers"), spans={"named": span}):
        case.model(**case.inputs)
    assert found == [[0, 1, 1, 0]] * 2


def test_merged_tokens_of_an_encoder_weigh_in_its_decoder() -> None:
    case = zoo.MODELS["bart"]("sdpa")
    encoder, words = case.model.get_encoder(), case.inputs["input_ids"]
    with shortened(case.model, {1: halves}, stack="encoder.layers", proportional=True) as run:
        short = case.model(**case.inputs).last_hidden_state
        made = encoder(input_ids=words)
    copies = run.expand(made.last_hidden_state)
    made["last_hidden_state"] = copies
    whole = case.model(encoder_outputs=made, decoder_input_ids=case.inputs["decoder_input_ids"]).last_hidden_state
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "vit", "clip", "siglip"])
def test_tokens_put_back_fill_their_places(name: str) -> None:
    case = zoo.MODELS[name]("sdpa")
    stack = next(path for path in places.stacks(case.model) if name == "vit" or "vision" in path)
    first = 0 if name == "siglip" else 1
    tokens = 16 + first
    keep = torch.arange(tokens) % 3 != 2
    with edited(case.model, Shorten(dropping(keep), 0, stack=stack, protect=first, restore=-1)):
        out = zoo.tensors(case.model(**case.inputs))
    assert [x.shape for x in out] == [x.shape for x in zoo.tensors(case.model(**case.inputs))]
    with (
        recorded(case.model, "states", at=Where(stack=stack)) as before,
        edited(case.model, Shorten(dropping(keep), 0, stack=stack, restore=1)),
        recorded(case.model, "states", at=Where(stack=stack)) as found,
    ):
        case.model(**case.inputs)
    with recorded(case.model, "states", at=Where(stack=stack)) as plain, edited(case.model, Hiding1(keep, stack)):
        case.model(**case.inputs)
    zero, one, two = (place for place in places.blocks(case.model) if place.stack == stack)
    states = found["states"]
    assert [states[place][0].shape[1] for place in (zero, one, two)] == [int(keep.sum()), tokens, tokens]
    assert torch.allclose(states[one][0][:, keep], plain["states"][one][0][:, keep], atol=1e-5)
    # what was dropped is as it was seen last
    assert torch.equal(states[one][0][:, ~keep], before["states"][zero][0][:, ~keep])


class Hiding1(Hiding):
    """In block 1 alone."""

    def __init__(self, keep: Tensor, stack: str) -> None:
        super().__init__(keep, stack)
        self.at = Where(blocks=[1], stack=stack)


def test_a_mean_over_tokens_put_back_weighs_by_size() -> None:
    case = zoo.MODELS["own"]("sdpa")
    with shortened(case.model, {1: halves}) as run:
        short = case.model(**case.inputs)
    with shortened(case.model, {1: halves}, restore=-1):
        whole = case.model(**case.inputs)
    assert run.sizes is not None
    mean = (short * run.sizes[..., None]).sum(1) / run.sizes.sum(1, keepdim=True)
    torch.testing.assert_close(whole.mean(1), mean, rtol=1e-5, atol=1e-6)


REFUSED = {
    "swin": ("encoder.layers.0.blocks", "windows of a grid"),
    "qwen2_vl": ("model.visual.blocks", "packs several images"),
    "llava": ("model.vision_tower.encoder.layers", r"config\.image_token_.*restore=-1"),
    "gpt2": ("transformer.h", "restore=-1"),
    "t5": ("decoder.block", "cross attention"),
    "flux": ("transformer_blocks", "joint attention"),
    "albert": (None, "several times"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shortened_is_an_error_at_entry(name: str) -> None:
    stack, why = REFUSED[name]
    model = zoo.MODELS[name]("sdpa").model
    with pytest.raises(InputError, match=why), shortened(model, {0: halves}, stack=stack):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("cls", "settings", "block", "why"),
    [
        ("BertModel", {**zoo.TEXT, "position_embedding_type": "relative_key"}, 0, None),
        ("UMT5EncoderModel", zoo.T5, 0, "knows positions"),
        ("T5EncoderModel", zoo.T5, 0, None),
        ("EsmModel", {**zoo.TEXT, "position_embedding_type": "rotary"}, 0, None),
        ("Wav2Vec2ConformerModel", tiny.WAVES, 0, "knows positions"),
    ],
)
def test_blocks_that_know_positions_by_themselves_are_found(
    cls: str, settings: Any, block: int, why: str | None
) -> None:
    model = zoo.built(cls, settings, "eager")
    stack = next(iter(places.stacks(model)))
    own = [place for place in places.blocks(model)[block + 1 :] if shortenable.own_positions(place.module)]
    assert bool(own) == (why is not None)
    if why is not None:
        with pytest.raises(InputError, match=why), shortened(model, {block: halves}, stack=stack):
            pytest.fail("entered")
        with (
            pytest.raises(InputError, match="did nothing"),
            shortened(model, {len(places.blocks(model)) - 1: halves}, stack=stack),
        ):
            pass


@pytest.mark.parametrize(
    ("cls", "settings", "why"),
    [
        ("DebertaV2Model", {**zoo.TEXT, "relative_attention": True}, "relative_pos"),
        ("RoFormerModel", zoo.TEXT, "sinusoidal_pos"),
        ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 40}, "True means hidden"),
        (
            "Llama4ForCausalLM",
            {**zoo.GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
            "chunks",
        ),
    ],
)
def test_positions_told_in_other_ways_are_an_error(cls: str, settings: Any, why: str) -> None:
    model = zoo.built(cls, settings, "eager")
    with pytest.raises(InputError, match=why), shortened(model, {0: halves}):
        model(input_ids=zoo.ids())


def test_rotations_of_patches_alone_follow_where_the_rest_stays() -> None:
    settings = {**tiny.SMALL, **tiny.VISION, "num_register_tokens": 2}
    model = zoo.built("DINOv3ViTModel", settings, "sdpa")
    keep = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) < 0.6
    with pytest.raises(InputError, match="protect=3"), shortened(model, {0: dropping(torch.arange(19) != 1)}):
        model(pixel_values=zoo.pixels())
    shorten = Shorten(Dropping(), 0, protect=3, signals={"keep": keep}, uneven=True)
    with edited(model, shorten):
        short = model(pixel_values=zoo.pixels()).last_hidden_state
    keep[:, :3] = True
    with edited(model, HidingItems(keep, shorten.found.stack)):  # type: ignore[union-attr]
        whole = model(pixel_values=zoo.pixels()).last_hidden_state
    for item, real in enumerate(shorten.found.mask):  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close(short[item][real], whole[item][keep[item]], rtol=1e-4, atol=1e-5)


def test_flash_attention_is_refused() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="'sdpa' or 'eager'"), shortened(model, {0: halves}):
        pytest.fail("entered")


def test_a_cache_that_was_filled_before_is_an_error() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    words = zoo.ids(2, 9)
    filled = model(input_ids=words, use_cache=True).past_key_values
    with (
        pytest.raises(InputError, match="holds 9 tokens of 2 items that were not shortened here"),
        shortened(model, {0: halves}),
    ):
        model(input_ids=words[:, :1], past_key_values=filled)
    with shortened(model, {0: halves}):
        assert model(input_ids=words).logits.shape[1] == 5
        with pytest.raises(InputError, match="holds 9 tokens"):
            model(input_ids=words[:, :1], past_key_values=filled)
    with shortened(model, {0: halves}):
        ours = model(input_ids=words, use_cache=True).past_key_values
        copied = copy.deepcopy(ours)
        one = model(input_ids=words[:, :2], past_key_values=ours).logits
        assert torch.equal(model(input_ids=words[:, :2], past_key_values=copied).logits, one)
        ours.crop(-1)
        again = model(input_ids=words[:, 1:2], past_key_values=ours).logits
    torch.testing.assert_close(again, one[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_static_cache_is_an_error() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    cache = tiny.transformers().StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(InputError, match="growing cache"), shortened(model, {0: halves}):
        model(input_ids=zoo.ids(2, 9), past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams_and_a_second_prompt(name: str) -> None:
    model: Any = zoo.MODELS[name]("sdpa").model
    inputs, _ = test_decoding.padded()
    real = inputs["attention_mask"].bool()
    keep = real & (torch.arange(9) % 3 != 1)
    with edited(model, Shorten(Dropping(), 0, signals={"keep": keep})) as run:
        batch = test_decoding.generated(model, inputs, num_beams=3)
        again = test_decoding.generated(model, inputs, num_beams=3)
    assert torch.equal(batch.sequences, again.sequences)
    assert sum(run.effect.values()) == 2 * 3 * int((real & ~keep).sum())
    for item, start in enumerate((0, 2, 5, 3)):
        alone = {name: value[item : item + 1, start:] for name, value in inputs.items()}
        cut = Shorten(Dropping(), 0, signals={"keep": keep[item : item + 1, start:]})
        with edited(model, cut):
            one = test_decoding.generated(model, alone, num_beams=3)
        assert torch.equal(one.sequences[0, 9 - start :], batch.sequences[item, 9:])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sizes_weigh_while_decoding_as_in_recomputation(name: str) -> None:
    model: Any = zoo.MODELS[name]("sdpa").model
    words = zoo.ids(2, 12)
    span = torch.zeros(2, 12, dtype=torch.bool)
    span[:, 1:7] = True
    with edited(model, Shorten(halves, 0, span="text", proportional=True), spans={"text": span}):
        whole = model(input_ids=words, use_cache=False).logits
    with edited(model, Shorten(halves, 0, span="text", proportional=True), spans={"text": span[:, :9]}):
        first = model(input_ids=words[:, :9], use_cache=True)
        steps = [first.logits]
        for i in range(9, 12):
            steps.append(model(input_ids=words[:, i : i + 1], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_items_that_keep_different_numbers_in_an_encoder() -> None:
    case = zoo.MODELS["bert"]("sdpa")
    keep = torch.arange(9).expand(2, -1) != 3
    keep = keep & ~torch.eye(2, 9, dtype=torch.bool)[[1, 1]] | torch.tensor([[True], [False]]) & (torch.arange(9) != 3)
    with (
        pytest.raises(InputError, match="uneven=True"),
        edited(case.model, Shorten(Dropping(), 0, signals={"keep": keep})),
    ):
        case.model(**case.inputs)
    shorten = Shorten(Dropping(), 0, signals={"keep": keep}, uneven=True)
    with edited(case.model, shorten):
        short = case.model(**case.inputs).last_hidden_state
    with edited(case.model, HidingItems(keep, "encoder.layer")):
        whole = case.model(**case.inputs).last_hidden_state
    assert shorten.found is not None
    assert shorten.found.mask is not None
    for item in range(2):
        torch.testing.assert_close(short[item][shorten.found.mask[item]], whole[item][keep[item]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_by_an_error_puts_everything_back(error: type[BaseException]) -> None:
    case = zoo.MODELS["qwen3"]("sdpa")
    plain, before = case.model(**case.inputs).logits, test_models.fingerprint(case.model)

    def failing(x: Tensor, sizes: Tensor, mask: Tensor, keys: Tensor) -> Reduced:
        raise error("inside")

    for _ in range(2):
        with pytest.raises(error, match="inside"), edited(case.model, Shorten(failing, 1)):
            case.model(**case.inputs)
        assert test_models.fingerprint(case.model) == before
        assert torch.equal(case.model(**case.inputs).logits, plain)
        assert not shorten_module._RUNNING
        assert not left._STANDING


def test_two_models_and_leaving_in_any_order() -> None:
    cases = [zoo.MODELS["llama"]("sdpa"), zoo.MODELS["llama"]("sdpa")]
    plain = cases[0].model(**cases[0].inputs).logits
    keep = torch.arange(9) != 4
    one, two = (edited(cases[0].model, Shorten(dropping(keep), 0)), edited(cases[1].model, Shorten(dropping(keep), 1)))
    one.__enter__()
    two.__enter__()
    outs = [case.model(**case.inputs).logits for case in cases]
    assert [out.shape[1] for out in outs] == [8, 8]
    assert not torch.equal(*outs)
    one.__exit__(None, None, None)
    assert torch.equal(cases[0].model(**cases[0].inputs).logits, plain)
    assert torch.equal(cases[1].model(**cases[1].inputs).logits, outs[1])
    two.__exit__(None, None, None)
    assert torch.equal(cases[1].model(**cases[1].inputs).logits, plain)


def test_nothing_of_the_model_is_kept() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    shorten = Shorten(halves, 0)
    with edited(case.model, shorten):
        case.model(**case.inputs)
    seen = weakref.ref(case.model)
    del case
    gc.collect()
    assert seen() is None
    assert shorten.found is not None
    assert shorten.found.assignment is not None


def test_entered_twice_is_an_error_and_once_more_is_not() -> None:
    case = zoo.MODELS["llama"]("sdpa")
    shorten = Shorten(halves, 0)
    with edited(case.model, shorten):
        with pytest.raises(InputError, match="entered already"), edited(case.model, shorten):
            pytest.fail("entered")
        first = case.model(**case.inputs).logits
    with edited(case.model, shorten):
        assert torch.equal(case.model(**case.inputs).logits, first)


def test_an_option_that_fits_nothing_is_an_error() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    for options, why in (
        ({"block": 9}, "block: expected one of 0 to 2"),
        ({"block": 1, "restore": 0}, "restore: expected -1 or a block of 1 to 2"),
        ({"block": 0, "span": "image"}, "needs 'image'"),
        ({"block": 0, "stack": "layers"}, "stack: 'layers' is none of 'model.layers'"),
    ):
        with pytest.raises(InputError, match=why), edited(model, Shorten(halves, **options)):  # type: ignore[arg-type]
            pytest.fail("entered")
    odd: Any
    for odd, why in (
        ({"0": halves}, "block: expected the number of a block, got '0'"),
        ({0: halves, "1": halves}, "block: expected the number of a block, got '1'"),
        ({0.5: halves}, "block: expected"),
        ({0: None}, "reducer: expected a function or module, got NoneType"),
        ([halves], "reducers: give at least one, by the number"),
    ):
        with pytest.raises(InputError, match=why), shortened(model, odd):
            pytest.fail("entered")
    with pytest.raises(InputError, match="signals: expected a tensor for each name, got list for 'saliency'"):
        Shorten(halves, 0, signals={"saliency": [1.0]})  # type: ignore[dict-item]
    greedy = functools.partial(halves)
    greedy.needs = "keys"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="needs: expected names"):
        Shorten(greedy, 0)
    with pytest.raises(InputError, match="protect: expected a bool tensor"):
        Shorten(halves, 0, protect=torch.ones(1, 3))
    short = torch.ones(1, 3, dtype=torch.bool)
    with (
        pytest.raises(InputError, match=r"3 tokens, and model\.layers reads 2 items of 9"),
        edited(model, Shorten(halves, 0, protect=short)),
    ):
        model(input_ids=zoo.ids())


def test_what_a_reducer_gives_is_checked() -> None:
    case = zoo.MODELS["llama"]("sdpa")

    def beyond(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        return Reduced(x[:, :2], sizes[:, :2], torch.arange(x.shape[1]).expand(len(x), -1))

    def nothing(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        return Reduced(x, sizes, torch.full(x.shape[:2], -1))

    def bare(x: Tensor, sizes: Tensor, mask: Tensor) -> Any:
        return x[:, :2], sizes[:, :2]

    def narrow(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        return Reduced(x[..., :3], sizes, torch.arange(x.shape[1]).expand(len(x), -1))

    def halved(x: Tensor, sizes: Tensor, mask: Tensor) -> Any:
        return Reduced._make((x, sizes, torch.arange(x.shape[1]).expand(len(x), -1) / 2, None))

    for reducer, why in (
        (beyond, "numbers below 2"),
        (nothing, "left no token"),
        (bare, r"gave tuple, expected Reduced\(tokens, sizes, assignment\)"),
        (narrow, r"gave tokens \(2, 9, 3\), expected \[batch, left, 32\]"),
        (halved, "an assignment of torch.float32"),
    ):
        with pytest.raises(InputError, match=why), edited(case.model, Shorten(reducer, 0)):
            case.model(**case.inputs)


def test_sizes_stay_whole_numbers_in_half_precision() -> None:
    model = zoo.MODELS["llama"]("sdpa").model.bfloat16()

    def one(x: Tensor, sizes: Tensor, mask: Tensor) -> Reduced:
        assert sizes.dtype == torch.float32
        return Reduced(x[:, :1], sizes.sum(1, keepdim=True), torch.zeros(x.shape[:2], dtype=torch.long))

    with shortened(model, {0: one}, proportional=True) as run:
        out = model(input_ids=zoo.ids(1, 30)).logits
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert run.sizes is not None
    assert run.sizes.tolist() == [[30.0]]
