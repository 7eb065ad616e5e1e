"""Gates and policies of blocks on SmolLM2: nothing lost where all is read, less read where asked, the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.mix.layer_gates import distil_gates
from cenote.mix.long_context_heads.live import QAdA
from cenote.mix.moba.live import MoBA, all_but_last
from cenote.mix.seerattention.live import SeerAttention, SeerLoss, SparsePrompts
from cenote.mix.seerattention_r.live import SeerAttentionR, SeerRowLoss, SparseDecoding
from cenote.mix.sinklora.attention import Groups
from cenote.mix.sinklora.live import GroupedAttention
from cenote.models.live import Edit, edited
from tests.real.test_gistpool import PROSE

pytestmark = pytest.mark.real("a decoder of 135 million parameters")


@pytest.fixture(autouse=True)
def _no_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def words(smollm2: Any) -> Tensor:
    return torch.as_tensor(smollm2.processor([PROSE])["input_ids"])


def loss(model: Any, ids: Tensor, *edits: Edit) -> float:
    def told() -> float:
        logits = model(ids, use_cache=False).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    if not edits:
        return told()
    with edited(model, *edits):
        return told()


def test_prompts_in_blocks_lose_nothing_where_all_is_read(smollm2: Any) -> None:
    model, ids = smollm2.model, words(smollm2)
    plain = loss(model, ids)
    gates = SeerAttention(model, block=16)
    assert len(gates.gates) == 30
    assert gates.gates["0"].key_maps.shape == (9, 3 * 64, 64)
    for whole in (SparsePrompts(gates, share=1.0), MoBA(16, 99), GroupedAttention(Groups(ratio=1.0, return_fraction=1.0))):
        assert loss(model, ids, whole) == pytest.approx(plain, abs=1e-3)
    for sparse in (
        SparsePrompts(gates, share=0.2),
        MoBA(16, 2, first=1, at=all_but_last(model, 3)),
        GroupedAttention(Groups(16)),
    ):
        assert abs(loss(model, ids, sparse) - plain) > 1e-3
    assert loss(model, ids) == plain


def test_decoding_in_blocks_is_dense_where_the_budget_is_the_context(smollm2: Any) -> None:
    model, ids = smollm2.model, words(smollm2)[:, :64]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    gates = SeerAttentionR(model, block=8)
    assert gates.gates["0"].query_maps.shape == (3, 3, 64, 64)
    few = SparseDecoding(gates, budget=16)
    for edit in (SparseDecoding(gates, budget=128), QAdA(1.0, 4, 16), few, QAdA(0.5, 4, 16)):
        with edited(model, edit):
            made = model.generate(ids, **options)
        if edit is not few and getattr(edit, "tau", 1.0) == 1.0:
            assert torch.equal(made, plain)
    assert few.keys_read() < 0.5
    assert torch.equal(model.generate(ids, **options), plain)


def test_gates_of_two_blocks_learn_from_a_real_text(smollm2: Any) -> None:
    model, ids = smollm2.model, words(smollm2)
    for learning in (
        SeerLoss(SeerAttention(model, block=16, blocks=[0, 20])),
        SeerRowLoss(SeerAttentionR(model, block=16, blocks=[0, 20])),
    ):
        losses = distil_gates(learning, model, lambda: (ids, None), steps=12, warmup=1, lr=3e-3)
        assert losses[-1] < 0.8 * losses[0]
