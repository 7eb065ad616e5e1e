"""What is refused, how edits compose, threads, gradients, memory."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.live import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.core import InputError
from cenote.models.live import (
    AblatedHeads,
    AddedStates,
    AttentionCall,
    AttentionEdit,
    BlockEdit,
    HeadRecorder,
    Place,
    RowEdit,
    RowRecorder,
    ScaledHeads,
    StateRecorder,
    Where,
    attentions,
    blocks,
    edited,
    embeddings,
    final_norm,
    of_part,
    recorded,
    stacks,
)
from cenote.models.live.calls import dense
from cenote.models.live.edits import Act, apply


class Scaled(AttentionEdit):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def context(self, call: AttentionCall, y: Tensor) -> Tensor:
        return self.factor * y


class Rows(RowEdit):
    """Rows of a span, times a factor, plus a term."""

    def __init__(self, choose: Callable[[AttentionCall], Tensor], factor: float, term: float = 0.0) -> None:
        self.choose, self.factor, self.term = choose, factor, term

    def queries(self, call: AttentionCall) -> Tensor:
        return self.choose(call)

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        assert weights.shape == (call.batch, call.heads, call.queries, call.keys)
        return weights * self.factor + self.term


class Explicit(AttentionEdit):
    """Forces the written-out computation."""

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights


def llama(attention: str = "sdpa") -> tuple[Any, Tensor]:
    case = zoo.MODELS["llama"](attention)
    return case.model, case.inputs["input_ids"]


def logits(model: Any, words: Tensor) -> Tensor:
    with torch.no_grad():
        return model(words).logits


def span(*numbers: int, batch: int = 2, tokens: int = 9) -> Tensor:
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    mask[:, list(numbers)] = True
    return mask


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ({"a": torch.zeros(2, 9)}, "expected a bool tensor"),
        ({"a": (1, 3)}, "expected a bool tensor"),
        ({"a": torch.ones(9, dtype=torch.bool)}, "expected a bool tensor"),
        ({"a": torch.zeros(2, 9, dtype=torch.bool)}, "has no token"),
        ({"a": span(1), "b": span(1, batch=3)}, "of one batch"),
        ({"b": span(1)}, "needs 'a'"),
        ({}, "needs 'a'"),
    ],
)
def test_spans_are_checked_at_entry(spans: Any, says: str) -> None:
    model, _ = llama()
    with pytest.raises(InputError, match=says), edited(model, RowRecorder("a"), spans=spans):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(span(1, tokens=8), "of 8 tokens"), (span(1, tokens=20), "of 20"), (span(1, batch=3), "of 3 items")],
)
def test_spans_of_other_tokens_are_an_error(wrong: Tensor, says: str) -> None:
    model, words = llama()
    with pytest.raises(InputError, match=says), edited(model, RowRecorder("a"), spans={"a": wrong}):
        logits(model, words)


class Rereading(RowEdit):
    """Looks at its span only where it edits rows, and chooses them without it."""

    asks = ("a",)

    def queries(self, call: AttentionCall) -> Tensor:
        return call.last()

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return torch.where(call.keys_in("a")[:, None, None], 2 * weights, weights)


def test_a_short_span_is_refused_where_rows_alone_look_at_it() -> None:
    model, words = llama()
    short = {"a": span(1, tokens=8)}
    with pytest.raises(InputError, match=r"'a' is of 8 tokens.* reads 9"), edited(model, Rereading(), spans=short):
        logits(model, words)
    # a second prompt in the same context is no decoding of the first
    with edited(model, Rereading(), spans=short):
        logits(model, words[:, :8])
        with pytest.raises(InputError, match=r"'a' is of 8 tokens.* reads 12"):
            logits(model, words.repeat(1, 2)[:, :12])
    with edited(model, Rereading(), spans=short):
        # without a cache, one token more each time
        logits(model, words[:, :8])
        logits(model, words)


def test_drafts_behind_a_prompt_are_named_where_a_span_is_asked_for() -> None:
    model, _ = llama()
    words = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 20, "do_sample": False, "prompt_lookup_num_tokens": 3}
    whole = {"a": span(1, batch=1, tokens=10)}
    with pytest.raises(InputError, match=r"without drafts.*prompt_lookup"), edited(model, Rereading(), spans=whole):
        model.generate(words, attention_mask=torch.ones_like(words), **options)


def test_an_unknown_span_names_the_known_ones() -> None:
    model, words = llama()
    edit = Rows(lambda call: call.queries_in("imge"), 2.0)
    with pytest.raises(InputError, match=r"'imge'.*there are: image"), edited(model, edit, spans={"image": span(2)}):
        logits(model, words)


def test_out_of_reach_is_an_error_at_entry() -> None:
    bloom = zoo.MODELS["bloom"]("eager").model
    with pytest.raises(InputError, match="writes it out"), edited(bloom, Scaled(1.0)):
        pytest.fail("entered")
    with edited(bloom, StateRecorder()):
        bloom(zoo.ids())
    encoder = zoo.MODELS["torch"]("")
    with pytest.raises(InputError, match="set_fastpath_enabled"), edited(encoder.model, Scaled(1.0)):
        pytest.fail("entered")
    own = zoo.MODELS["own"]("").model
    own.blocks[0].attn.fused_attn = False
    with pytest.raises(InputError, match="fused_attn=True"), edited(own, Scaled(1.0)):
        pytest.fail("entered")
    with pytest.raises(InputError, match="Linear has none"), edited(nn.Linear(2, 2), Scaled(1.0)):
        pytest.fail("entered")
    with pytest.raises(InputError, match="give at least one"), edited(own):
        pytest.fail("entered")
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"), edited("llama", Scaled(1.0)):  # type: ignore[arg-type]
        pytest.fail("entered")
    with pytest.raises(InputError, match="expected AttentionEdit"), edited(own, lambda y: y):  # type: ignore[arg-type]
        pytest.fail("entered")
    with pytest.raises(InputError, match="'maps' cannot be recorded"), recorded(own, "maps"):
        pytest.fail("entered")


def test_weights_of_multi_head_attention_are_written_out() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=False)
    x = torch.randn(3, 2, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(InputError, match="need_weights=False"), edited(model, Scaled(1.0)):
            model(x, x, x)
        plain, _ = model(x, x, x, need_weights=False)
        maps = model(x, x, x, average_attn_weights=False)[1]
        with recorded(model, "rows", rows="all") as found:
            assert torch.equal(model(x, x, x, need_weights=False)[0], plain)
        assert torch.allclose(found["rows"].stack()[0], maps, atol=1e-6)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_nothing_done_is_an_error() -> None:
    model, words = llama()
    with pytest.raises(InputError, match="Scaled did nothing: the model did not run"), edited(model, Scaled(2.0)):
        pass
    never = Rows(lambda call: torch.zeros(call.batch, call.queries, dtype=torch.bool), 2.0)
    with pytest.raises(InputError, match=r"Rows did nothing: .*chose no query"), edited(model, never):
        logits(model, words)
    with pytest.raises(RuntimeError, match="mine"), edited(model, never):
        raise RuntimeError("mine")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_edits_act_in_the_order_given(attention: str) -> None:
    model, words = llama(attention)
    first, second = Rows(lambda c: c.queries_in("a"), 2.0), Rows(lambda c: c.queries_in("b"), 1.0, 0.1)
    spans = {"a": span(3, 5, 8), "b": span(5, 6)}
    found: dict[str, Tensor] = {}
    for name, edits in {
        "rows": (first, second),
        "written out": (Explicit(), first, second),
        "other": (second, first),
    }.items():
        with edited(model, *edits, spans=spans):
            found[name] = logits(model, words)
    with edited(model, first, spans=spans), edited(model, second, spans=spans):
        found["nested"] = logits(model, words)
    assert torch.equal(found["rows"], found["nested"])
    assert torch.allclose(found["rows"], found["written out"], atol=1e-5)
    assert not torch.allclose(found["rows"], found["other"], atol=1e-5)
    # tokens before the first edited row read nothing edited
    assert torch.equal(found["rows"][:, :3], logits(model, words)[:, :3])


def test_ragged_rows() -> None:
    model, words = llama()
    chosen = torch.zeros(2, 9, dtype=torch.bool)
    chosen[0, [1, 4, 7]] = chosen[1, 2] = True
    plain = logits(model, words)
    with edited(model, Rows(lambda c: c.queries_in("a"), 0.5), spans={"a": chosen}) as run:
        both = logits(model, words)
    assert set(run.effect.values()) == {4}
    for item in range(2):
        with edited(model, Rows(lambda c: c.queries_in("a"), 0.5), spans={"a": chosen[item : item + 1]}):
            assert torch.allclose(logits(model, words[item : item + 1])[0], both[item], atol=1e-6)
    assert torch.equal(both[1, :2], plain[1, :2])
    with recorded(model, "rows", rows="a", spans={"a": chosen}) as found, recorded(model, "rows", rows="all") as whole:
        logits(model, words)
    rows, maps = found["rows"].stack(), whole["rows"].stack()
    assert torch.allclose(rows[:, 0], maps[:, 0][:, :, [1, 4, 7]], atol=1e-6)
    assert torch.allclose(rows[:, 1, :, :1], maps[:, 1][:, :, [2]], atol=1e-6)
    assert (rows[:, 1, :, 1:] == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_changed_mask_runs_in_the_users_function(attention: str) -> None:
    class Hidden(AttentionEdit):
        asks = ("secret",)

        def inputs(self, call: AttentionCall) -> AttentionCall:
            before, keys = call.allowed, call.keys_in("secret")[:, None, None]
            assert before is not None
            return call.replace(allowed=lambda rows: before(rows) & ~keys)

    model, words = llama(attention)
    with edited(model, Hidden(), spans={"secret": span(2)}), recorded(model, "rows", rows="all") as found:
        ours = logits(model, words)
    assert (found["rows"].stack()[..., 2] == 0).all()
    other = words.clone()
    other[:, 2] = 7
    with edited(model, Hidden(), spans={"secret": span(2)}):
        theirs = logits(model, other)
    behind = [0, 1, 3, 4, 5, 6, 7, 8]
    assert torch.allclose(ours[:, behind], theirs[:, behind], atol=1e-6)
    assert not torch.allclose(ours, logits(model, words), atol=1e-4)


def test_states_and_what_is_added_to_them() -> None:
    model, words = llama()
    with torch.no_grad():
        states = model(words, output_hidden_states=True).hidden_states
    with recorded(model, "states") as found:
        logits(model, words)
    assert torch.equal(next(iter(found["state 0"].values()))[0], states[0])
    # the last state of transformers is behind the final norm
    norm = final_norm(model)
    assert norm is model.model.norm
    with torch.no_grad():
        written = [*found["states"].stack()[:2], norm(found["states"].stack()[2])]
    assert all(torch.equal(a, b) for a, b in zip(written, states[1:], strict=True))
    assert embeddings(model) is model.model.embed_tokens
    vector = torch.randn(32)
    with edited(model, AddedStates({1: vector})), recorded(model, "states") as found:
        logits(model, words)
    assert torch.allclose(found["states"].stack()[1], states[2] + vector, atol=1e-6)

    class Entering(BlockEdit):
        at = Where(blocks=[2])

        def enters(self, place: Place, h: Tensor) -> Tensor:
            return h + vector

    with edited(model, Entering()):
        ours = logits(model, words)
    with edited(model, AddedStates({1: vector})):
        assert torch.equal(ours, logits(model, words))


def test_places_of_two_towers() -> None:
    model = zoo.MODELS["t5"]("sdpa").model
    assert stacks(model) == {"encoder.block": 2, "decoder.block": 2}
    kinds = [(p.stack, p.block, p.kind) for p in attentions(model)]
    assert kinds == [
        ("encoder.block", 0, "self"), ("encoder.block", 1, "self"),
        ("decoder.block", 0, "self"), ("decoder.block", 0, "cross"),
        ("decoder.block", 1, "self"), ("decoder.block", 1, "cross"),
    ]  # fmt: skip
    assert [p.block for p in blocks(model)] == [0, 1, 0, 1]
    case = zoo.MODELS["t5"]("sdpa")
    read = torch.zeros(2, 7, dtype=torch.bool)
    read[:, 2] = True
    edit = Rows(lambda call: call.last(), 1.0)
    edit.at = Where(kinds=["cross"])
    seen: list[Tensor] = []
    edit.rows = lambda call, weights: (seen.append(call.keys_in("word")), weights)[1]  # type: ignore[method-assign]
    with edited(case.model, edit, spans={"word": read}):
        case.model(**case.inputs)
    assert len(seen) == 2
    assert all(torch.equal(keys, read) for keys in seen)


def test_threads_do_not_hear_each_other() -> None:
    model, words = llama()
    plain = logits(model, words)
    expected = {}
    for factor in (0.0, 0.5):
        with edited(model, Scaled(factor)):
            expected[factor] = logits(model, words)
    other, _ = llama()
    wrong: list[str] = []
    gate = threading.Barrier(3)

    def work(which: Any, factor: float | None) -> None:
        try:
            gate.wait()
            for _ in range(20):
                if factor is None:
                    right = torch.equal(logits(which, words), plain)
                else:
                    with edited(which, Scaled(factor)):
                        right = torch.equal(logits(which, words), expected[factor])
                if not right:
                    wrong.append(f"{factor}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=args) for args in ((model, 0.0), (model, None), (other, 0.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(logits(model, words), plain)


def test_gradients_reach_weights_only_with_a_graph() -> None:
    model, words = llama()
    plain = logits(model, words)
    with recorded(model, "rows", rows="all", detach=False) as found:
        out = model(words).logits
    assert torch.allclose(out, plain, atol=1e-5)
    maps = [rows[0] for rows in found["rows"].values()]
    gradients = torch.autograd.grad(out[:, -1].logsumexp(-1).sum(), maps)
    assert all(g.abs().sum() > 0 for g in gradients)
    # to first order the output moves as the gradient says
    last = list(found["rows"])[-1]
    change = 1e-3 * torch.randn(maps[-1].shape, generator=torch.Generator().manual_seed(0)) * (maps[-1] > 0)

    class Moved(AttentionEdit):
        at = Where(blocks=[last.block])

        def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
            return weights + change

    with edited(model, Moved()):
        moved = logits(model, words)[:, -1].logsumexp(-1).sum()
    told = (gradients[-1] * change).sum()
    assert torch.allclose(moved - plain[:, -1].logsumexp(-1).sum(), told, rtol=0.05, atol=1e-5)
    with recorded(model, "rows", "heads") as kept:
        model(words)
    assert not any(rows[0].requires_grad for rows in [*kept["rows"].values(), *kept["heads"].values()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_parameters_are_the_same(attention: str) -> None:
    model, words = llama(attention)
    expected = torch.autograd.grad(model(words).logits.square().sum(), list(model.parameters()))
    with recorded(model, "rows", "heads"):
        ours = torch.autograd.grad(model(words).logits.square().sum(), list(model.parameters()))
    assert all(map(torch.equal, ours, expected))


def test_half_precision() -> None:
    model, words = llama()
    model = model.bfloat16()
    plain = logits(model, words)
    with edited(model, RowRecorder("all"), HeadRecorder()):
        assert torch.equal(logits(model, words), plain)
    with edited(model, Explicit()):
        assert logits(model, words).dtype == torch.bfloat16


def test_rows_of_long_texts_need_no_matrix() -> None:
    library = tiny.transformers()
    model = zoo.built(
        "LlamaForCausalLM", {**zoo.GROUPED, "num_hidden_layers": 2, "max_position_embeddings": 8192}, "sdpa"
    )
    words = torch.randint(5, 38, (1, 8192))
    largest = 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    del library
    edit = Rows(lambda call: call.last(), 0.5)
    with torch.no_grad(), edited(model.model, edit), recorded(model.model, "rows") as found, Watching():
        model.model(words)
    assert found["rows"].stack().shape == (2, 1, 4, 1, 8192)
    assert largest <= 8192 * 64


def test_a_layer_type_with_a_float_mask() -> None:
    """A position bias inside of a float mask counts as bias, the lowest number as a mask."""
    torch.manual_seed(0)
    bias = torch.randn(1, 4, 16, 16)
    bias[..., 3] = float("-inf")
    own = zoo.MODELS["own"]("")

    class Biased(zoo.OwnAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
            return self.proj(y.transpose(1, 2).flatten(2))

    own.model.blocks[1].attn.__class__ = Biased
    with torch.no_grad(), recorded(own.model, "rows", "heads", "inputs", rows="all") as found:
        own.model(**own.inputs)
    place = attentions(own.model)[1]
    (call,), (weights,), (y,) = found["inputs"][place], found["rows"][place], found["heads"][place]
    expected = (call.q @ call.k.mT * 0.3 + bias).softmax(-1)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert torch.allclose(expected @ call.v, y, atol=1e-5)
    readable = call.readable()
    assert readable is not None
    assert not readable[..., 3].any()


class OfHeads(RowEdit):
    """All rows of some heads, uniform; the other heads stay."""

    def __init__(self, *heads: int) -> None:
        self.heads = list(heads)

    def queries(self, call: AttentionCall) -> Tensor:
        return torch.ones(call.batch, call.queries, dtype=torch.bool)

    def rows(self, call: AttentionCall, weights: Tensor) -> Tensor:
        new = weights.clone()
        new[:, self.heads] = 1.0 / call.keys
        return new


def test_an_edit_of_all_rows_of_all_heads_runs_nothing_beside_it() -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    call = AttentionCall(Place(0, "self", "", "", nn.Identity()), q, k, v, 0.3)
    runs: list[AttentionCall] = []

    def fused(call: AttentionCall) -> Tensor:
        runs.append(call)
        return F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale, enable_gqa=True)

    plain = fused(call)
    for heads, calls in (((0, 1, 2, 3), 0), ((1, 2), 1), ((), 1)):
        runs.clear()
        y, weights = apply(call, [Act(OfHeads(*heads), lambda c: c, lambda number: None)], fused)
        assert len(runs) == calls
        others = [head for head in range(4) if head not in heads]
        assert torch.equal(y[:, others], plain[:, others])
        means = v.mean(2, keepdim=True).repeat_interleave(2, 1)
        assert torch.allclose(y[:, heads], means[:, heads], atol=1e-6)
        if not calls:
            # what a model returns as its maps shows no edit of rows, whether its function ran or not
            assert torch.equal(weights, call.weights())


def test_maps_of_eager_are_there_where_its_function_need_not_run() -> None:
    model, words = llama("eager")
    with torch.no_grad():
        plain = model(words, output_attentions=True).attentions
        with edited(model, OfHeads(0, 1, 2, 3)):
            maps = model(words, output_attentions=True).attentions
    assert torch.allclose(maps[0], plain[0], atol=1e-6)


def test_weights_are_the_softmax_of_the_scores() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    call = AttentionCall(Place(0, "self", "", "", nn.Identity()), q, k, k, 0.5)
    hidden = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])[None, None]
    for seen in (call, call.replace(allowed=dense(hidden)), call.replace(sinks=torch.randn(2))):
        assert torch.equal(seen.weights(), seen.softmax(seen.scores()))


@pytest.mark.parametrize(
    ("method", "gives", "says"),
    [
        ("queries", lambda _, call: call.last().long(), r"queries gave torch.int64 \(2, 9\), expected a bool tensor"),
        ("queries", lambda _, call: call.last()[0], r"queries gave torch.bool \(9,\)"),
        ("rows", lambda *_: None, r"rows gave NoneType, expected a tensor \(2, 4, 1, 9\)"),
        ("rows", lambda _, __, weights: weights[:, :1], r"rows gave torch.float32 \(2, 1, 1, 9\)"),
        ("rows", lambda _, __, weights: weights.zero_(), "rows changed the weights in place"),
        ("inputs", lambda *_: None, "inputs gave NoneType, expected an AttentionCall"),
        ("scores", lambda *_: None, "scores gave NoneType"),
        ("context", lambda _, __, y: y[..., :1], r"context gave torch.float32 \(2, 4, 9, 1\)"),
    ],
)
def test_what_an_edit_gives_is_checked(method: str, gives: Callable[..., Any], says: str) -> None:
    model, words = llama()
    own = {"queries": lambda _, call: call.last(), method: gives} if method in ("queries", "rows") else {method: gives}
    edit = type("Mine", (RowEdit if "queries" in own else AttentionEdit,), own)()
    with pytest.raises(InputError, match=f"edits: Mine.{says}"), edited(model, edit):
        logits(model, words)


def test_what_an_edit_of_blocks_gives_is_checked() -> None:
    model, words = llama()
    edit = type("Mine", (BlockEdit,), {"leaves": lambda *_: None})()
    with pytest.raises(InputError, match=r"Mine.leaves gave NoneType, expected a tensor"), edited(model, edit):
        logits(model, words)


def test_blocks_that_are_named_must_be_there() -> None:
    model, words = llama()
    for edit in (
        RowRecorder(at=Where(blocks=[0, 9])),
        AblatedHeads([(0, 1), (9, 0)]),
        AddedStates({0: torch.ones(32), 9: torch.ones(32)}),
    ):
        with pytest.raises(InputError, match=r"names blocks \[9\].*reaches \[0\]"), edited(model, edit):
            pytest.fail("entered")
    with recorded(model, "rows", at=Where(blocks=range(1, 9))) as found:
        logits(model, words)
    assert {place.block for place in found["rows"]} == set(range(1, len(model.model.layers)))
    with pytest.raises(InputError, match=r"blocks: expected numbers.* got 1"):
        Where(blocks=1)  # type: ignore[arg-type]


def test_one_text_is_no_list_of_names() -> None:
    with pytest.raises(InputError, match=r"kinds: expected names, such as \['self'\], got the one text 'self'"):
        Where(kinds="self")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"blocks: expected numbers.* got '12'"):
        Where(blocks="12")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stacks: expected names"):
        of_part(Scaled(1.0), 0, 2, stacks="layers")
    model, _ = llama()
    edit = Scaled(1.0)
    edit.asks = "image"
    with pytest.raises(InputError, match="asks: expected names"), edited(model, edit):
        pytest.fail("entered")


@pytest.mark.parametrize("make", [RowRecorder, StateRecorder, HeadRecorder])
def test_what_remembers_stands_in_one_place_at_a_time(make: Callable[[], Any]) -> None:
    model, words = llama()
    recorder = make()
    with pytest.raises(InputError, match=f"this {make.__name__} is given twice"), edited(model, recorder, recorder):
        pytest.fail("entered")
    of_parts = [of_part(recorder, number, 2) for number in range(2)]
    with pytest.raises(InputError, match=f"this {make.__name__} is given twice"), edited(model, *of_parts):
        pytest.fail("entered")
    with edited(model, recorder):
        with pytest.raises(InputError, match="entered already"), edited(model, recorder):
            pytest.fail("entered")
        logits(model, words)
    with edited(model, recorder):
        logits(model, words)
    found = recorder.written if isinstance(recorder, StateRecorder) else recorder.found
    assert {len(kept) for kept in found.values()} == {1}


def test_an_edit_without_memory_may_act_twice() -> None:
    model, words = llama()
    half, quarter = Scaled(0.5), Scaled(0.25)
    with edited(model, quarter):
        expected = logits(model, words)
    with edited(model, half, half):
        assert torch.allclose(logits(model, words), expected, atol=1e-6)
    with edited(model, half), edited(model, half):
        assert torch.allclose(logits(model, words), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ScaledHeads([1.0]), "factors: expected a tensor for each block.* got list"),
        (lambda: ScaledHeads({0: [1.0]}), "factors: expected a tensor for block 0, got list"),
        (lambda: ScaledHeads({0: torch.full((4,), torch.nan)}), "factors: of block 0 hold NaN"),
        (lambda: ScaledHeads({"0": torch.ones(4)}), "factors: expected numbers of blocks, got .0."),
        (lambda: ScaledHeads({0: torch.ones(4)}, at=[0]), r"at: expected places.* got \[0\]"),
        (lambda: AddedStates({0: 1.0}), "vectors: expected a tensor for block 0, got float"),
        (lambda: AddedStates({0: torch.tensor([torch.inf])}), "vectors: of block 0 hold NaN or infinite"),
        (lambda: AblatedHeads([0, 1]), r"heads: expected pairs.* got 0"),
        (lambda: AblatedHeads([(0, 1.5)]), r"heads: expected pairs.* got \(0, 1.5\)"),
        (lambda: RowRecorder(at="self"), "at: expected places"),
    ],
)
def test_what_an_edit_is_made_of_is_checked(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_vectors_fit_the_states() -> None:
    model, words = llama()
    for wrong in (torch.ones(31), torch.ones(5, 9, 32)):
        with pytest.raises(InputError, match="vectors:"), edited(model, AddedStates({0: wrong})):
            logits(model, words)


def test_a_part_that_is_compiled_is_an_error_at_entry() -> None:
    model = nn.Sequential(zoo.OwnBlock(8, 2), zoo.OwnBlock(8, 2)).eval()
    model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]
    with pytest.raises(InputError, match="1: is compiled"), edited(model, RowRecorder()):
        pytest.fail("entered")


def test_a_copy_made_meanwhile_is_a_model_of_its_own() -> None:
    model, words = llama()
    own, x = nn.Sequential(zoo.OwnBlock(8, 2), zoo.OwnBlock(8, 2)).eval(), torch.randn(1, 5, 8)
    plain, plainly = logits(model, words), own(x)
    with edited(model, AddedStates({0: torch.ones(32)})) as run, edited(own, Scaled(0.0)):
        edits_of_one = logits(model, words)
        before = dict(run.effect)
        twins = copy.deepcopy(model), copy.deepcopy(own)
        assert torch.equal(logits(twins[0], words), plain)
        assert torch.equal(twins[1](x), plainly)
        assert run.effect == before
        own(x)
    assert not torch.equal(edits_of_one, plain)
    assert torch.equal(logits(twins[0], words), plain)
    for p in twins[1].parameters():
        nn.init.zeros_(p)
    assert torch.equal(twins[1](x), x)


def test_recorded_tensors_that_do_not_stack() -> None:
    model, words = llama()
    with recorded(model, "rows") as found:
        logits(model, words)
    with pytest.raises(InputError, match="step: 1, and 1 were recorded"):
        found["rows"].stack(1)
    found["rows"][next(iter(found["rows"]))] = [torch.zeros(1)]
    with pytest.raises(InputError, match="is of shapes"):
        found["rows"].stack()


class Starts(AttentionEdit):
    at = Where(blocks=[0])

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int, int]] = []

    def inputs(self, call: AttentionCall) -> AttentionCall:
        self.found.append((call.queries, call.keys, call.query_start, call.key_start))
        return call


def test_a_second_prompt_begins_anew_in_a_cache_with_room() -> None:
    model, words = llama()
    seen = Starts()
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with edited(model, seen):
        for _ in range(2):
            model.generate(words, attention_mask=torch.ones_like(words), **options)
    assert seen.found == [(9, 11, 0, 0), (1, 11, 9, 0), (1, 11, 10, 0)] * 2


def test_drafts_that_are_refused_are_not_counted() -> None:
    model, _ = llama()
    words, seen = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]), Starts()
    options = {"max_new_tokens": 20, "do_sample": False, "prompt_lookup_num_tokens": 3}
    with edited(model, seen):
        model.generate(words, attention_mask=torch.ones_like(words), **options)
    starts = [start for _, _, start, _ in seen.found]
    # some were refused: a call begins before the end of the last one
    assert any(before[2] + before[0] > after[2] for before, after in itertools.pairwise(seen.found))
    assert starts == [keys - queries for queries, keys, _, _ in seen.found]
    assert {start for *_, start in seen.found} == {0}


def test_a_cache_that_was_filled_before_is_counted() -> None:
    model, words = llama()
    with torch.no_grad():
        cache = model(words[:, :6], use_cache=True).past_key_values
        seen = Starts()
        with edited(model, seen):
            model(words[:, 6:], past_key_values=cache)
    assert seen.found == [(3, 9, 6, 0)]
