"""Amplitudes times cosines of phases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.normalisers import softmax
from cenote.mix.position_scores import DotProduct
from cenote.mix.token_aware_phase_attention.scores import TAPA, GeneralPhase, attended_in_blocks

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
