"""Positions that are sums of gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cenote.core import InputError
from cenote.mix.contextual_position_encoding.model import (
    CoPETransformer,
    Encoding,
    answer_error,
    flip_flop_errors,
    train_answers,
)
from cenote.mix.contextual_position_encoding.scores import CoPE
from cenote.mix.contextual_position_encoding.tasks import counting, flip_flop, selective_copy
from cenote.mix.position_scores import DotProduct, RelativeTable

CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]


def inputs(width: int = 4, tokens: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, tokens, width, dtype=torch.float64)
    return q, k


def cope(gates: str = "own", **settings: int | bool) -> CoPE:
    torch.manual_seed(1)
    made = CoPE(4, **{"positions": 5, "gate_keys": gates, "scaled_gates": False, **settings}).double()
    torch.nn.init.normal_(made.table)
    return made


def closed(q: Tensor) -> tuple[Tensor, Tensor]:
    """Queries with a last channel of 1, and gate keys that read it alone: 1e4 or -1e4."""
    held = torch.cat([q[..., :-1], torch.ones_like(q[..., -1:])], -1)
    reads = torch.zeros_like(held)
    reads[..., -1] = 1e4
    return held, reads


def test_gates_of_one_make_it_the_relative_table_from_one_on() -> None:
    q, k = inputs()
    q, gate_keys = closed(q)
    made = cope()
    found = made.counted(q, k, CAUSAL, gate_keys=gate_keys)
    distance = torch.arange(6)[:, None] - torch.arange(6) + 1
    assert torch.equal(found.positions[0, 0].tril(), distance.clamp(0, 4).double().tril())
    shifted = RelativeTable(4, 4).double()
    with torch.no_grad():
        shifted.table.copy_(made.table[0, :, 1:])
    torch.testing.assert_close(found.scores, shifted(q, k, CAUSAL))


def test_gates_of_zero_are_no_position() -> None:
    q, k = inputs()
    q, gate_keys = closed(q)
    weights = cope()(q, k, CAUSAL, gate_keys=-gate_keys).softmax(-1)
    torch.testing.assert_close(weights, DotProduct()(q, k, CAUSAL).softmax(-1))


def test_a_table_of_zeros_is_plain_attention_and_it_starts_so() -> None:
    q, k = inputs()
    made = CoPE(4).double()
    assert made.table.shape == (1, 4, 64)
    assert not made.table.any()
    assert torch.equal(made(q, k, CAUSAL), DotProduct()(q, k, CAUSAL))


def test_one_position_has_no_effect() -> None:
    q, k = inputs()
    weights = cope("keys", positions=1)(q, k, CAUSAL).softmax(-1)
    torch.testing.assert_close(weights, DotProduct()(q, k, CAUSAL).softmax(-1))


def test_tokens_whose_gates_are_zero_may_be_put_in_and_leave_the_other_scores() -> None:
    q, k = inputs()
    gate_keys = torch.randn_like(k)
    held, reads = closed(q)
    gate_keys[..., -1] = 0
    found = cope()(held, k, CAUSAL, gate_keys=gate_keys)
    at = [0, 1, 2, 4, 5, 7]
    longer = [torch.randn(2, 3, 8, 4, dtype=torch.float64) for _ in range(3)]
    longer[0][..., -1] = 1
    for long, short in zip(longer, (held, k, gate_keys), strict=True):
        long[:, :, at] = short
    longer[2][:, :, [3, 6]] = -reads[:, :, :2]
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    between = cope()(longer[0], longer[1], mask, gate_keys=longer[2])
    torch.testing.assert_close(between[:, :, at][..., at], found)


def test_whole_positions_are_looked_up_and_halves_lie_between() -> None:
    q, k = inputs()
    q, gate_keys = closed(q)
    made = cope()
    half = made.counted(q, k, CAUSAL, gate_keys=torch.zeros_like(gate_keys))
    assert torch.equal(half.gates[0, 0], CAUSAL[0, 0] * 0.5)
    by_position = q @ made.table
    expected = (q[:, :, 2:3] @ k[:, :, 1:2].mT)[..., 0, 0] + by_position[:, :, 2, 1]
    torch.testing.assert_close(half.scores[:, :, 2, 1], expected / 2)
    expected = (q[:, :, 2:3] @ k[:, :, 2:3].mT)[..., 0, 0] + by_position[:, :, 2, :2].mean(-1)
    torch.testing.assert_close(half.scores[:, :, 2, 2], expected / 2)


def test_options_are_what_they_say() -> None:
    q, k = inputs()
    scaled, raw = cope("keys", scaled_gates=True), cope("keys")
    torch.testing.assert_close(scaled.counted(q, k, CAUSAL).gates, raw.counted(q / 2, k, CAUSAL).gates)
    whole = cope("keys", scaled_positions=False)
    plain = DotProduct()(q, k)
    torch.testing.assert_close((whole(q, k) - plain) / 2, raw(q, k) - plain)
    values = torch.randn_like(k)
    assert torch.equal(cope("values")(q, k, CAUSAL, gate_keys=values), cope("own")(q, k, CAUSAL, gate_keys=values))
    both = cope("keys", relative=3)
    torch.nn.init.normal_(both.relative.table)
    torch.testing.assert_close(both(q, k) - raw(q, k), both.relative(q, k) - plain)


def test_counting_is_as_in_the_listing_of_the_paper() -> None:
    """Gates raw, the query alone against the table: what x-transformers' CoPE gives for `(query, logits)`."""
    q, k = inputs()
    made = cope("keys", scaled_positions=False)
    logits = q @ k.mT
    expected = torch.zeros_like(logits)
    for i in range(6):
        for j in range(i + 1):
            place = min(float(logits[0, 0, i, j : i + 1].sigmoid().sum()), 4.0)
            low, high = math.floor(place), math.ceil(place)
            e = q[0, 0, i] @ made.table[0]
            expected[0, 0, i, j] = (place - low) * e[high] + (1 - place + low) * e[low]
    found = made(q, k, CAUSAL)[0, 0] - DotProduct()(q, k, CAUSAL)[0, 0]
    torch.testing.assert_close(found.masked_fill(~CAUSAL[0, 0], 0), expected[0, 0])


def test_half_precision_counts_in_float32() -> None:
    q = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 1001, 4, dtype=torch.bfloat16)
    found = CoPE(4, positions=2000).bfloat16().counted(q, k)
    assert found.positions[0, 0, 0, 0] == 500.5
    assert found.scores.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_no_tensor_of_queries_times_keys_times_width_is_made() -> None:
    q = torch.randn(1, 1, 40, 16, requires_grad=True)
    made = CoPE(16, positions=8)
    with Largest() as seen:
        made(q, q, torch.ones(40, 40, dtype=torch.bool).tril()[None, None])
    assert seen.numbers == 40 * 40


def test_wrong_uses_are_named() -> None:
    q, k = inputs()
    with pytest.raises(InputError, match="gate_keys: is missing"):
        cope("own")(q, k)
    with pytest.raises(InputError, match="gate_keys: is given"):
        cope("keys")(q, k, gate_keys=k)
    with pytest.raises(InputError, match="q: expected heads of width 4, got 3"):
        cope("keys")(q[..., :3], k[..., :3])
    with pytest.raises(InputError, match="gate_keys"):
        CoPE(4, gate_keys="queries")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["cope", "cope+rel", "rel", "abs", "abs+rel", "rope", "none"])
def test_one_token_at_a_time_is_the_whole(encoding: Encoding) -> None:
    torch.manual_seed(0)
    settings = {"gate_keys": "own", "every": 2 if encoding == "cope+rel" else 1}
    model = CoPETransformer(11, 12, encoding, layers=2, dim=16, heads=2, **settings).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(0, 11, (2, 9))
    whole, cache, found = model(tokens).logits, None, []
    for i in range(9):
        logits, cache = model(tokens[:, i : i + 1], cache=cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache[0].k.shape == (2, 2, 9, 8)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = (torch.arange(12) > 2).expand(2, -1)
    if encoding != "abs+rel":
        torch.testing.assert_close(model(padded, mask).logits[:, 3:], whole, atol=1e-5, rtol=1e-5)
    later = model(torch.cat([tokens[:, :5], torch.flip(tokens[:, 5:], [1])], 1)).logits
    torch.testing.assert_close(later[:, :5], whole[:, :5], atol=1e-5, rtol=1e-5)


def test_the_model_is_the_published_one() -> None:
    model = CoPETransformer(20, shared=True)
    assert len(model.blocks) == 4
    assert model.embedding.weight.shape == (20, 256)
    assert model.output is None
    assert not model.blocks[0].pre_norm
    assert {id(b.attention.scores) for b in model.blocks} == {id(model.blocks[0].attention.scores)}
    assert model.blocks[0].attention.scores.table.shape == (1, 64, 513)
    mixed = CoPETransformer(20, 8, "cope+rel", every=2, dim=16)
    assert [type(b.attention.scores).__name__ for b in mixed.blocks] == ["RelativeTable", "CoPE"] * 2
    with pytest.raises(InputError, match="every"):
        CoPETransformer(20, every=2)
    with pytest.raises(InputError, match="tokens: 9 of an item, and this model has 8 positions"):
        CoPETransformer(20, 8, "abs", dim=16)(torch.zeros(1, 9, dtype=torch.long))


def test_bits_behind_read_are_those_written_last() -> None:
    task = flip_flop(50, 12, 0.6, torch.Generator().manual_seed(0))
    for text, answers in zip(task.tokens.tolist(), task.answers.tolist(), strict=True):
        held = None
        for i in range(0, 24, 2):
            if text[i] == 2:
                held = text[i + 1]
            assert answers[i + 1] == (text[i] == 3)
            assert text[i] != 3 or text[i + 1] == held
    assert abs(float((task.tokens[:, 2:-2:2] == 4).double().mean()) - 0.6) < 0.05
    assert flip_flop(3, 4, 0.5, last_only=True).answers.sum() == 3


def test_increments_are_counted_since_the_last_zero() -> None:
    task = counting(60, 40, 3, most=4, weights=(5, 1, 7), generator=torch.Generator().manual_seed(0))
    for text in task.tokens.tolist():
        held: dict[int, int] = {}
        for a, b, _ in zip(*[iter(text[:-3])] * 3, strict=True):
            if b == 1:
                held[a] = 0
            elif b == 2:
                held[a] += 1
        assert text[-3] == 3
        assert text[-1] == 4 + held[text[-2]]
        assert max(held.values()) <= 4
    assert torch.equal(task.answers.nonzero()[:, 1], torch.full((60,), 122))
    with pytest.raises(InputError, match="steps"):
        counting(1, 3, 3)


def test_marks_are_copied_without_blanks() -> None:
    for blanks in (2, 40):
        task = selective_copy(9, 5, blanks, generator=torch.Generator().manual_seed(0))
        for text in task.tokens:
            assert torch.equal(text[:-6][text[:-6] != 8], text[-5:])
        assert bool((task.tokens[:, -6] == 9).all())


def test_training_lowers_the_error_on_answers() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = CoPETransformer(5, 8, positions=4, layers=1, dim=16, heads=1, dropout=0.0, pre_norm=True)
    losses = train_answers(model, lambda _: flip_flop(32, 3, 0.0, generator), 60, lr=2e-2)
    assert not model.training
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    task = flip_flop(64, 3, 0.0, torch.Generator().manual_seed(1))
    assert answer_error(model, *task) < 0.3
    table = flip_flop_errors(model, shares=(0.0, 0.5), pairs=(3, 4), texts=64)
    assert set(table) == {(0.0, 3), (0.0, 4), (0.5, 3), (0.5, 4)}
    assert table[0.0, 3] < 0.3
