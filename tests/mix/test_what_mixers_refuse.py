"""Arguments that do not fit are refused by name, by every mixer; and half precision is summed in full."""

from collections.abc import Callable

import pytest
import torch

from cenote.core import InputError
from cenote.core.requirements import require_heads, require_mask
from cenote.mix.attentive_convolution.convolution import ATConv
from cenote.mix.attentive_convolution.rivals import DynamicConv, Involution
from cenote.mix.base import Mixer
from cenote.mix.basic.attention import AttentionMixer
from cenote.mix.basic.efficient import LinearAttention, Linformer, NystromAttention
from cenote.mix.context_broadcasting.broadcasting import ScaledContextBroadcasting, SqueezeExcitation
from cenote.mix.contextual_position_encoding.model import CoPETransformer
from cenote.mix.deconstructing_attention.forms import DotProductForm, GatedMLPForm, RunningForm, TaylorForm
from cenote.mix.local_attention_tkl.model import TKL
from cenote.mix.local_attention_tkl.rivals import KNRM
from cenote.mix.marginal_attention.layers import PosteriorAttention
from cenote.mix.mixture_of_attentive_experts.attention import MixtureAttention
from cenote.mix.mixture_of_attentive_experts.experts import gate_input
from cenote.mix.moba.live import MoBAMixer
from cenote.mix.ponet.mixer import PoNetMixer
from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.rank_in_attention.transformer import rank_at_equal_size
from cenote.mix.scored_attention import ScoredAttention
from cenote.mix.sixteen_heads.gated import GatedAttention
from cenote.mix.tap_adl.diversification import attention_diversification
from cenote.mix.tap_adl.model import FANBlock
from cenote.mix.tap_adl.pooling import TokenAwarePooling
from cenote.mix.vision import MixedAttention

MIXERS: tuple[Callable[[], Mixer], ...] = (
    lambda: ATConv(8),
    lambda: DynamicConv(8),
    lambda: Involution(8),
    lambda: AttentionMixer(8, 2),
    lambda: LinearAttention(8, 2),
    lambda: Linformer(8, 2),
    lambda: NystromAttention(8, 2),
    lambda: ScaledContextBroadcasting(8),
    lambda: SqueezeExcitation(8),
    lambda: DotProductForm(8, 2),
    lambda: TaylorForm(8, 2),
    lambda: RunningForm(8, 2),
    lambda: GatedMLPForm(8, 2),
    lambda: PosteriorAttention(8),
    lambda: MixtureAttention(8, 2),
    lambda: MoBAMixer(8, 2),
    lambda: PoNetMixer(8),
    lambda: RankAttention(8, 2),
    lambda: ScoredAttention(8, 2),
    lambda: GatedAttention(8, 2),
    lambda: TokenAwarePooling(8),
)


@pytest.mark.parametrize("make", MIXERS, ids=lambda make: type(make()).__name__)
def test_tokens_of_another_width_are_refused(make: Callable[[], Mixer]) -> None:
    with pytest.raises(InputError, match="x: expected tokens of width 8, got 7"):
        make()(torch.zeros(1, 9, 7))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FANBlock(8, 0),
        lambda: MixedAttention(8, 0),
        lambda: CoPETransformer(5, 4, heads=0),
        lambda: rank_at_equal_size(8, 0, (1, 8)),
        lambda: require_heads(8, 0),
    ],
)
def test_no_heads_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="heads: expected at least 1, got 0"):
        wrong()


def test_masks_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"mask: expected bool \[1, 2\], got torch.bool \[2, 1\]$"):
        require_mask((1, 2), mask=torch.ones(2, 1, dtype=torch.bool))
    require_mask((1, 2), mask=None, other=torch.ones(1, 2, dtype=torch.bool))


def test_uniform_attention_has_a_loss_in_half_precision() -> None:
    uniform = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float16)
    assert attention_diversification([uniform]).item() == pytest.approx(
        attention_diversification([uniform.float()]).item(), abs=1e-3
    )


@pytest.mark.parametrize("causal", [False, True])
def test_a_gate_reads_the_mean_of_large_tokens_in_half_precision(causal: bool) -> None:
    assert (gate_input(torch.full((1, 8, 1), 3e4, dtype=torch.float16), causal=causal) == 3e4).all()


def test_rankers_are_finite_in_half_precision() -> None:
    query, document = torch.randn(1, 3, 4).half(), torch.randn(1, 9, 4).half()
    masks = torch.tensor([[True, True, False]]), torch.arange(9)[None] < 7
    for model in (TKL(4, heads=2, layers=1, hidden=4).half().eval(), KNRM().half()):
        assert model(query, document, *masks).isfinite().all()


def test_rank_attention_refuses_a_mask_of_numbers() -> None:
    with pytest.raises(InputError, match=r"mask: expected bool \[1, 2\], got torch.float32"):
        RankAttention(8, 2).attend(torch.zeros(1, 2, 8), torch.zeros(1, 1, 8), torch.ones(1, 2))
