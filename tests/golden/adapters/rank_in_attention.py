import torch
from torch import Tensor

from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.rank_in_attention.theory import head_gram
from tests.golden.cases import Case, adapter


@adapter(
    "rank-in-attention",
    "SoftMultiheadAttention / HardMultiheadAttention / PerfectFullRank / OptimallyWeightedRandom.head_vs_head",
)
def all_of_them(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.config
    x, y = given["X"].mT, given["Y"].mT
    layer = RankAttention(config["dim"], config["rank"], config["nheads"]).to(x)
    layer.load_state_dict(
        {ours: case.params[theirs] for ours, theirs in (("query", "Q"), ("key", "K"), ("value_output", "VO"))}
    )
    soft = layer.attend(x, y)
    layer.hard = True
    gradient = torch.autograd.grad(soft.square().sum(), given["X"], retain_graph=True)[0]
    return {
        "out_soft": soft.mT,
        "out_hard": layer.attend(x, y).mT,
        "out_perfect": RankAttention.exact(config["dim"]).to(x).attend(x, y).mT,
        "head_gram": head_gram(given["Qs"].mT, given["Ks"].mT),
        "grad.X": gradient,
    }
