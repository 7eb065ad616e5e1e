"""SeerAttention: what a gate reads, what it learns, what it keeps, in a real decoder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cenote.core import InputError
from cenote.core.rotary import angles, rotated, unrotated
from cenote.mix.blocks import masked_weights, pooled, pooled_target
from cenote.mix.layer_gates import distil_gates
from cenote.mix.seerattention.gate import BlockGate, above, top_share
from cenote.mix.seerattention.live import SeerAttention, SeerLoss, SparsePrompts, gate_loss, train_jointly
from cenote.models.live import HeadRecorder, Where, edited
from tests.mix.decoders import decoder, generated, logits, numbers, state_of, texts, unchanged
from tests.models.live import zoo

POOLS = ["max", "min", "avg"]


def tril(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def full_map(q: Tensor, k: Tensor) -> Tensor:
    return masked_weights(q, k, tril(q.shape[2])[None, None].expand(len(q), -1, -1, -1))


def test_partial_blocks_are_pooled_by_what_they_hold_in_the_order_that_is_asked_for() -> None:
    x = numbers(1, 2, 5, 3)
    found = pooled(x, 4, ("max", "min", "avg"))
    assert found.shape == (1, 2, 2, 9)
    torch.testing.assert_close(found[:, :, 1], torch.cat([x[:, :, 4]] * 3, -1))
    torch.testing.assert_close(found[:, :, 0, 6:], x[:, :, :4].mean(2))
    mask = torch.tensor([[True, True, False, False, False]])
    torch.testing.assert_close(pooled(x, 4, ("avg",), mask)[:, :, 0], x[:, :, :2].mean(2))
    assert float(pooled(x, 4, ("max",), mask)[:, :, 1].abs().max()) == 0.0


def test_pools_matrices_and_sizes_of_every_kind() -> None:
    q, k = numbers(1, 4, 10, 8), numbers(1, 2, 10, 8, seed=1)
    chosen = [c for n in (1, 2, 3) for c in itertools.combinations(POOLS, n)]
    for q_pools, k_pools in itertools.product(chosen, chosen):
        gate = BlockGate(8, 4, 2, 4, q_pools=q_pools, k_pools=k_pools)  # type: ignore[arg-type]
        double = len(q_pools) > 1
        assert gate.two_maps is double
        assert gate.key_maps.shape == (2 if double else 4, 8 * len(k_pools), 8)
        found = gate(q, k, angles(torch.arange(0, 10, 4)[None], 8))
        assert found.shape == (1, 4, 3, 3)
        assert bool((found[..., ~tril(3)] == -1e9).all())
    for options in ({"force_double": True}, {"gate_width": 6}):
        gate = BlockGate(8, 4, 2, 4, **options)  # type: ignore[arg-type]
        assert gate.query_maps is not None
        assert gate.key_maps.shape[0] == 2


@pytest.mark.parametrize(("tokens", "block"), [(12, 4), (11, 4), (3, 4), (6, 1)])
def test_targets_are_the_pooled_map_and_no_map_is_needed(tokens: int, block: int) -> None:
    q, k = numbers(2, 4, tokens, 8), numbers(2, 2, tokens, 8, seed=1)
    whole = full_map(q, k)
    n = -(-tokens // block)
    padded = F.pad(whole, (0, n * block - tokens, 0, n * block - tokens))
    expected = F.max_pool2d(padded, block)
    expected = expected / expected.sum(-1, keepdim=True)
    target = pooled_target(q, k, block)
    torch.testing.assert_close(target, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 4, n))
    if block == 1:
        torch.testing.assert_close(target, whole, atol=1e-6, rtol=1e-5)


def test_a_constant_added_to_scores_changes_no_target_and_one_hot_maps_give_one_hot_targets() -> None:
    q, k = numbers(1, 2, 8, 4), numbers(1, 2, 8, 4, seed=1)
    shift = torch.cat([k, torch.ones(1, 2, 8, 1)], -1), torch.cat([q, numbers(1, 2, 8, 1, seed=2)], -1)
    plain = pooled_target(q, k, 3, scale=0.5)
    torch.testing.assert_close(pooled_target(shift[1], shift[0], 3, scale=0.5), plain, atol=1e-6, rtol=1e-5)
    eye = torch.eye(8)[None, None].expand(1, 2, -1, -1) * 100
    torch.testing.assert_close(pooled_target(eye, eye, 4), torch.eye(2)[None, None].expand(1, 2, -1, -1))


def test_padding_is_in_no_target() -> None:
    q, k = numbers(2, 4, 11, 8), numbers(2, 2, 11, 8, seed=1)
    real = torch.arange(11) < torch.tensor([[11], [6]])
    target = pooled_target(q, k, 4, real)
    torch.testing.assert_close(
        target[1:, :, :2, :2], pooled_target(q[1:, :, :6], k[1:, :, :6], 4), atol=1e-6, rtol=1e-5
    )
    assert float(target[1, :, 2].abs().max()) == 0.0


def test_what_is_kept() -> None:
    scores = numbers(1, 2, 8, 8).masked_fill(~tril(8), -1e9)
    whole = tril(8)[None, None].expand(1, 2, -1, -1)
    assert torch.equal(above(scores, 0.0), whole)
    assert torch.equal(top_share(scores, 1.0), whole)
    code = {"keep_diagonal": False, "last_dense": False}
    kept = top_share(scores, 0.44, **code)
    assert kept.sum(-1)[0, 0].tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert torch.equal(above(scores, 0.3, **code), (scores.softmax(-1) > 0.3) & tril(8))
    dense = above(scores, 1.0)
    assert torch.equal(dense, (torch.eye(8).bool() | (torch.arange(8) >= 6)[:, None] & tril(8)).expand(1, 2, -1, -1))
    with pytest.raises(InputError, match="share: expected more than 0"):
        top_share(scores, 0.0)


def test_turning_back_undoes_positions_with_a_factor_too() -> None:
    x, by = numbers(1, 2, 5, 8), angles(torch.arange(5)[None], 6)
    scaled = by._replace(cos=by.cos * 1.3, sin=by.sin * 1.3)
    torch.testing.assert_close(unrotated(rotated(x, scaled), scaled), x)


def test_prompts_are_sparse_by_a_knob_and_the_decoder_is_what_it_was() -> None:
    model, (ids, mask) = decoder(), texts()
    gates, before = SeerAttention(model, block=4), state_of(model)
    plain, (made, steps) = logits(model, ids, mask), generated(model, ids, mask)
    sparse = SparsePrompts(gates, share=1.0)
    with edited(model, sparse):
        torch.testing.assert_close(logits(model, ids, mask), plain, atol=1e-4, rtol=1e-4)
        again, dense_steps = generated(model, ids, mask)
        assert torch.equal(again, made)
        torch.testing.assert_close(dense_steps, steps, atol=1e-4, rtol=1e-4)
        sparse.share = 0.3
        few = logits(model, ids, mask)
        torch.testing.assert_close(logits(model, ids[:1, 5:]), few[:1, 5:], atol=1e-4, rtol=1e-4)
    assert float((few - plain).abs().max()) > 0.1
    place, kept = next(iter(sparse.kept.items()))
    assert place.block == 0
    assert int(kept[-1].sum()) < int(kept[0].sum())
    assert unchanged(model, before)
    assert torch.equal(logits(model, ids, mask), plain)


def test_a_row_of_blocks_without_any_gives_zeros() -> None:
    model, (ids, _) = decoder(num_hidden_layers=1), texts()
    nothing = SparsePrompts(SeerAttention(model, block=4), threshold=1.0, keep_diagonal=False, last_dense=False)
    heads = HeadRecorder()
    with edited(model, nothing, heads):
        logits(model, ids)
    assert float(next(iter(heads.found.values()))[0].abs().max()) == 0.0


def test_distilling_teaches_the_gates_and_leaves_the_decoder_bit_for_bit(tmp_path: Path) -> None:
    model, (ids, mask) = decoder(num_hidden_layers=2), texts(24)
    gates, before = SeerAttention(model, block=4), state_of(model)
    first = {name: value.clone() for name, value in gates.state_dict().items()}
    losses = distil_gates(SeerLoss(gates), model, lambda: (ids, mask), steps=14, lr=1e-2, warmup=2)
    assert losses[-1] < 0.85 * losses[0]
    assert unchanged(model, before)
    assert all(not torch.equal(value, first[name]) for name, value in gates.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    gates.save(tmp_path / "gates.safetensors")
    loaded = SeerAttention.load(tmp_path / "gates.safetensors", model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in gates.state_dict().items())
    with pytest.raises(InputError, match="is of a model with other heads"):
        SeerAttention.load(tmp_path / "gates.safetensors", decoder(num_hidden_layers=2, num_attention_heads=8))


def test_the_loss_is_that_of_torch_without_the_first_quarter() -> None:
    scores, target = numbers(1, 2, 8, 8), numbers(1, 2, 8, 8, seed=1).softmax(-1)
    with pytest.warns(UserWarning, match="reduction"):
        expected = F.kl_div(scores[:, :, 2:].log_softmax(-1), target[:, :, 2:], reduction="mean")
    torch.testing.assert_close(gate_loss(scores, target), expected)


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True}])
def test_gates_fit_any_kind_on_every_layer_with_keys_of_groups(settings: dict[str, Any]) -> None:
    model, (ids, mask) = decoder(**settings), texts()
    for options in ({}, {"force_double": True, "blocks": [1]}, {"gate_width": 4, "q_pools": ["max", "avg"]}):
        gates = SeerAttention(model, block=4, **options)  # type: ignore[arg-type]
        assert len(gates.gates) == (1 if "blocks" in options else 3)
        with edited(model, SparsePrompts(gates, threshold=0.2)) as run:
            logits(model, ids, mask)
        assert {place.block for place, _ in run.effect if place.kind == "self"} == {int(n) for n in gates.gates}


def test_joint_training_moves_both_under_yarn() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    model = decoder(num_hidden_layers=1, rope_parameters=rope)
    gates, before = SeerAttention(model, block=4), state_of(model)
    own = {name: value.clone() for name, value in gates.state_dict().items()}
    ids, mask = texts(24)
    losses = train_jointly(gates, model, lambda: (ids, mask), steps=6, share=0.5, lr=1e-2, gate_lr=1e-2, warmup=1)
    assert losses[-1][0] < losses[0][0]
    assert not unchanged(model, before)
    assert all(not torch.equal(value, own[name]) for name, value in gates.state_dict().items())


def test_rivals_take_the_place_of_the_gates() -> None:
    model, (ids, mask) = decoder(num_hidden_layers=1), texts()
    gates = SeerAttention(model, block=4)
    for choose in (None, lambda call, block, real: pooled_target(call.q, call.k, block, real, call.scale)):
        sparse = SparsePrompts(gates, share=0.4, choose=choose)
        with edited(model, sparse):
            logits(model, ids, mask)
        assert next(iter(sparse.kept.values()))[0].shape == (2, 4, 5, 5)


def test_what_cannot_be_is_said() -> None:
    model = decoder()
    with pytest.raises(InputError, match="threshold: give either a threshold or a share"):
        SparsePrompts(SeerAttention(model))
    with pytest.raises(InputError, match=r"blocks: \[7\] named"):
        SeerAttention(model, blocks=[7])
    gpt = zoo.built("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40}, "sdpa")
    with (
        pytest.raises(InputError, match="told no cosines and sines"),
        edited(gpt, SparsePrompts(SeerAttention(gpt, block=4), share=0.5)),
    ):
        logits(gpt, texts()[0])
    with (
        pytest.raises(InputError, match="make them from this model"),
        edited(model, SparsePrompts(SeerAttention(decoder(num_attention_heads=8), block=4), share=0.5)),
    ):
        logits(model, texts()[0])
    assert SparsePrompts(SeerAttention(model), share=0.5, at=Where([0])).at.blocks == [0]
