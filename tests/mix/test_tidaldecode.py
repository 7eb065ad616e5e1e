"""TidalDecode against its own rule written out, on models and on what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.grouped import attend
from cenote.mix import TidalDecode
from cenote.mix.policies import Dense, Reads
from cenote.mix.tidaldecode.overlap import choose_layers, overlap
from cenote.mix.tidaldecode.policy import TidalState, attend_selected, rows_read, speed_up
from cenote.models.live import recorded
from cenote.models.live.reading import Held, Layout
from cenote.models.live.store import KeyValueStore
from cenote.testing import check_kv_policy
from tests.models.live import zoo
from tests.models.live.test_decoding import generated, padded

GENERATOR = torch.Generator().manual_seed(0)
WIDTH = 8


def model(layers: int = 5, group: int = 2, attention: str = "sdpa", seed: int = 0) -> Any:
    settings = {**zoo.GROUPED, "num_hidden_layers": layers, "num_attention_heads": 2 * group, "head_dim": 8}
    found = zoo.built("LlamaForCausalLM", settings, attention)
    generator = torch.Generator().manual_seed(seed)
    for name, p in found.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            # of untrained weights no key takes more than another
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return found


def drawn(tokens: int = 20, queries: int = 1, batch: int = 2) -> tuple[Tensor, Held]:
    q = torch.randn(batch, 6, queries, WIDTH, generator=GENERATOR)
    k, v = torch.randn(2, batch, 2, tokens, WIDTH, generator=GENERATOR)
    return q, Held(k, v, WIDTH**-0.5, seen=tokens)


def test_a_sparse_layer_that_gathers_is_the_masked_one() -> None:
    q, held = drawn()
    policy, state = TidalDecode(7, start=0, correction=1), TidalState()
    assert policy.read(0, q, held, state) is None
    reads = policy.read(2, q, held, state)
    assert isinstance(reads, Reads)
    k, v = (x.gather(2, reads.numbers[..., None].expand(-1, -1, -1, WIDTH)) for x in (
        held.keys.repeat_interleave(3, 1), held.values.repeat_interleave(3, 1)
    ))  # fmt: skip
    selected = torch.zeros(2, 6, 1, 20, dtype=torch.bool).scatter(3, reads.numbers[:, :, None], True)
    assert selected.sum(-1).eq(7).all()
    expected = attend_selected(q, held.keys, held.values, selected)
    torch.testing.assert_close(attend(q, k, v), expected)


def test_positions_are_the_highest_products_and_the_own_one_is_not_forced_in() -> None:
    q, held = drawn()
    held.keys[:, :, -1] = -10 * q[:, :2, 0]
    scores = (q @ held.keys.repeat_interleave(3, 1).mT)[:, :, 0]
    chosen = TidalDecode(4, start=0).chosen(0, q, held)[:, :, 0]
    assert torch.equal(chosen.nonzero()[:, 2].view(2, 6, 4), scores.topk(4).indices.sort().values)
    assert not chosen[:, 0, -1].any()
    shared = TidalDecode(4, start=0, share="kv_head").chosen(0, q, held)[:, :, 0]
    summed = scores.unflatten(1, (2, 3)).sum(2)
    assert torch.equal(shared.nonzero()[:, 2].view(2, 2, 4), summed.topk(4).indices.sort().values)


@pytest.mark.parametrize("share", ["query_head", "kv_head"])
def test_layers_do_what_the_rule_says_while_a_model_decodes(share: Any) -> None:
    """The sparse layers' heads are those of attention with the selection layers' top k, computed from recorded calls."""
    found, words = model(), zoo.ids(1, 15)
    policy = TidalDecode(6, start=1, correction=3, share=share)
    with recorded(found, "inputs") as calls, recorded(found, "heads") as heads, policy.on(found) as run:
        generated(found, {"input_ids": words}, max_new_tokens=3)
    assert run.read[0] == run.held[0] == 2 * (16 + 17)
    for step in (1, 2):
        selected = torch.empty(0)
        for layer, (place, each) in enumerate(calls["inputs"].items()):
            call = each[step]
            scores = call.scores()
            if layer in (1, 3):
                by = scores if share == "query_head" else scores.unflatten(1, (2, 2)).sum(2).repeat_interleave(2, 1)
                selected = torch.zeros_like(scores, dtype=torch.bool).scatter(3, by.topk(6).indices, True)
            sparse = layer in (2, 4)
            weights = (scores.masked_fill(~selected, -torch.inf) if sparse else scores).softmax(-1)
            torch.testing.assert_close(heads["heads"][place][step], call.mixed(weights))


def test_everything_within_the_budget_and_no_sparse_layer_are_dense() -> None:
    found, inputs = model(), padded()[0]
    plain = torch.stack(generated(found, inputs).logits)
    for policy in (
        TidalDecode(14, 1, 3),
        TidalDecode(100, 0, 2),
        TidalDecode(3, start=5),
        TidalDecode(3, start=9, correction=20),
    ):
        with policy.on(found) as run:
            assert torch.equal(torch.stack(generated(found, inputs).logits), plain)
        assert run.share == 1.0


def test_a_correction_that_is_no_later_than_the_start_changes_nothing() -> None:
    found, inputs = model(), padded()[0]
    logits = []
    for correction in (0, 1, 2, ()):
        with TidalDecode(5, start=2, correction=correction).on(found) as run:
            logits.append(torch.stack(generated(found, inputs).logits))
        assert run.read[2] == run.held[2]
        assert run.read[3] < run.held[3]
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    with TidalDecode(5, start=0, correction=(1, 2, 3, 4)).on(found) as run:
        assert torch.equal(torch.stack(generated(found, inputs).logits), torch.stack(generated(found, inputs).logits))
    assert run.share == 1.0


def test_one_key_is_enough_where_attention_is_one_hot() -> None:
    q, held = drawn()
    held.keys[:] = 0.0
    for item in range(2):
        for head in range(2):
            held.keys[item, head, 3 + item + head] = 100 * q[item, 3 * head : 3 * head + 3, 0].sum(0)
    q = q.clone()
    q[:] = held.keys[:, :, [3]].repeat_interleave(3, 1)
    for item in range(2):
        for head in range(2):
            q[item, 3 * head : 3 * head + 3, 0] = held.keys[item, head, 3 + item + head]
    selected = TidalDecode(1, start=0).chosen(0, q, held)
    sparse = attend_selected(q, held.keys, held.values, selected)
    torch.testing.assert_close(sparse, attend(q, held.keys, held.values))


def test_fewer_valid_positions_than_k_and_each_item_is_itself_alone() -> None:
    found, inputs = model(), padded((9, 7, 3, 6))[0]
    policy = TidalDecode(8, start=1, correction=3)
    with policy.on(found):
        batch = torch.stack(generated(found, inputs).logits)
    for item, length in enumerate((9, 7, 3, 6)):
        alone = {name: x[item : item + 1, -length:] for name, x in inputs.items()}
        with policy.on(found):
            single = torch.stack(generated(found, alone).logits)
        torch.testing.assert_close(batch[:, item], single[:, 0], atol=1e-5, rtol=1e-5)
    q, held = drawn()
    held.start = torch.tensor([0, 15])
    chosen = TidalDecode(8, start=0).chosen(0, q, held)
    assert chosen[0].sum(-1).eq(8).all()
    assert chosen[1].sum(-1).eq(5).all()
    assert not chosen[1, ..., :15].any()


def test_several_queries_have_a_choice_each() -> None:
    q, held = drawn(queries=4)
    policy, several = TidalDecode(5, start=0, correction=2), TidalState()
    assert policy.choose(0, q, held, several) is None
    mask = policy.choose(1, q, held, several)
    assert mask is not None
    for row in range(4):
        one, then = TidalState(), held.until(3 - row)
        policy.read(0, q[:, :, row : row + 1], then, one)
        reads = policy.read(1, q[:, :, row : row + 1], then, one)
        assert reads is not None
        assert torch.equal(mask[:, :, row].nonzero()[:, 2].view(2, 6, 5), reads.numbers)


def test_refreshed_tokens_have_the_keys_that_reading_all_gives() -> None:
    found, inputs = model(), padded((9, 7))[0]
    policy = TidalDecode(4, start=0, correction=2, refresh_every=1)
    with policy.on(found):
        ours = generated(found, inputs, max_new_tokens=7)
    words = ours.sequences
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        dense = found(words[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1]).past_key_values
    # all but the last token, which was read for with a choice, and the last of the cache
    for layer, plain in zip(ours.past_key_values.layers, dense.layers, strict=True):
        torch.testing.assert_close(layer.keys[:, :, :-1], plain.keys[:, :, :-1], atol=1e-5, rtol=1e-5)
    with TidalDecode(4, start=0, correction=2).on(found):
        never = generated(found, inputs, max_new_tokens=7)
    apart = [(layer.keys[:, :, :-1] - plain.keys[:, :, :-1]).abs().max() for layer, plain in zip(
        never.past_key_values.layers, dense.layers, strict=True
    )]  # fmt: skip
    assert max(apart) > 1e-3
    embeds = found.get_input_embeddings()(inputs["input_ids"][:1])
    with torch.no_grad(), policy.on(found):
        cache = KeyValueStore(found.config)
        found(inputs_embeds=embeds, past_key_values=cache)
        with pytest.raises(InputError, match="refresh_every: needs input_ids"):
            found(inputs_embeds=embeds[:, :1], past_key_values=cache)


def test_every_few_tokens_only() -> None:
    found, words = model(), zoo.ids(1, 9)
    forwards = []
    handle = found.register_forward_hook(lambda *_: forwards.append(1))
    with TidalDecode(4, 0, 2, refresh_every=3).on(found):
        generated(found, {"input_ids": words}, max_new_tokens=9)
    handle.remove()
    # eight tokens are decoded behind the prompt, and twice three of them were computed anew by then
    assert len(forwards) == 9 + 2


@pytest.mark.thorough
@pytest.mark.parametrize("share", ["kv_head", "query_head"])
def test_the_contract(share: Any) -> None:
    check_kv_policy(lambda budget: TidalDecode(budget, start=0, correction=(), share=share), whole_layers=[0])


@pytest.mark.thorough
def test_the_contract_with_refreshing() -> None:
    # what one forward says of all tokens is never refreshed, and what is taken back is not refreshed later
    outside = ["cached", "taken back"]
    check_kv_policy(
        lambda budget: TidalDecode(budget, start=0, correction=(), refresh_every=2), whole_layers=[0], leave_out=outside
    )


def test_reads_are_those_that_are_counted() -> None:
    found, words = model(), zoo.ids(1, 15)
    with TidalDecode(6, 1, 3, share="kv_head").on(found) as run:
        generated(found, {"input_ids": words}, max_new_tokens=2)
    assert sum(run.read.values()) == 2 * rows_read(5, 16, 6, 1, 3)
    assert run.share == pytest.approx(1 / speed_up(5, 16, 6, 1, 3))
    assert rows_read(5, 16, 100, 1, 3) == rows_read(5, 16, 6, 7, 3) == 80
    assert rows_read(5, 16, 6, 1, (0, 2, 3, 9)) == 4 * 16 + 6


def test_overlap_is_recall_and_mass_of_recorded_maps() -> None:
    found, words = model(), zoo.ids(1, 24)
    measured = overlap(found, [{"input_ids": words}], 5, rows=3)
    at = [12, 17, 23]
    with torch.no_grad():
        maps = torch.stack(model(attention="eager")(words, output_attentions=True).attentions)[:, 0][:, :, at]
    sets = torch.zeros_like(maps).scatter(3, maps.topk(5).indices, 1.0)
    for chooser in range(5):
        for reader in range(5):
            recall = (sets[chooser] * sets[reader]).sum(-1).mean() / 5
            mass = (sets[chooser] * maps[reader]).sum(-1).mean()
            torch.testing.assert_close(measured.recall[chooser, reader], recall)
            torch.testing.assert_close(measured.mass[chooser, reader], mass)
    assert measured.recall.diagonal().eq(1).all()
    assert measured.chance == pytest.approx(5 / (1 + sum(at) / 3))


def test_the_layer_that_later_ones_look_like_is_proposed() -> None:
    """Layers 0 to 2 have one pair of maps, 3 to 5 another: the choice of layer 3 serves 4 and 5."""
    found, words = model(layers=6), zoo.ids(1, 24)
    for name in ("q_proj", "k_proj"):
        for layer in range(6):
            source = found.model.layers[0 if layer < 3 else 3].self_attn
            getattr(found.model.layers[layer].self_attn, name).weight.data.copy_(getattr(source, name).weight)
    for layer in found.model.layers:
        # states stay those of the embeddings, so that alike layers look alike
        layer.self_attn.o_proj.weight.data.mul_(0.0)
        layer.mlp.down_proj.weight.data.mul_(0.0)
    proposed = choose_layers(found, [{"input_ids": words}], 5, start=1)
    assert proposed.correction == 3
    assert proposed.score[3] > max(score for c, score in proposed.score.items() if c != 3)
    assert proposed.score[3] > proposed.single
    with proposed.policy.on(found) as run:
        generated(found, {"input_ids": words}, max_new_tokens=3)
    assert run.share < 1
    other = model()
    with (
        pytest.raises(
            InputError, match="layers: the choice of layers was measured on a model of 6, and this one has 5"
        ),
        proposed.policy.on(other),
    ):
        generated(other, padded()[0])


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="start: expected at least 0, got -1"):
        TidalDecode(4, start=-1)
    with pytest.raises(InputError, match="correction: expected at least 0, got -2"):
        TidalDecode(4, correction=-2)
    with pytest.raises(InputError, match="share: expected"):
        TidalDecode(4, share="head")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="refresh_every: expected at least 1, got 0"):
        TidalDecode(4, refresh_every=0)
    with pytest.raises(InputError, match="correction: layer 9 of a model of 5 layers"):
        TidalDecode(4).begin(Layout(5, 4, 2, 8))
    with pytest.raises(InputError, match="texts: expected one at a time, longer than the budget of 9"):
        overlap(model(), [{"input_ids": zoo.ids(1, 9)}], 9)
    with pytest.raises(InputError, match="texts: expected at least one"):
        overlap(model(), [], 9)
    with pytest.raises(InputError, match="start: layer 3 of 5 leaves none"):
        choose_layers(model(), [{"input_ids": zoo.ids(1, 9)}], 4, start=3)


def test_dense_reads_what_a_model_reads() -> None:
    found, inputs = model(), padded()[0]
    with Dense().on(found) as run:
        generated(found, inputs)
    assert run.read == run.held
    with pytest.raises(InputError, match="edits: Dense did nothing: the model did not run"), Dense().on(found):
        pass
