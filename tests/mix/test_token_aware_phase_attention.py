"""Amplitudes times cosines of phases."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.normalisers import softmax
from cenote.mix.position_scores import DotProduct, Rotary
from cenote.mix.token_aware_phase_attention.decoder import (
    Encoding,
    TAPAConfig,
    TAPADecoder,
    length_table,
    train_tapa,
)
from cenote.mix.token_aware_phase_attention.scores import TAPA, GeneralPhase, attended_in_blocks
from cenote.mix.token_aware_phase_attention.theory import phase_mean, phase_second_moment, rope_mean
from cenote.mix.trained import trained

CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize("which", ["q", "k"])
def test_without_a_phase_it_is_attention_on_the_amplitude(which: str) -> None:
    q, k, _ = inputs()
    (q if which == "q" else k)[..., 4:] = 0
    torch.testing.assert_close(TAPA()(q, k, CAUSAL), DotProduct()(q[..., :4], k[..., :4], CAUSAL))


def test_on_the_diagonal_the_cosine_is_one() -> None:
    q, k, _ = inputs()
    amplitude = DotProduct()(q[..., :4], k[..., :4])
    torch.testing.assert_close(TAPA()(q, k).diagonal(dim1=2, dim2=3), amplitude.diagonal(dim1=2, dim2=3))


def test_without_alpha_the_distance_drops_out() -> None:
    q, k, _ = inputs()
    near = (torch.arange(7)[None], torch.arange(7)[None] + 100)
    far = (torch.arange(7)[None], torch.arange(7)[None] + 9000)
    torch.testing.assert_close(TAPA(alpha=1e-12)(q, k, positions=near), TAPA(alpha=1e-12)(q, k, positions=far))


def test_adding_a_constant_to_all_positions_changes_nothing() -> None:
    q, k, _ = inputs()
    moved = (torch.arange(7)[None] + 1000,) * 2
    assert torch.equal(TAPA()(q, k), TAPA()(q, k, positions=moved))


def test_before_and_after_are_the_same_to_it() -> None:
    q, k, _ = inputs()
    torch.testing.assert_close(TAPA()(q, k).mT, TAPA()(k, q))


def test_no_channel_for_one_of_the_two_is_refused() -> None:
    q, k, _ = inputs()
    with pytest.raises(InputError, match="theta: of 8 channels 8 would give the amplitude and 0 the phase"):
        TAPA(theta=0.99)(q, k)
    with pytest.raises(InputError, match="theta"):
        TAPA(theta=1.0)
    with pytest.raises(InputError, match="alpha"):
        TAPA(alpha=0.0)


def test_the_cosine_of_half_precision_is_that_of_float32() -> None:
    torch.manual_seed(0)
    q, k = (8 * torch.randn(2, 1, 1, 3, 64)).bfloat16()
    positions = (torch.tensor([[60_000, 60_001, 60_002]]), torch.tensor([[0, 1, 2]]))
    found = TAPA(alpha=0.5)(q, k, positions=positions)
    amplitude = (q[..., :32] @ k[..., :32].mT / math.sqrt(32)).float()
    phase = q[..., 32:].float() @ k[..., 32:].float().mT / math.sqrt(32)
    apart = (positions[0][0, :, None] - positions[1][0]).float() ** 0.5
    assert torch.equal(found, (amplitude * (2 * math.pi * apart * phase).cos()).bfloat16())


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("scores", [TAPA(), GeneralPhase(8).double(), GeneralPhase(8, phase="linear").double()])
def test_a_block_of_keys_at_a_time_is_the_whole(block: int, scores: TAPA) -> None:
    q, k, v = inputs()
    mask = CAUSAL.clone()
    mask[..., 2, :] = False
    expected = softmax(scores(q, k, mask)) @ v
    torch.testing.assert_close(attended_in_blocks(scores, q, k, v, mask, block=block), expected)


def test_the_general_form_holds_the_simple_one() -> None:
    q, k, _ = inputs()
    general = GeneralPhase(8, alpha=0.3).double()
    with torch.no_grad():
        general.amplitude_map.zero_()
        general.phase_map.zero_()
        general.amplitude_map[:4, :4] = torch.eye(4).double() * math.sqrt(2)
        general.phase_map[4:, 4:] = torch.eye(4).double() * math.sqrt(2)
    torch.testing.assert_close(general(q, k), TAPA(alpha=0.3)(q, k))


def test_means_by_distance_are_what_is_seen() -> None:
    torch.manual_seed(0)
    distance = torch.tensor([0.0, 1.0, 16.0, 4096.0])
    q, k = torch.randn(2, 200_000, 1, 1, 16)
    q[..., :8] += 1
    k[..., :8] += 1
    amplitude = (q[..., :8] * k[..., :8]).sum(-1) / math.sqrt(8)
    expected = phase_mean(distance, 8, 0.1, float(amplitude.mean()))
    squared = phase_second_moment(distance, 8, 0.1, float(amplitude.square().mean()))
    for i, away in enumerate(distance.long()):
        scores = TAPA()(q, k, positions=(away.view(1, 1), torch.zeros(1, 1, dtype=torch.long)))
        assert abs(float(scores.mean() - expected[i])) < 0.03
        assert abs(float(scores.square().mean() - squared[i])) < 0.03 * float(squared[0])
    assert float(expected[1]) < 0.01 * float(expected[0])
    assert bool((squared >= squared[0] / 2).all())


def test_rotary_means_hang_on_the_distance() -> None:
    torch.manual_seed(0)
    distance = torch.tensor([0.0, 1.0, 30.0])
    q, k = torch.randn(2, 1, 1, 100_000, 8)
    q, k = q + 0.5, k + 0.5
    expected = rope_mean(distance, 8, mean=0.5)
    turn = Rotary(8)
    for i, away in enumerate(distance.long()):
        turned = turn.turned(q, away.expand(1, 100_000)) * turn.turned(k, torch.zeros(1, 100_000, dtype=torch.long))
        assert abs(float(turned.sum(-1).mean() / math.sqrt(8) - expected[i])) < 0.02
    assert float(rope_mean(torch.tensor([1.0]), 64) - rope_mean(torch.tensor([4096.0]), 64)) > 0.1


@pytest.mark.parametrize("encoding", ["tapa", "general", "linear", "rope", "interpolated", "yarn", "none"])
def test_one_token_at_a_time_is_the_whole(encoding: Encoding) -> None:
    torch.manual_seed(0)
    config = TAPAConfig(11, layers=2, dim=16, heads=4, kv_heads=2, encoding=encoding, factor=2.0, trained=4)
    model = TAPADecoder(config).eval()
    tokens = torch.randint(0, 11, (2, 12))
    whole, cache, found = model(tokens).logits, None, []
    for i in range(12):
        logits, cache = model(tokens[:, i : i + 1], cache=cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)
    longer = model.generate(tokens[:, :5], 3)
    assert torch.equal(longer[:, 5], model(tokens[:, :5]).logits[:, -1].argmax(-1))
    assert torch.equal(longer[:, 7], model(longer[:, :7]).logits[:, -1].argmax(-1))


def test_a_decoder_is_what_was_saved(tmp_path: Path) -> None:
    model = TAPADecoder(TAPAConfig(11, layers=1, dim=16, heads=2, kv_heads=1)).eval()
    model.save(tmp_path / "model")
    tokens = torch.randint(0, 11, (1, 6))
    again = TAPADecoder.load(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(InputError, match="holds no whole decoder"):
        TAPADecoder.load(tmp_path)
    with pytest.raises(InputError, match="encoding"):
        TAPAConfig(11, encoding="alibi")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mask: an item ends in padding"):
        model.generate(tokens, 1, torch.zeros(1, 6, dtype=torch.bool))


def test_training_and_extension_lower_the_loss_and_lengths_are_told() -> None:
    torch.manual_seed(0)
    text = torch.arange(160) % 7
    model = TAPADecoder(TAPAConfig(7, layers=1, dim=16, heads=2))

    def draw(length: int) -> Tensor:
        return torch.stack([text[s : s + length] for s in torch.randint(0, 100, (8,)).tolist()])

    losses = train_tapa(model, lambda _: draw(12), steps=25, lr=3e-2)
    assert losses[-1] < 0.5 * losses[0]
    before = length_table(model, text, (12, 24, 48), last=8)
    assert before.gain == before.losses[12] - before.losses[48]
    train_tapa(model, lambda _: draw(48), steps=6, lr=5e-3, warm_up=0.1)
    after = length_table(model, text, (12, 24, 48), last=8)
    assert after.losses[48] < before.losses[48]
    assert after.perplexity()[12] == math.exp(after.losses[12])
    with pytest.raises(InputError, match="text: windows of 500"):
        length_table(model, text, (12, 500))


def test_rates_rise_in_a_line_and_fall_along_a_cosine() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer, seen = torch.optim.SGD(model.parameters(), 1.0), []

    def loss(_: int) -> Tensor:
        seen.append(optimizer.param_groups[0]["lr"])
        return model(torch.ones(1, 1)).sum() * 0

    trained(model, loss, optimizer, 8, warm_up=0.25, falls_to=0.1)
    assert seen[:3] == [0.5, 1.0, 1.0]
    assert seen[5] == pytest.approx(0.55)
    assert 0.1 < seen[-1] < 0.2
