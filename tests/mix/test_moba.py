"""Mixture of block attention: choices by loops, limits that are other attentions, real decoders, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cenote.core import InputError
from cenote.mix.blocks import block_attention
from cenote.mix.long_context_heads.live import QAdA
from cenote.mix.moba.attention import moba_attention, moba_attention_packed, route
from cenote.mix.moba.live import MoBA, MoBAMixer, all_but_last, keys_read, train_hybrid
from cenote.mix.sinklora.attention import Groups
from cenote.mix.sinklora.live import GroupedAttention
from cenote.models.live import Edit, Where, edited
from tests.mix.decoders import decoder, generated, logits, numbers, state_of, texts, unchanged
from tests.models.live import zoo


def qkv(tokens: int = 19, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        numbers(2, heads, tokens, 8),
        numbers(2, kv_heads, tokens, 8, seed=1),
        numbers(2, kv_heads, tokens, 8, seed=2),
    )


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def by_loops(q: Tensor, k: Tensor, v: Tensor, block: int, top: int) -> Tensor:
    y = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        key, value, own = k[b, h // 2], v[b, h // 2], i // block
        past = [(float(q[b, h, i] @ key[j * block : (j + 1) * block].mean(0)), j) for j in range(own)]
        blocks = [own, *(j for _, j in sorted(past, reverse=True)[: top - 1])]
        seen = [t for t in range(i + 1) if t // block in blocks]
        y[b, h, i] = (q[b, h, i] @ key[seen].T / 8**0.5).softmax(-1) @ value[seen]
    return y


@pytest.mark.parametrize("top", [1, 3])
def test_each_query_reads_its_own_block_and_the_past_ones_it_likes_best(top: int) -> None:
    q, k, v = qkv()
    expected = by_loops(q, k, v, 4, top)
    torch.testing.assert_close(moba_attention(q, k, v, 4, top), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moba_attention(q, k, v, 4, top, gathered=False), expected, atol=1e-5, rtol=1e-5)


def test_all_blocks_or_one_block_are_causal_attention() -> None:
    q, k, v = qkv()
    for block, top in ((4, 5), (19, 1), (64, 3)):
        torch.testing.assert_close(moba_attention(q, k, v, block, top), causal(q, k, v), atol=1e-5, rtol=1e-5)


def test_one_block_is_block_diagonal_and_causal_and_the_last_may_be_short() -> None:
    q, k, v = qkv()
    y = moba_attention(q, k, v, 8, 1)
    for span in (slice(0, 8), slice(8, 16), slice(16, 19)):
        alone = causal(*(x[:, :, span] for x in (q, k, v)))
        torch.testing.assert_close(y[:, :, span], alone, atol=1e-5, rtol=1e-5)


def test_one_token_gives_its_value() -> None:
    q, k, v = qkv(1)
    torch.testing.assert_close(moba_attention(q, k, v, 4, 2), v.repeat_interleave(2, 1))


def test_the_order_inside_a_past_block_does_not_matter() -> None:
    q, k, v = qkv()
    order = torch.cat([torch.tensor([3, 1, 0, 2]), torch.arange(4, 19)])
    moved = moba_attention(q, k[:, :, order], v[:, :, order], 4, 3)
    torch.testing.assert_close(moved[:, :, 4:], moba_attention(q, k, v, 4, 3)[:, :, 4:], atol=1e-5, rtol=1e-5)


def test_a_planted_block_is_chosen_and_later_keys_of_the_own_block_do_not_count() -> None:
    q, k, _ = qkv()
    k[:, :, 4:8] = 10 * q[:, ::2, 17:18]
    found = route(q, k, 4, 2)
    assert bool(found.chosen[:, ::2, 17, 1].all())
    assert float(found.scores[0, 0, 17, 4]) == float("inf")
    assert float(found.scores[0, 0, 7, 2]) == float("-inf")
    later = k.clone()
    later[:, :, 18] = 100.0
    assert torch.equal(route(q, later, 4, 2).chosen[:, :, :18], found.chosen[:, :, :18])


def test_gradients_of_both_forms_agree_and_none_passes_through_the_choice() -> None:
    grads = []
    for gathered in (True, False):
        q, k, v = (x.requires_grad_() for x in qkv())
        y = moba_attention(q, k, v, 4, 2, gathered=gathered)
        grads.append(torch.autograd.grad((y * numbers(*y.shape, seed=3)).sum(), (q, k, v)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not route(q, k, 4, 2).scores.requires_grad


def test_a_sequence_is_the_same_alone_packed_and_padded_on_either_side() -> None:
    q, k, v = qkv()
    lengths = (7, 12)
    packed = moba_attention_packed(
        *(x[0].transpose(0, 1) for x in (q, k, v)), torch.tensor([0, 7, 19]), 4, 2
    )  # fmt: skip
    alone = [moba_attention(*(x[:1, :, a:b] for x in (q, k, v)), 4, 2)[0] for a, b in ((0, 7), (7, 19))]
    torch.testing.assert_close(packed, torch.cat(alone, 1).transpose(0, 1), atol=1e-5, rtol=1e-5)
    mask = torch.arange(19) < torch.tensor([[7], [12]])
    for where in (mask, mask.flip(1)):
        y = moba_attention(q, k, v, 4, 2, where)
        assert bool((y.transpose(1, 2)[~where] == 0).all())
        for item, length in enumerate(lengths):
            real = where[item]
            own = moba_attention(*(x[item : item + 1, :, real] for x in (q, k, v)), 4, 2)[0]
            torch.testing.assert_close(y[item, :, real], own, atol=1e-5, rtol=1e-5)
            assert own.shape[1] == length


def test_sinks_and_a_window_are_blocks_that_are_always_chosen() -> None:
    q, k, _ = qkv()
    chosen = route(q, k, 4, 3, first=1, last=1).chosen
    assert bool(chosen[:, :, 16:, 0].all())
    assert bool(chosen[:, :, 16:, 3].all())
    with pytest.raises(InputError, match="top: 2 blocks, and 1 first, 1 last and the own one are always taken"):
        route(q, k, 4, 2, first=1, last=1)


def test_a_row_that_chose_nothing_is_zeros() -> None:
    q, k, v = qkv()
    chosen = route(q, k, 4, 2).chosen
    chosen[:, :, 9] = False
    assert float(block_attention(q, k, v, chosen, 4)[:, :, 9].abs().max()) == 0.0


def test_keys_read_are_counted() -> None:
    q, k, _ = qkv()
    chosen = route(q, k, 4, 2).chosen
    may = chosen.repeat_interleave(4, -1)[..., :19] & torch.ones(19, 19, dtype=torch.bool).tril()
    assert float(keys_read(chosen, 4)) == pytest.approx(float(may.sum()) / (2 * 4 * 190))


def test_prompts_of_a_decoder_are_sparse_and_decoding_reads_everything() -> None:
    model, (ids, mask) = decoder(), texts()
    before, plain = state_of(model), logits(model, ids, mask)
    with edited(model, MoBA(block=4, top=9)):
        torch.testing.assert_close(logits(model, ids, mask), plain, atol=1e-4, rtol=1e-4)
    with edited(model, MoBA(block=4, top=2, at=all_but_last(model, 1))) as run:
        sparse = logits(model, ids, mask)
        torch.testing.assert_close(sparse[:1, 5:], logits(model, ids[:1, 5:]), atol=1e-4, rtol=1e-4)
        made, steps = generated(model, ids, mask)
    assert {place.block for place, _ in run.effect} == {0, 1}
    assert float((sparse - plain).abs().max()) > 0.1
    # the prompt sparse, what follows through a cache that is read whole
    with torch.no_grad():
        with edited(model, MoBA(block=4, top=2, at=all_but_last(model, 1))):
            start = (mask.long().cumsum(1) - 1).clamp(min=0)
            first = model(input_ids=ids, attention_mask=mask.long(), position_ids=start, use_cache=True)
        name = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
        place = (longer.long().cumsum(1) - 1)[:, -1:]
        second = model(made[:, 18:19], attention_mask=longer.long(), position_ids=place, **{name: getattr(first, name)})
    torch.testing.assert_close(steps[:, 1], second.logits[:, -1], atol=1e-4, rtol=1e-4)
    assert unchanged(model, before)
    assert torch.equal(logits(model, ids, mask), plain)


@pytest.mark.parametrize("rule", ["random", "window", "blind"])
def test_rivals_read_as_many_blocks(rule: str) -> None:
    model, (ids, _) = decoder(num_hidden_layers=1), texts()
    counts = []
    for name in ("mean", rule):
        edit = MoBA(block=4, top=3, rule=name)  # type: ignore[arg-type]
        with edited(model, edit):
            logits(model, ids)
        counts.append(next(iter(edit.chosen.values()))[0].sum(-1))
    assert torch.equal(*counts)


def test_training_is_sparse_first_and_full_at_the_end_layer_by_layer() -> None:
    model, edit = decoder(num_hidden_layers=2), MoBA(block=4, top=2)
    seen: list[list[int]] = []
    before = state_of(model)

    def blocks(step: int) -> list[int]:
        seen.append([step % 2])
        return seen[-1]

    losses = train_hybrid(model, lambda: (texts()[0], None), steps=10, edit=edit, share=0.8, blocks=blocks, lr=1e-2)
    assert len(seen) == 8
    assert losses[-1] < losses[0]
    assert not unchanged(model, before)
    assert edit.at.blocks is None
    with pytest.raises(InputError, match="share: expected from 0 to 1"):
        train_hybrid(model, lambda: (texts()[0], None), steps=1, edit=edit, share=2.0)


def test_the_mixer_is_causal_heeds_padding_and_shows_its_weights() -> None:
    mixer = MoBAMixer(16, heads=4, kv_heads=2, block=3, top=2)
    x, mask = numbers(2, 11, 16), torch.arange(11) < torch.tensor([[11], [8]])
    y = mixer(x, mask)
    other = x.clone()
    other[:, 7:] = 9.0
    torch.testing.assert_close(mixer(other, mask)[:, :7], y[:, :7], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixer(x[1:, :8]), y[1:, :8], atol=1e-5, rtol=1e-5)
    weights = mixer.weights_of(x, mask)
    torch.testing.assert_close(weights.sum(-1), mask[:, None].expand(-1, 4, -1).float())
    values = mixer.values(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1)
    again = mixer.out((weights @ values).transpose(1, 2).flatten(2)).masked_fill(~mask[..., None], 0.0)
    torch.testing.assert_close(again, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edit", [MoBA(4, 2), QAdA(0.5, 2, 6), GroupedAttention(Groups(4))])
def test_attention_of_another_kind_is_refused(edit: Edit) -> None:
    ids, mask = texts()
    windowed = zoo.built("MistralForCausalLM", {**zoo.GROUPED, "sliding_window": 8}, "sdpa")
    with pytest.raises(InputError, match="has a sliding window of fewer tokens"), edited(windowed, edit):
        logits(windowed, ids, mask)
    capped = zoo.built("Gemma2ForCausalLM", {**zoo.GROUPED, "head_dim": 8}, "eager")
    with pytest.raises(InputError, match="has a soft cap"), edited(capped, edit):
        logits(capped, ids, mask)
    encoder = zoo.built("BertModel", zoo.TEXT, "sdpa")
    with pytest.raises(InputError, match="give a causal decoder"), edited(encoder, edit), torch.no_grad():
        encoder(ids)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match="last: expected from 0 to below 3, got 3"):
        all_but_last(decoder(), 3)
    q = numbers(19, 2, 8)
    with pytest.raises(InputError, match="offsets: expected to rise from 0 to 19"):
        moba_attention_packed(q, q, q, torch.tensor([0, 7]), 4, 2)
    with pytest.raises(InputError, match="heads: 16 channels, 3 heads"):
        MoBAMixer(16, heads=3)
    assert MoBA(at=Where([0])).at.blocks == [0]
