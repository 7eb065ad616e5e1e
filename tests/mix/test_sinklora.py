"""SinkLoRA: groups as masks, what leaks and what cannot, decoders that are trained in groups and evaluated whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cenote.core import InputError
from cenote.mix.blocks import masked_attention
from cenote.mix.losses import losses_by_length, token_losses
from cenote.mix.policies import H2O
from cenote.mix.sinklora.attention import Groups, grouped_attention
from cenote.mix.sinklora.live import (
    GroupedAttention,
    SinkLoRA,
    leak,
    passkey,
    passkey_accuracy,
    recovered,
    train_longer,
)
from cenote.mix.sinklora.patterns import Pattern
from cenote.models.interpolation import interpolated
from cenote.models.live import edited
from cenote.models.own_weights import OwnWeights
from tests.mix.decoders import decoder, generated, logits, numbers, state_of, texts, unchanged


def qkv(tokens: int = 12, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        numbers(2, heads, tokens, 4),
        numbers(2, kv_heads, tokens, 4, seed=1),
        numbers(2, kv_heads, tokens, 4, seed=2),
    )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


SETTINGS = [
    Groups(group, return_fraction=back, sinks=sinks, no_wrap=no_wrap, segment_axis=axis, sink_at=at)  # type: ignore[arg-type]
    for group, back, sinks, no_wrap, axis, at in itertools.product(
        (4, 5, 20), (0.0, 0.5), (0, 4, 7), (True, False), ("heads", "sequence"), (None, (3, 9))
    )
]


@pytest.mark.parametrize("settings", [SETTINGS[::12], pytest.param(SETTINGS, marks=pytest.mark.thorough)])
def test_groups_computed_one_by_one_are_the_mask(settings: list[Groups]) -> None:
    for groups, tokens in itertools.product(settings, (12, 13)):
        q, k, v = qkv(tokens)
        may = groups.readable(4, tokens)[None].expand(2, -1, -1, -1)
        expected = masked_attention(q, k, v, may)
        torch.testing.assert_close(grouped_attention(q, k, v, groups), expected, atol=1e-5, rtol=1e-5)


def test_shifted_groups_are_rolled_as_in_the_release_and_leak() -> None:
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in qkv(16))

    def rolled(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, :2], x[:, 2:].roll(by, 2)], 1)

    cut = [rolled(x, -2).unflatten(2, (4, 4)).transpose(1, 2) for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*cut, is_causal=True).transpose(1, 2).flatten(2, 3)
    expected = rolled(y, 2)
    torch.testing.assert_close(grouped_attention(q, k, v, Groups.shifted()), expected, atol=1e-5, rtol=1e-5)
    later = torch.ones(16, 16, dtype=torch.bool).triu(1)
    told = Groups.shifted().readable(4, 16) & later
    assert told.any(-1)[3].nonzero()[:, 0].tolist() == [0, 1]
    assert told[3, 0].nonzero()[:, 0].tolist() == [14, 15]
    assert not bool(told[:2].any())
    assert leak(Groups.shifted(), 4, 16) == 4 / 64
    assert leak(Groups.shifted(no_wrap=True), 4, 16) == leak(Groups(), 4, 16) == 0.0


def test_a_share_of_the_shifted_heads_goes_back() -> None:
    assert Groups(return_fraction=0.5).is_shifted(8).tolist() == [False] * 6 + [True] * 2
    assert Groups(return_fraction=0.0).is_shifted(5).tolist() == [False] * 2 + [True] * 3
    assert not bool(Groups(return_fraction=1.0).is_shifted(8).any())
    assert Groups(segment_axis="sequence").is_shifted(8).tolist() == [False] * 4 + [True] * 4
    q, k, v = qkv(16)
    y, apart = (grouped_attention(q, k, v, g) for g in (Groups(sinks=0), Groups.apart()))
    same = (y == apart).flatten(2).all(-1)[0].tolist()
    assert same == [True, True, True, False]


@pytest.mark.parametrize(
    "groups", [Groups(4, sinks=2), Groups(4, segment_axis="sequence"), Groups.shifted(4, no_wrap=True)]
)
def test_an_output_has_no_gradient_from_later_inputs(groups: Groups) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    y = grouped_attention(q, k, v, groups)
    for i in (0, 1, 5, 10):
        grads = torch.autograd.grad(y[:, :, i].sum(), (q, k, v), retain_graph=True)
        assert all(float(grad[:, :, i + 1 :].abs().max()) == 0.0 for grad in grads)
        assert float(grads[2][:, :, i].abs().max()) > 0.0


@pytest.mark.parametrize("kind", ["window", "fixed", "strided", "random"])
def test_rivals_read_about_as_many_earlier_tokens(kind: str) -> None:
    pattern = Pattern(kind, group=16)  # type: ignore[arg-type]
    may = pattern.readable(2, 64)
    assert not bool((may & torch.ones(64, 64, dtype=torch.bool).triu(1)).any())
    assert bool(may[0].diagonal().all())
    assert 10 <= float(may[0, 32:].sum(-1).float().mean()) <= 22
    model, (ids, mask) = decoder(num_hidden_layers=1), texts()
    with edited(model, GroupedAttention(Pattern(kind, group=4))):  # type: ignore[arg-type]
        found = logits(model, ids, mask)
        alone = logits(model, ids[:1, 5:])
    assert bool(found.isfinite().all())
    if kind == "window":
        torch.testing.assert_close(alone, found[:1, 5:], atol=1e-4, rtol=1e-4)


def test_sinks_are_read_by_all_and_may_stand_elsewhere() -> None:
    groups = Groups(4, return_fraction=1.0, sinks=2)
    may = groups.readable(2, 12)
    assert bool(may[:, :, 0].all())
    assert may[0, 9].nonzero()[:, 0].tolist() == [0, 1, 8, 9]
    elsewhere = Groups(4, return_fraction=1.0, sinks=2, sink_at=(5, 6)).readable(2, 12)
    assert elsewhere[0, 9].nonzero()[:, 0].tolist() == [5, 6, 8, 9]
    assert elsewhere[0, 5].nonzero()[:, 0].tolist() == list(range(6))
    keys = Groups(4, return_fraction=1.0, sinks=2, sink_at=(5, 6), sink_scope="keys").readable(2, 12)
    assert keys[0, 5].nonzero()[:, 0].tolist() == [4, 5]


def test_one_group_is_causal_attention_and_groups_apart_are_block_diagonal() -> None:
    q, k, v = qkv()
    for groups in (Groups(ratio=1.0, return_fraction=1.0), Groups(4, sinks=20), Groups(12, return_fraction=1.0)):
        torch.testing.assert_close(grouped_attention(q, k, v, groups), dense(q, k, v), atol=1e-5, rtol=1e-5)
    y = grouped_attention(q, k, v, Groups.apart(4))
    for start in (0, 4, 8):
        span = slice(start, start + 4)
        own = dense(*(x[:, :, span] for x in (q, k, v)))
        torch.testing.assert_close(y[:, :, span], own, atol=1e-5, rtol=1e-5)


def test_lengths_that_are_no_whole_number_of_groups_and_padding_on_either_side() -> None:
    q, k, v = qkv(11)
    groups = Groups(4, sinks=7)
    y = grouped_attention(q, k, v, groups)
    assert bool(y.isfinite().all())
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, -3:] = False
    wide = [x.new_full((2, x.shape[1], 14, 4), 9.0) for x in (q, k, v)]
    for x, of in zip(wide, (q, k, v), strict=True):
        x[0, :, 3:], x[1, :, :-3] = of[0], of[1]
    padded = grouped_attention(*wide, groups, mask)
    torch.testing.assert_close(padded[0, :, 3:], y[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1, :, :-3], y[1], atol=1e-5, rtol=1e-5)


def test_prompts_of_any_length_are_grouped_and_decoding_is_not() -> None:
    model, before = decoder(), None
    for tokens in (1, 17, 18):
        ids, mask = texts(tokens, pads=0)
        before = state_of(model)
        plain = logits(model, ids, mask)
        with edited(model, GroupedAttention(Groups(ratio=1.0, return_fraction=1.0))):
            torch.testing.assert_close(logits(model, ids, mask), plain, atol=1e-4, rtol=1e-4)
        with edited(model, GroupedAttention(Groups(4, sinks=2))):
            grouped = logits(model, ids, mask)
            made, steps = generated(model, ids, mask, tokens=2)
        torch.testing.assert_close(steps[:, 0], grouped[:, -1], atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            with edited(model, GroupedAttention(Groups(4, sinks=2))):
                first = model(input_ids=ids, use_cache=True)
            name = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
            behind = model(made[:, tokens : tokens + 1], **{name: getattr(first, name)}).logits
        torch.testing.assert_close(steps[:, 1], behind[:, -1], atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(model, ids, mask), plain)
        assert unchanged(model, before)


def test_heavy_hitters_of_a_budget_of_everything_are_the_full_cache() -> None:
    model, (ids, mask) = decoder(), texts()
    made, steps = generated(model, ids, mask)
    with H2O(budget=64, recent=32).on(model):
        again, same = generated(model, ids, mask)
    assert torch.equal(again, made)
    assert torch.equal(same, steps)
    with H2O(budget=8, recent=4).on(model) as run:
        fewer = generated(model, ids, mask)[1]
    assert torch.isfinite(fewer).all()
    assert max(run.most.values()) <= 9


def test_only_what_is_adapted_moves_and_merging_is_the_same(tmp_path: Path) -> None:
    model, (ids, mask) = decoder(num_hidden_layers=2, tie_word_embeddings=True), texts(24)
    before = state_of(model)
    adapter = SinkLoRA(model, factor=2.0)
    assert len(adapter.low_rank.names) == 8
    assert adapter.low_rank.scale == 2.0
    assert adapter.low_rank.dropout.p == 0.0
    assert adapter.whole is not None
    assert all("embed" in name or "norm" in name for name in adapter.whole.names)
    assert len(adapter.whole.names) == 6
    started = {name: value.clone() for name, value in adapter.state_dict().items()}
    losses = train_longer(adapter, model, lambda: (ids, mask), steps=12, groups=Groups(4), lr=1e-2, warmup=2)
    assert losses[-1] < losses[0]
    assert unchanged(model, before)
    assert all(not torch.equal(value, started[name]) for name, value in adapter.state_dict().items())
    adapter.save(tmp_path / "adapter.safetensors")
    loaded = SinkLoRA.load(tmp_path / "adapter.safetensors", model)
    with loaded.on(model):
        apart = logits(model, ids, mask)
    loaded.merge(model)
    with interpolated(model, 2.0):
        torch.testing.assert_close(logits(model, ids, mask), apart, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="is of another model"):
        SinkLoRA.load(tmp_path / "adapter.safetensors", decoder(num_hidden_layers=1))
    with pytest.raises(InputError, match="cannot be read"):
        SinkLoRA.load(tmp_path / "none.safetensors", model)


def test_the_rate_rises_and_stays() -> None:
    model, (ids, mask) = decoder(num_hidden_layers=1), texts()
    adapter = SinkLoRA(model, rank=2)
    train_longer(adapter, model, lambda: (ids, mask), steps=1, groups=None, warmup=20)
    # a first step of Adam moves by the rate
    moved = max(float(up.abs().max()) for up in adapter.low_rank.up)
    assert moved == pytest.approx(2e-5 / 20, rel=0.01)


def test_pressed_positions_are_those_of_a_slower_decoder_and_come_back() -> None:
    model, (ids, mask) = decoder(), texts()
    plain = logits(model, ids, mask)
    scaled = decoder(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0})
    with interpolated(model, 2.0):
        torch.testing.assert_close(logits(model, ids, mask), logits(scaled, ids, mask), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, ids, mask), plain)
    with pytest.raises(InputError, match="has no rotary positions"), interpolated(torch.nn.Linear(1, 1), 2.0):
        pass


def test_losses_by_length() -> None:
    model, (ids, _) = decoder(num_hidden_layers=1), texts()
    found = losses_by_length(model, ids, [6, 18])
    assert found[18] == pytest.approx(float(token_losses(model, ids).mean()))
    with pytest.raises(InputError, match="lengths: expected from 2 to 18 tokens, got 19"):
        losses_by_length(model, ids, [19])


def test_half_precision_of_the_decoder_is_trained_too() -> None:
    model, (ids, mask) = decoder(num_hidden_layers=1).bfloat16(), texts()
    adapter = SinkLoRA(model, rank=2)
    losses = train_longer(adapter, model, lambda: (ids, mask), steps=2, groups=Groups(4), lr=1e-2, warmup=1)
    assert losses[1] < losses[0]


def test_recovery_and_passkeys() -> None:
    assert recovered(3.0, 2.0, 2.5) == 0.5
    with pytest.raises(InputError, match=r"full: a loss of 3\.0 is no improvement"):
        recovered(2.0, 3.0, 2.5)
    first, last = (passkey(["The grass is green."], 20, depth) for depth in (0.0, 1.0))
    assert first.key == last.key
    assert first.text.index(first.key) < last.text.index(last.key)
    assert first.text.count("green") == 5
    model = decoder(max_position_embeddings=512)

    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [5 + ord(letter) % 30 for letter in text]}

    found = passkey_accuracy(model, Letters(), ["The sky is blue."], [4, 8], trials=2)
    assert found == {4: 0.0, 8: 0.0}

    class Knowing(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> object:
            ahead = F.one_hot(input_ids.roll(-1, 1), 40).float()
            return type("Output", (), {"logits": ahead})

    assert passkey_accuracy(Knowing(), Letters(), ["The sky is blue."], [4], trials=2) == {4: 1.0}


def test_what_cannot_be_is_said() -> None:
    for options, said in (
        ({"ratio": 0.0}, "ratio: expected more than 0"),
        ({"return_fraction": 2.0}, "return_fraction: expected a share"),
        ({"segment_axis": "words"}, "segment_axis: expected"),
        ({"group": 0}, "group: expected at least 1"),
    ):
        with pytest.raises(InputError, match=said):
            Groups(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only: none of the model's parameters"):
        OwnWeights(torch.nn.Linear(1, 1), lambda _: False)
    with pytest.raises(InputError, match="depth: expected from 0 to 1"):
        passkey(["A b."], 5, 2.0)
