"""Policies by their own rules, and the seat in which they act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix import H2O, Dense, KVPolicy, OracleTopK, Quest, RandomKeys, SinkWindow
from cenote.models.live import AttentionCall, AttentionEdit, InputsRecorder, edited
from cenote.models.live.reading import Held, Reads
from cenote.models.live.store import KeyValueStore, StoreLayer, exact_decoding
from tests.models.live import zoo
from tests.models.live.test_decoding import generated, padded

GENERATOR = torch.Generator().manual_seed(0)


def held(tokens: int = 24, start: list[int] | None = None, batch: int = 2) -> Held:
    k, v = torch.randn(2, batch, 2, tokens, 8, generator=GENERATOR)
    return Held(k, v, 8**-0.5, seen=tokens, start=None if start is None else torch.tensor(start))


def query(batch: int = 2, heads: int = 6) -> Tensor:
    return torch.randn(batch, heads, 1, 8, generator=GENERATOR)


def chosen(reads: Reads | None) -> list[list[list[int]]]:
    assert reads is not None
    pairs = zip(reads.numbers, reads.valid, strict=True)
    return [[sorted(n[v].tolist()) for n, v in zip(numbers, valid, strict=True)] for numbers, valid in pairs]


def llama() -> Any:
    return zoo.MODELS["llama"]("sdpa").model


def test_sink_and_window() -> None:
    found = chosen(SinkWindow(6, sinks=2).read(0, query(), held(start=[0, 3]), None))
    assert found == [[[0, 1, 20, 21, 22, 23]] * 2, [[3, 4, 20, 21, 22, 23]] * 2]


def test_random_keys_keep_the_ends_and_are_drawn_anew() -> None:
    policy, here = RandomKeys(10, sinks=2, recent=3), held(start=[0, 3])
    found = chosen(policy.read(1, query(), here, None))
    for heads, first in zip(found, (0, 3), strict=True):
        for numbers in heads:
            assert len(numbers) == 10
            assert numbers[:2] == [first, first + 1]
            assert numbers[-3:] == [21, 22, 23]
    again = [policy.read(1, query(), here, None), RandomKeys(10, 2, 3, seed=1).read(1, query(), here, None)]
    others = [policy.read(2, query(), here, None), policy.read(1, query(), here.until(1), None)]
    assert chosen(again[0]) == found
    assert all(chosen(other) != found for other in (again[1], *others))
    # no position is preferred
    many = RandomKeys(12, sinks=0, recent=0)
    counts = torch.zeros(48)
    for seed in range(200):
        many.seed = seed
        for heads in chosen(many.read(0, query(1), held(48, batch=1), None)):
            for numbers in heads:
                counts[numbers] += 1
    assert 60 < counts.min() <= counts.max() < 140


@pytest.mark.parametrize("share", ["kv_head", "query_head"])
def test_the_oracle_takes_the_largest_weights(share: Any) -> None:
    here, q = held(start=[0, 3]), query()
    scores = (q @ here.keys.repeat_interleave(3, 1).mT * here.scale)[:, :, 0]
    scores[1, :, :3] = -torch.inf
    weights = scores.softmax(-1)
    if share == "kv_head":
        weights = weights.unflatten(1, (2, 3)).amax(2)
    expected = [[sorted(row.topk(5).indices.tolist()) for row in item] for item in weights]
    assert chosen(OracleTopK(5, share).read(0, q, here, None)) == expected


@pytest.mark.parametrize("sink", [True, False])
def test_quest_takes_pages_by_their_bounds_and_its_own(sink: bool) -> None:
    here, q = held(23, start=[0, 3]), query()
    found = chosen(Quest(12, page=4, sink=sink).read(0, q, here, None))
    for item, first in enumerate((0, 3)):
        for head in range(2):
            pages = here.keys[item, head, first:].split(4)
            rows = q[item, 3 * head : 3 * head + 3, 0]
            bounds = torch.stack([torch.maximum(rows * p.amin(0), rows * p.amax(0)).sum(1).amax() for p in pages])
            bounds[-1] = torch.inf
            if sink:
                bounds[0] = torch.inf
            best = bounds.topk(3).indices.tolist()
            expected = [first + 4 * p + i for p in sorted(best) for i in range(len(pages[p]))]
            assert found[item][head] == expected


def test_quest_adds_a_key_to_its_page_as_if_it_made_all_anew() -> None:
    policy, whole = Quest(8, page=4), held(60, start=[0, 3])
    notes: dict[str, Any] = {}
    for tokens in range(10, 61):
        cut = slice(0, tokens)
        start = whole.start
        one = Held(whole.keys[:, :, cut], whole.values[:, :, cut], 1.0, seen=tokens, start=start, notes=notes)
        new = Held(whole.keys[:, :, cut], whole.values[:, :, cut], 1.0, seen=tokens, start=start)
        q = query()
        assert chosen(policy.read(0, q, one, None)) == chosen(policy.read(0, q, new, None))
    assert notes["through"] == 60


def test_h2o_is_the_rule_written_out() -> None:
    """One key at a time, beside a generation of one layer whose calls are recorded."""
    model = zoo.built("LlamaForCausalLM", {**zoo.GROUPED, "num_hidden_layers": 1}, "sdpa")
    words, budget, recent = zoo.ids(1, 9), 6, 3
    recorder = InputsRecorder()
    with H2O(budget, recent).on(model), edited(model, recorder):
        generated(model, {"input_ids": words}, max_new_tokens=6)
    calls = next(iter(recorder.found.values()))
    prompt = calls[0]
    taken = prompt.weights().sum(2).unflatten(1, (2, 2)).sum(2)[0]
    alive = [list(range(9)) for _ in range(2)]
    scores = [dict(enumerate(row.tolist())) for row in taken]
    keys = prompt.k[0]
    for step, call in enumerate(calls[1:]):
        token = 9 + step
        keys = torch.cat([keys, call.k[0, :, -1:]], 1)
        for head in range(2):
            alive[head].append(token)
            scores[head][token] = 0.0
            while len(alive[head]) > budget:
                old = [i for i in alive[head] if i <= token - recent]
                alive[head].remove(min(old, key=lambda i, head=head: scores[head][i]))  # type: ignore[misc]
            rows = call.q[0, 2 * head : 2 * head + 2, 0] @ keys[head, alive[head]].T * call.scale
            for i, weight in zip(alive[head], rows.softmax(-1).sum(0).tolist(), strict=True):
                scores[head][i] += weight
            # what is read at the next step is what stayed, and the new key
            if step + 2 < len(calls):
                torch.testing.assert_close(calls[step + 2].k[0, head, :-1], keys[head, alive[head]])


def test_a_window_that_forgets_reads_what_one_that_keeps_reads() -> None:
    model, inputs = llama(), padded()[0]
    with SinkWindow(6, 2).on(model) as kept:
        reading = generated(model, inputs, max_new_tokens=9)
    with SinkWindow(6, 2, forgets=True).on(model) as left:
        forgetting = generated(model, inputs, max_new_tokens=9)
    assert torch.allclose(torch.stack(reading.logits), torch.stack(forgetting.logits), atol=1e-6)
    assert kept.read == left.read


def test_keys_are_counted_where_they_are_gathered() -> None:
    model, words = llama(), {"input_ids": zoo.ids(1, 9)}
    with SinkWindow(6, 2).on(model) as run:
        generated(model, words, max_new_tokens=4)
    # three tokens are decoded behind the prompt, two key heads read six keys of 10, 11 and 12
    assert run.read == {0: 36, 1: 36, 2: 36}
    assert run.held == {0: 66, 1: 66, 2: 66}
    assert run.most == {0: 6, 1: 6, 2: 6}
    assert run.share == pytest.approx(36 / 66)
    with Dense().on(model) as run:
        generated(model, words, max_new_tokens=4)
    assert (run.share, run.caches) == (1.0, 1)
    with OracleTopK(3, "query_head").on(model) as run:
        generated(model, words, max_new_tokens=4)
    assert 3 <= min(run.most.values()) <= max(run.most.values()) <= 6


def test_bytes_fall_where_keys_are_forgotten() -> None:
    model, words = llama(), zoo.ids(1, 300) % 30 + 5
    store = KeyValueStore(model.config)
    with torch.no_grad(), SinkWindow(8, 2, forgets=True).on(model) as run:
        model(words, past_key_values=store)
        after = run.nbytes
        for _ in range(20):
            model(words[:, :1], past_key_values=store)
            assert run.nbytes == after == store.nbytes
    assert after == 3 * 2 * 2 * 64 * 8 * 4
    assert store.get_seq_length() == 320


def test_a_cache_that_came_filled_is_the_prompt() -> None:
    model, words = llama(), zoo.ids(1, 12)
    with torch.no_grad():
        cache = model(words[:, :9], use_cache=True).past_key_values
        with H2O(6).on(model) as run:
            for i in range(9, 12):
                model(words[:, i : i + 1], past_key_values=cache)
        assert set(run.most.values()) == {6}
        assert isinstance(cache.layers[0], StoreLayer)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache_that_forgot_needs_a_policy(tokens: int) -> None:
    model, words = llama(), zoo.ids(1, 14)
    with torch.no_grad():
        with H2O(6).on(model):
            cache = model(words[:, :9], use_cache=True).past_key_values
            model(words[:, 9:10], past_key_values=cache)
        for _ in range(2):
            with pytest.raises(InputError, match="cache: keys were forgotten, and without a policy"):
                model(words[:, 10 : 10 + tokens], past_key_values=cache)
        assert cache.get_seq_length() == 10
        with SinkWindow(4).on(model):
            model(words[:, 10:11], past_key_values=cache)
        with pytest.raises(InputError, match="cache: keys were forgotten"), exact_decoding(model):
            model(words[:, 11 : 11 + tokens], past_key_values=cache)
        cache.reset()
        expected = model(words).logits
        assert torch.equal(model(words, past_key_values=cache).logits, expected)
        # where all keys were kept, decoding goes on without the policy
        with SinkWindow(4).on(model):
            cache = model(words[:, :9], use_cache=True).past_key_values
            model(words[:, 9:10], past_key_values=cache)
        model(words[:, 10 : 10 + tokens], past_key_values=cache)


def test_a_second_turn_is_given_one_token_at_a_time() -> None:
    model, words = llama(), zoo.ids(1, 16)
    with torch.no_grad(), SinkWindow(6, 2).on(model):
        cache = model(words[:, :9], use_cache=True).past_key_values
        model(words[:, 9:10], past_key_values=cache)
        expected = model(words[:, 10:], past_key_values=cache).logits[:, -1]
    with torch.no_grad(), SinkWindow(6, 2, forgets=True).on(model) as run:
        cache = model(words[:, :9], use_cache=True).past_key_values
        model(words[:, 9:10], past_key_values=cache)
        with pytest.raises(InputError, match=r"got 6 at once: give a further turn one token at a time"):
            model(words[:, 10:], past_key_values=cache)
        # nothing was stored, and the same cache goes on
        for i in range(10, 16):
            logits = model(words[:, i : i + 1], past_key_values=cache).logits
    assert set(run.most.values()) == {6}
    torch.testing.assert_close(logits[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_in_pieces() -> None:
    model, inputs = llama(), padded((9, 7, 4, 6))[0]
    for policy in (SinkWindow(5, 1), H2O(5), Quest(4, page=2)):
        with policy.on(model):
            whole = generated(model, inputs, max_new_tokens=7)
        with policy.on(model, prompt=9):
            pieces = generated(model, inputs, max_new_tokens=7, prefill_chunk_size=4)
        assert torch.allclose(torch.stack(whole.logits), torch.stack(pieces.logits), atol=1e-5)


def test_drafts_are_read_as_one_token_after_the_other() -> None:
    model, inputs = llama(), {"input_ids": zoo.ids(1, 9).repeat(1, 2)}
    for policy in (SinkWindow(6, 2), OracleTopK(6), OracleTopK(6, "query_head"), Quest(8, page=2)):
        with policy.on(model, prompt=18):
            plain = generated(model, inputs, max_new_tokens=12)
            drafted = generated(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
        assert torch.equal(plain.sequences, drafted.sequences)


def test_a_policy_that_acts_on_the_prompt_reads_it_as_it_reads_what_is_behind() -> None:
    model, inputs = llama(), padded((9, 7, 4, 6))[0]
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {**inputs, "position_ids": positions, "use_cache": False}
    for policy in (SinkWindow(4, 1), OracleTopK(4), Quest(4, page=2)):
        with torch.no_grad():
            with policy.on(model, prompt=0):
                behind = model(**given).logits
            policy.acts = frozenset({"prefill", "decode"})
            with policy.on(model, prompt=9):
                prompt = model(**given).logits
        real = mask.bool()
        assert torch.equal(behind[real], prompt[real])
        assert not torch.equal(behind[real], model(**given).logits[real])


def test_grouped_rows_stand_behind_a_policy_in_either_order() -> None:
    model, inputs = llama(), padded()[0]
    with SinkWindow(6, 2).on(model):
        expected = generated(model, inputs)
    with exact_decoding(model), SinkWindow(6, 2).on(model) as before:
        first = generated(model, inputs)
    with SinkWindow(6, 2).on(model) as after, exact_decoding(model):
        second = generated(model, inputs)
    assert before.read == after.read
    for found in (first, second):
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


class Sloped(AttentionEdit):
    """Further keys count less, as ALiBi has it."""

    def inputs(self, call: AttentionCall) -> AttentionCall:
        behind = torch.arange(call.keys) - (call.keys - call.queries + torch.arange(call.queries))[:, None]
        return call.replace(bias=0.5 * behind.clamp(max=0).float()[None, None])


def test_what_is_added_to_scores_is_read_with_its_keys() -> None:
    model, inputs = llama(), {"input_ids": zoo.ids(1, 9)}
    with edited(model, Sloped()), SinkWindow(6, 2).on(model):
        found = torch.stack(generated(model, inputs).logits)
    with torch.no_grad(), edited(model, Sloped()), SinkWindow(6, 2).on(model, prompt=9):
        words = generated(model, inputs).sequences
        once = model(words[:, :-1], use_cache=False).logits[0, 8:]
    torch.testing.assert_close(found[:, 0], once, atol=1e-5, rtol=1e-5)
    with (
        pytest.raises(InputError, match=r"adds numbers to scores by position, which a policy that forgets"),
        edited(model, Sloped()),
        H2O(4).on(model),
    ):
        generated(model, inputs)


def test_keys_that_are_not_finite_are_found_wherever_they_came_from() -> None:
    model, words = llama(), zoo.ids(1, 12)
    with torch.no_grad():
        cache = model(words[:, :9], use_cache=True).past_key_values
        cache.layers[2].keys[0, 1, 4, 0] = float("inf")
        with pytest.raises(InputError, match="model: keys of layer 2 are NaN or infinite"), OracleTopK(4).on(model):
            model(words[:, 9:10], past_key_values=cache)
        with pytest.raises(InputError, match="model: keys of layer 2"), OracleTopK(4).on(model):
            model(words[:, 9:], past_key_values=cache)


def test_keys_of_padding_may_be_anything() -> None:
    model, inputs = llama(), padded()[0]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    positions = mask.sum(1, keepdim=True) - 1
    logits = []
    for broken in (False, True):
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            for layer in cache.layers:
                if broken:
                    layer.keys.masked_fill_(~inputs["attention_mask"].bool()[:, None, :, None], float("nan"))
            with SinkWindow(4, 2).on(model):
                one = inputs["input_ids"][:, -1:]
                logits.append(model(one, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    assert torch.equal(*logits)


def wrong(
    policy: KVPolicy, name: str = "llama", prompt: int | None = None, attention: str = "sdpa", **options: Any
) -> None:
    case = zoo.MODELS[name](attention if (name, attention) in zoo.REACHED else "eager")
    inputs = options.pop("inputs", padded()[0])
    with policy.on(case.model, prompt):
        generated(case.model, inputs, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "model: BertModel has no causal attention"),
        ("t5", "model: T5Model is an encoder-decoder"),
        ("vit", "model: ViTModel takes no cache"),
        ("mistral", "model: layer 0 of its cache keeps a sliding window"),
        ("gemma2", "model: layer 0 of its cache keeps a sliding window"),
    ],
)
def test_models_that_a_policy_cannot_act_on(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong(Dense(), name)


def test_calls_that_a_policy_cannot_act_on() -> None:
    inputs = padded()[0]
    right = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(InputError, match="attention_mask: has padding behind"):
        wrong(Dense(), inputs=right)
    with pytest.raises(InputError, match="use_cache: is False, and without a cache"):
        wrong(Dense(), use_cache=False)
    with pytest.raises(InputError, match="use_cache: is False, and H2O forgets"):
        wrong(H2O(4), use_cache=False, prompt=9)
    with pytest.raises(InputError, match="cache: StaticCache is of a fixed size"):
        wrong(Dense(), cache_implementation="static", disable_compile=True)
    with pytest.raises(InputError, match="policy: H2O forgets, and reads one token at a time"):
        wrong(H2O(4), inputs={"input_ids": zoo.ids(1, 9)}, prefill_chunk_size=4)
    with pytest.raises(InputError, match="prompt: tokens of the first call were taken back"):
        wrong(SinkWindow(4), inputs={"input_ids": zoo.ids(1, 9).repeat(1, 2)}, prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="prompt: expected at least 0, got -1"):
        wrong(Dense(), prompt=-1)
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight.data[:] = float("nan")
    with pytest.raises(InputError, match="model: queries of layer 1 are NaN"), Dense().on(model):
        generated(model, inputs)
    for policy in (OracleTopK(4), Quest(4, page=2), H2O(4)):
        model = llama()
        model.model.layers[-1].self_attn.k_proj.weight.data[3] = float("nan")
        with pytest.raises(InputError, match="model: keys of layer 2 are NaN"), policy.on(model):
            generated(model, inputs)
    model._compiled_call_impl = model.forward
    with pytest.raises(InputError, match="model: was compiled in place"), Dense().on(model):
        generated(model, inputs)
    with pytest.raises(InputError, match="output_attentions: SinkWindow reads some keys alone"):
        wrong(SinkWindow(4, 2), attention="eager", output_attentions=True)
    model = llama()
    with pytest.raises(InputError, match=r"attention_mask: expected \[batch, tokens\]"), Dense().on(model):
        model(inputs["input_ids"], attention_mask=torch.ones(4, 1, 9, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinkWindow(0), "budget: expected at least 1, got 0"),
        (lambda: SinkWindow(4, sinks=5), "budget: 4 keys leave no room for what is protected: sinks 5"),
        (lambda: RandomKeys(4, sinks=2, recent=3), "budget: 4 keys leave no room .*: sinks 2 and recent 3"),
        (lambda: RandomKeys(4, sinks=-1), "sinks: expected at least 0, got -1"),
        (lambda: Quest(10, page=4), "budget: expected a multiple of the 4 tokens of a page, got 10; take 8"),
        (lambda: Quest(4, page=4), "budget // page: 1 pages leave no room"),
        (lambda: Quest(4, page=0), "page: expected at least 1, got 0"),
        (lambda: H2O(4, recent=5), "budget: 4 keys leave no room"),
        (lambda: OracleTopK(4, "heads"), "share: expected 'kv_head' or 'query_head', got 'heads'"),
    ],
)
def test_policies_that_there_are_not(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
