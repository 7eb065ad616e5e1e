"""What stands in masked slots, NaN included, reaches neither what real ones are given nor a gradient."""

# modules are made where a case is looked up, behind its seed
# ruff: noqa: B008

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cenote.mix.attention_survey.alignments import KernelAlignment
from cenote.mix.attention_survey.architectures import AttentionBlock, GraphAttention, MemoryNetwork
from cenote.mix.attention_survey.attention import CoAttention, GeneralAttention, MultiDimensionalAttention
from cenote.mix.autoint.model import FieldEmbeddings
from cenote.mix.gatv2.conv import GATv2Conv
from cenote.mix.local_attention_tkl.rivals import KNRM, TK, ConvKNRM, MatchPyramid
from cenote.mix.mixture_of_attentive_experts.attention import MixtureAttention
from cenote.mix.normalization_limits.measures import distance, distance_bound, expected_distance_bound, separable
from cenote.mix.ponet.mixer import pooled_views
from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.rank_in_attention.transformer import RankTransformer
from cenote.mix.sixteen_heads.gated import GatedAttention

MASK = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])
REAL = MASK.unsqueeze(-1)
BY_HEAD = MASK[:, None, :, None]
OTHER = torch.tensor([[True, False, True], [True, True, False]])
PAIRS = MASK[:, None] & MASK[:, :, None]
INDEX = torch.zeros(2, 5, dtype=torch.long)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


X, Y = drawn(2, 5, 4), drawn(2, 3, 4)
WEIGHTS = torch.softmax(drawn(2, 5).masked_fill(~MASK, -math.inf), -1)
VIEWS = (drawn(2, 2, 5, 2), drawn(2, 2, 5, 2) + 1, drawn(2, 2, 5, 2) - 1, X, X + 1)
# each of tensors with a masked slot, their masks, and what is made of them
CASES: dict[str, Callable[[], tuple[list[Tensor], list[Tensor], Callable[..., Tensor]]]] = {
    "gated": lambda: ([X], [MASK], lambda x, m=GatedAttention(4, 2): m.contexts(x, MASK)[BY_HEAD.expand(-1, 2, -1, 2)]),
    "mixture": lambda: ([X], [MASK], lambda x, m=MixtureAttention(4, 2): m.attend(x, mask=MASK).output[MASK]),
    "mixture memory": lambda: (
        [X, Y],
        [MASK, OTHER],
        lambda x, y, m=MixtureAttention(4, 2): m.attend(x, y, MASK, OTHER).output[MASK],
    ),
    "mixture heads": lambda: (
        [X],
        [MASK],
        lambda x, m=MixtureAttention(4, 2): m.head_outputs(x, mask=MASK)[BY_HEAD.expand(-1, 2, -1, 4)],
    ),
    "rank": lambda: ([X], [MASK], lambda x, m=RankAttention(4, 2, 2): m.attend(x, Y, MASK)),
    "rank transformer": lambda: ([X], [MASK], lambda x, m=RankTransformer(4, inner=4): m(x, MASK)[MASK]),
    "gatv2": lambda: ([X], [MASK], lambda x, m=GATv2Conv(4, 2, 2): m.dense(x, x, PAIRS).output[MASK]),
    "general": lambda: ([X], [MASK], lambda x, m=GeneralAttention(4): m(x, mask=MASK).context[MASK]),
    "general heads": lambda: ([X], [MASK], lambda x, m=GeneralAttention(4, heads=2): m(x, Y, mask=MASK).context),
    "general values": lambda: ([X], [MASK], lambda v, m=GeneralAttention(4): m(X, Y, v, MASK).context),
    "block": lambda: ([X], [MASK], lambda x, m=AttentionBlock(4): m(x, MASK)[MASK]),
    "graph": lambda: ([X], [MASK], lambda x, m=GraphAttention(4, 3): m(x, PAIRS)),
    "co": lambda: ([X, Y], [MASK, OTHER], lambda x, y, m=CoAttention(4): torch.cat(m(x, y, MASK, OTHER)[:2], -1)),
    "co mean": lambda: ([X, Y], [MASK, OTHER], lambda x, y, m=CoAttention(4, coarse="mean"): m(x, y, MASK, OTHER).x),
    "co fine": lambda: (
        [X, Y],
        [MASK, OTHER],
        lambda x, y, m=CoAttention(4, coarse=None): m(x, y, MASK, OTHER).x[OTHER],
    ),
    "multi-dimensional": lambda: ([X], [MASK], lambda x, m=MultiDimensionalAttention(4): m(x, MASK)[0]),
    "kernel": lambda: ([X], [MASK], lambda x: KernelAlignment(4, 4).attend(Y[:, None], x[:, None], x[:, None], MASK)),
    "memory": lambda: ([X], [MASK], lambda x, m=MemoryNetwork(4): m(Y[:, 0], x, MASK)[0]),
    "distance": lambda: ([WEIGHTS, X], [MASK, MASK], lambda a, x: distance(a, x, 2, MASK)),
    "aggregate": lambda: ([WEIGHTS, X], [MASK, MASK], lambda a, x: distance(a, x, 2, MASK, "aggregate")),
    "bound": lambda: ([WEIGHTS, X], [MASK, MASK], lambda a, x: distance_bound(a, x, 2, MASK)),
    "expected bound": lambda: ([WEIGHTS, X], [MASK, MASK], lambda a, x: expected_distance_bound(a, x, 2, MASK)),
    "separable": lambda: ([WEIGHTS, X], [MASK, MASK], lambda a, x: separable(a, x, 2, MASK).radius),
    "knrm": lambda: ([Y, X], [OTHER, MASK], lambda q, d, m=KNRM(): m(q, d, OTHER, MASK)),
    "conv-knrm": lambda: ([Y, X], [OTHER, MASK], lambda q, d, m=ConvKNRM(4, 2, 3): m(q, d, OTHER, MASK)),
    "tk": lambda: ([Y, X], [OTHER, MASK], lambda q, d, m=TK(4, heads=2, layers=1, hidden=4): m(q, d, OTHER, MASK)),
    "match-pyramid": lambda: (
        [Y, X],
        [OTHER, MASK],
        lambda q, d, m=MatchPyramid((2,), (2, 2), 3): m(q, d, OTHER, MASK),
    ),
    "fields": lambda: ([X[..., 0]], [MASK], lambda v, m=FieldEmbeddings(3, 2): m(INDEX, v, MASK)),
    "several": lambda: ([X[..., 0]], [MASK], lambda v, m=FieldEmbeddings(3, 2): m(INDEX[None], v[None], MASK[None])),
    "pooled views": lambda: (list(VIEWS), [MASK] * 5, lambda *v: pooled_views(*v, MASK, INDEX, product=True).output),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_in_masked_slots_reaches_nothing(case: str) -> None:
    torch.manual_seed(0)
    given, masks, function = CASES[case]()
    found = []
    for filled in (0.0, math.nan):
        tensors = [
            t.masked_fill(~(m if t.dim() == 2 else m[:, None, :, None] if t.dim() == 4 else m.unsqueeze(-1)), filled)
            for t, m in zip(given, masks, strict=True)
        ]
        for t in tensors:
            t.requires_grad_()
        y = function(*tensors)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), tensors)))
    for clean, dirty in zip(*found, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


def test_rows_that_read_each_its_own_share_vectors() -> None:
    causal = torch.ones(3, 5).tril().bool()
    weights = torch.softmax(drawn(3, 5).masked_fill(~causal, -math.inf), -1)
    x = X[0].index_fill(0, torch.tensor([3, 4]), math.nan)
    assert torch.equal(distance(weights, x, 1, causal), distance(weights, x.nan_to_num(), 1, causal))


def test_a_field_that_is_not_there_may_have_any_number() -> None:
    embed = FieldEmbeddings(3, 2)
    assert not embed(INDEX - 1, X[..., 0], torch.zeros_like(MASK)).any()
