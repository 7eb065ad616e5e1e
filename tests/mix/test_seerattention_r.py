"""SeerAttention-R: gate queries of groups, compressed keys as they grow, decoding that reads few blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cenote.core import InputError
from cenote.core.rotary import Angles, angles, rotated
from cenote.mix.block_rivals import block_rival
from cenote.mix.blocks import masked_weights, pooled, readable
from cenote.mix.coverage import covered_mass, ends
from cenote.mix.layer_gates import distil_gates
from cenote.mix.losses import decoded_losses, token_losses, trailing
from cenote.mix.seerattention_r.gate import CompressedKeys, GroupGate, row_target, select, valid_blocks
from cenote.mix.seerattention_r.live import SeerAttentionR, SeerRowLoss, SparseDecoding
from cenote.models.live import edited
from tests.mix.decoders import decoder, generated, logits, numbers, state_of, texts, unchanged


def at(tokens: int, width: int = 8) -> Angles:
    return angles(torch.arange(tokens)[None], width)


@torch.no_grad()
def test_queries_of_a_group_are_joined_in_four_ways() -> None:
    q, keys = numbers(1, 4, 5, 8), numbers(1, 2, 3, 8, seed=1)
    proj, avgproj = GroupGate(8, 4, 2, 4, norm=False), GroupGate(8, 4, 2, 4, query="avgproj", norm=False)
    assert proj.query_maps is not None
    assert avgproj.query_maps is not None
    proj.query_maps.copy_(avgproj.query_maps[:, None] / 2)
    torch.testing.assert_close(proj.queries(q, at(5)), avgproj.queries(q, at(5)))
    avg = GroupGate(8, 4, 2, 4, query="avg", norm=False)
    torch.testing.assert_close(avg.queries(q, at(5)), rotated(q.unflatten(1, (2, 2)).mean(2), at(5)))
    orig = GroupGate(8, 4, 2, 4, query="orig", norm=False)
    asked = orig.queries(q, at(5))
    apart = asked @ keys.repeat_interleave(2, 1).mT / 8**0.5
    torch.testing.assert_close(orig.scores(asked, keys), apart.unflatten(1, (2, 2)).mean(2))
    normed = GroupGate(8, 4, 2, 4).queries(q, at(5))
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(1, 2, 5), atol=1e-3, rtol=1e-3)


def test_subsets_of_pools_in_their_order() -> None:
    k = numbers(1, 2, 10, 8)
    for pools in (("max",), ("max", "avg"), ("max", "min", "avg")):
        gate = GroupGate(8, 4, 2, 4, k_pools=pools, norm=False)  # type: ignore[arg-type]
        starts = at(10).at(torch.arange(0, 10, 4)[None])
        expected = rotated(pooled(k, 4, pools) @ gate.key_maps, starts)  # type: ignore[arg-type]
        torch.testing.assert_close(gate.keys(k, starts), expected)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 4, 7, 13])
def test_a_cache_that_grew_is_one_made_at_once_where_blocks_stand_at_their_start(prompt: int) -> None:
    gate, k, by = GroupGate(8, 4, 2, 4), numbers(2, 2, 13, 8), at(13)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, :5] = False

    def grown(rope: str, prompt: int) -> CompressedKeys:
        cache = CompressedKeys(gate, rope)  # type: ignore[arg-type]
        for start, end in [(0, prompt), *((n, n + 1) for n in range(prompt, 13))]:
            cache.append(k[:, :, start:end], by.at(torch.arange(start, end)[None]), real[:, start:end])
        return cache

    whole, steps = grown("start", 13), grown("start", prompt)
    torch.testing.assert_close(steps.keys, whole.keys)
    assert torch.equal(steps.real, whole.real)
    assert float(whole.keys[:, :, 3].abs().max()) == 0.0
    assert whole.real.tolist() == [[False, True, True, True], [True] * 4]
    late = grown("end", prompt)
    same = prompt >= 12
    assert torch.allclose(late.keys, whole.keys, atol=1e-5) is same


def test_budgets_thresholds_and_the_last_block() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])[None, None, None].repeat(2, 1, 1, 1)
    valid = torch.tensor([[[True, True, True, True]], [[False, True, True, True]]])
    kept = select(scores, budget=9, block=4, valid=valid)[:, 0, 0].int().tolist()
    assert kept == [[1, 0, 1, 1], [0, 1, 1, 1]]
    assert select(scores, budget=3, block=4)[0, 0, 0].int().tolist() == [0, 0, 0, 1]
    assert bool(select(scores, budget=16, block=4).all())
    above = select(scores, threshold=0.2)[0, 0, 0].int().tolist()
    assert above == [*(int(p > 0.2) for p in scores[0, 0, 0, :].softmax(-1)[:3]), 1]
    assert bool(select(scores[..., :1], budget=0).all())
    with pytest.raises(InputError, match="budget: give either a budget of tokens or a threshold"):
        select(scores)


def test_row_targets_are_true_weights_and_need_no_map() -> None:
    q, k = numbers(2, 4, 11, 8), numbers(2, 2, 11, 8, seed=1)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :3] = False
    may = torch.ones(11, 11, dtype=torch.bool).tril() & real[:, None]
    whole = masked_weights(q, k, may[:, None])
    blocks = torch.nn.functional.pad(whole, (0, 1)).unflatten(-1, (3, 4)).amax(-1).unflatten(1, (2, 2)).amax(2)
    expected = blocks / (blocks.sum(-1, keepdim=True) + 1e-9)
    torch.testing.assert_close(row_target(q[:, :, 5:], k, 4, real), expected[:, :, 5:], atol=1e-6, rtol=1e-5)
    assert valid_blocks(torch.arange(3, 5), 11, 4, real)[0].int().tolist() == [[1, 0, 0], [1, 1, 0]]


def test_a_budget_of_the_whole_context_is_dense_decoding_token_by_token() -> None:
    model, (ids, mask) = decoder(), texts()
    gates, before = SeerAttentionR(model, block=4), state_of(model)
    made, steps = generated(model, ids, mask)
    for options in ({"budget": 64}, {"threshold": 0.0}):
        with edited(model, SparseDecoding(gates, **options)):  # type: ignore[arg-type]
            again, sparse_steps = generated(model, ids, mask)
        assert torch.equal(again, made)
        torch.testing.assert_close(sparse_steps, steps, atol=1e-4, rtol=1e-4)
    assert unchanged(model, before)


def test_few_blocks_are_read_one_choice_per_head_of_keys_and_none_of_padding() -> None:
    model, (ids, mask) = decoder(), texts()
    gates = SeerAttentionR(model, block=4)
    plain = generated(model, ids, mask)[1]
    decoding = SparseDecoding(gates, budget=8, start=1)
    with edited(model, decoding):
        made, steps = generated(model, ids, mask)
        again = generated(model, ids, mask)[1]
    torch.testing.assert_close(steps[:, 0], plain[:, 0])
    assert float((steps - plain).abs().max()) > 0.1
    assert torch.equal(again, steps)
    assert {place.block for place in decoding.kept} == {1, 2}
    assert 0.3 < decoding.keys_read() < 0.8
    for kept in (kept for all_ in decoding.kept.values() for kept in all_):
        assert kept.shape[:3] == (2, 2, 1)
        assert not bool(kept[0, :, :, 0].any())
        assert bool(kept[..., -1].all())
        assert int(kept.sum(-1).max()) <= 3
    with (
        pytest.raises(InputError, match="the items of the cache changed places; decode without beams"),
        edited(model, SparseDecoding(gates, budget=8)),
    ):
        generated(model, ids, mask, num_beams=3)
    with pytest.raises(InputError, match="decodes without a cache"), edited(model, SparseDecoding(gates, budget=8)):
        generated(model, ids, mask, use_cache=False)
    with pytest.raises(InputError, match="SparseDecoding did nothing"), edited(model, SparseDecoding(gates, budget=8)):
        logits(model, ids, mask)
    with torch.no_grad():
        told = model(input_ids=ids, attention_mask=mask.long(), use_cache=True)
    cache = getattr(told, "cache", None) or told.past_key_values
    with pytest.raises(InputError, match="of which 0 were seen"), edited(model, SparseDecoding(gates, budget=8)):
        generated(model, made, torch.cat([mask, torch.ones(2, 6, dtype=torch.bool)], 1), past_key_values=cache)


def test_decoded_losses_are_those_of_the_text_at_once() -> None:
    model, (ids, mask) = decoder(), texts()
    at_once = token_losses(model, ids, mask)
    assert bool(at_once[0, :5].isnan().all())
    torch.testing.assert_close(decoded_losses(model, ids[1:], 9), at_once[1:, 8:], atol=1e-4, rtol=1e-4)
    assert float(trailing(at_once, 3)) == pytest.approx(float(at_once[:, -3:].mean()))
    with pytest.raises(InputError, match="prompt: expected from 1 to 17"):
        decoded_losses(model, ids, 18)


def test_distilling_moves_gates_alone(tmp_path: Path) -> None:
    model, (ids, mask) = decoder(num_hidden_layers=2), texts(24)
    gates, before = SeerAttentionR(model, block=4), state_of(model)
    losses = distil_gates(SeerRowLoss(gates), model, lambda: (ids, mask), steps=12, lr=1e-2, last_lr=1e-5, warmup=2)
    assert losses[-1] < 0.85 * losses[0]
    assert unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())
    gates.save(tmp_path / "gates.safetensors")
    loaded = SeerAttentionR.load(tmp_path / "gates.safetensors", model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in gates.state_dict().items())


def test_the_loss_of_a_padded_text_is_that_of_the_text_alone() -> None:
    model = decoder(num_hidden_layers=1)
    ids, mask = texts(24, pads=4)
    for options in ({}, {"blind": True}, {"gate_width": 6}):
        loss = SeerRowLoss(SeerAttentionR(model, block=4, **options))  # type: ignore[arg-type]
        found = []
        for text, real in ((ids[:1], mask[:1]), (ids[:1, 4:], None)):
            with torch.no_grad(), edited(model, loss):
                model(input_ids=text, attention_mask=None if real is None else real.long())
            found.append(loss.losses[0])
        assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("rule", ["mean", "quest", "oracle", "window", "random"])
def test_rivals_keep_as_many_blocks(rule: str) -> None:
    model, (ids, mask) = decoder(num_hidden_layers=1), texts()
    decoding = SparseDecoding(SeerAttentionR(model, block=4), budget=8, choose=block_rival(rule))  # type: ignore[arg-type]
    with edited(model, decoding):
        generated(model, ids, mask)
    counts = [int(kept.sum(-1).max()) for kept in next(iter(decoding.kept.values()))]
    assert max(counts) <= 3
    if rule == "window":
        first = next(iter(decoding.kept.values()))[0][1, 0, 0].int().tolist()
        assert first == [1, 0, 0, 0, 1]


def test_the_oracle_covers_most_and_ends_do_not_count_as_a_choice() -> None:
    q, k = numbers(1, 4, 24, 8) * 2, numbers(1, 2, 24, 8, seed=1)
    weights = masked_weights(q, k, torch.ones(24, 24, dtype=torch.bool).tril()[None, None])
    blocks = torch.nn.functional.pad(weights, (0, 0)).unflatten(-1, (6, 4)).sum(-1)
    found = {}
    for name, scores in (("best", blocks), ("worst", -blocks)):
        begun = torch.arange(6) <= (torch.arange(24) // 4)[:, None]
        chosen = scores.masked_fill(~begun, -9.0).topk(2, -1).indices
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, chosen, True)
        found[name] = covered_mass(weights, readable(kept, 4, 24), ends(24, 24, 4))
    assert found["best"].mass > found["worst"].mass
    assert found["best"].inner > found["worst"].inner
    assert covered_mass(weights, torch.ones_like(weights, dtype=torch.bool)) == (
        pytest.approx(1.0),
        pytest.approx(1.0),
        1.0,
    )
