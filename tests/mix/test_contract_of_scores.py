"""Mixers made of scores, normalisers and posteriors keep the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cenote.mix.attention_survey.alignments import ALIGNMENTS, alignment
from cenote.mix.base import Mixer
from cenote.mix.contextual_position_encoding.scores import CoPE
from cenote.mix.marginal_attention.families import (
    ContiguousWindow,
    IndependentEdges,
    MultiHop,
    OneParentPerQuery,
    OneQueryPerInput,
    SpanningTrees,
    UncertainCount,
)
from cenote.mix.marginal_attention.layers import GraphPosterior, PosteriorAttention
from cenote.mix.normalisers import NORMALISERS
from cenote.mix.normalisers import normaliser as normaliser_named
from cenote.mix.position_scores import RelativeTable, Rotary
from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.scored_attention import ScoredAttention
from cenote.mix.token_aware_phase_attention.scores import TAPA, GeneralPhase
from cenote.testing import check_mixer

MIXERS: dict[str, Callable[[], Mixer]] = {
    "causal, grouped": lambda: ScoredAttention(8, 2, causal=True, kv_heads=1),
    "rank": lambda: RankAttention(8, 2, 3),
}
MANY: dict[str, Callable[[], Mixer]] = {
    "plain": lambda: ScoredAttention(8, 2),
    "cope": lambda: ScoredAttention(8, 2, CoPE(4, 5, "own"), causal=True),
    "cope of values": lambda: ScoredAttention(8, 2, CoPE(4, 5, "values", relative=4), causal=True),
    "tapa": lambda: ScoredAttention(8, 2, TAPA()),
    "general phase": lambda: ScoredAttention(8, 2, GeneralPhase(4), causal=True),
    "rotary": lambda: ScoredAttention(8, 2, Rotary(4)),
    "relative": lambda: ScoredAttention(8, 2, RelativeTable(4, 5), causal=True),
    "sparsemax": lambda: ScoredAttention(8, 2, normaliser="sparsemax"),
    "entmax": lambda: ScoredAttention(8, 2, normaliser="entmax15"),
    "scalable": lambda: ScoredAttention(8, 2, normaliser="scalable softmax"),
    "deep": lambda: ScoredAttention(8, 2, alignment("deep", 4)),
    "feature-based": lambda: ScoredAttention(8, 2, alignment("feature-based", 4)),
    "one parent": lambda: PosteriorAttention(8, OneParentPerQuery(), 2, prior="distances"),
    "one query": lambda: PosteriorAttention(8, OneQueryPerInput(), 2),
    "independent": lambda: PosteriorAttention(8, IndependentEdges(), 2),
    "window": lambda: PosteriorAttention(8, ContiguousWindow(), 2),
    "hops": lambda: PosteriorAttention(8, MultiHop(OneParentPerQuery(), 2), 2),
    "counts": lambda: PosteriorAttention(8, UncertainCount.at_most(2), 2),
    "graph": lambda: GraphPosterior(8, heads=2),
}


@pytest.mark.parametrize("name", MIXERS)
def test_the_contract_holds(name: str) -> None:
    torch.manual_seed(0)
    check_mixer(MIXERS[name]())


@pytest.mark.parametrize("normaliser", ["softmax", "sparsemax", "sigmoid", "self-adjusted softmax"])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_parameters_that_no_gradient_reaches_are_told(name: str, normaliser: str) -> None:
    torch.manual_seed(0)
    mixer = ScoredAttention(8, 2, alignment(name, 4), normaliser).double()
    with torch.no_grad():
        # apart from 0, where some activations have no gradient
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y = mixer(torch.randn(2, 7, 8, dtype=torch.float64))
    (y * torch.randn_like(y)).sum().backward()
    dead = {n for n, p in mixer.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-12}
    assert dead == set(mixer.inert_parameters)


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_say_whether_they_forget_the_level(name: str) -> None:
    scores = torch.tensor([[0.3, -0.4, 1.1, 0.2]], dtype=torch.float64)
    made = normaliser_named(name).eval()
    same = torch.allclose(made(scores), made(scores + 0.7))
    assert same == made.forgets_level


@pytest.mark.thorough("one of many scores, normalisers and families")
@pytest.mark.parametrize("name", MANY)
def test_the_contract_holds_of_all_others(name: str) -> None:
    torch.manual_seed(0)
    check_mixer(MANY[name]())


@pytest.mark.thorough("one of many scores, normalisers and families")
def test_the_contract_holds_but_for_what_cannot() -> None:
    torch.manual_seed(0)
    # one derivative inside of another is not exported; no gradient reaches what the largest score leaves out, and which one
    # is the largest hangs on the last digit
    for rooted in (False, True):
        check_mixer(PosteriorAttention(8, SpanningTrees(rooted), 2), leave_out=["export"])
    check_mixer(RankAttention(8, 2, 3, hard=True), leave_out=["gradients", "half precision"])
