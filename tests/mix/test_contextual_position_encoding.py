"""Positions that are sums of gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cenote.core import InputError
from cenote.mix.contextual_position_encoding.scores import CoPE
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
