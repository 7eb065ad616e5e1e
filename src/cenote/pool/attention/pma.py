import torch
from torch import nn

from cenote.core.attention import Plan
from cenote.core.requirements import require_at_least
from cenote.core.sets import Tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.attention.set_attention import MAB, Variant
from cenote.pool.base import Pooled, QueryPool


class PMA(QueryPool):
    """Pooling by multihead attention: `k` learned seeds attend to the tokens and become the output.

    `PMA_k(x) = MAB(S, x)` with learned seeds `S [k, dim]`; with `ff_before`, `MAB(S, rFF(x))`.

    Args:
        dim: width of a token.
        seeds: number `k` of output vectors.
        heads, ln, variant: see `MAB`.
        ff_before: whether a row-wise feed-forward layer reads the tokens first, as the paper writes and the authors' code
            leaves out.
        plan: see `cenote.core.cross_attention`.

    Example:
        >>> output, weights = PMA(8, seeds=3).attend(torch.randn(2, 9, 8))
        >>> output.shape, weights.shape  # 4 heads of 3 seeds
        (torch.Size([2, 3, 8]), torch.Size([2, 12, 9]))

    Source: Lee et al., ICML 2019.
    """

    inert_parameters = ("mab.fc_k.bias",)

    def __init__(
        self,
        dim: int,
        seeds: int = 1,
        heads: int | None = None,
        ln: bool = False,
        variant: Variant = "code",
        ff_before: bool = False,
        plan: Plan = "auto",
    ) -> None:
        super().__init__(dim)
        require_at_least(1, seeds=seeds)
        self.vectors = seeds
        self.plan = plan
        self.S = nn.Parameter(torch.empty(1, seeds, dim))
        nn.init.xavier_uniform_(self.S)
        self.ff = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) if ff_before else None
        self.mab = MAB(dim, dim, dim, heads, ln, variant)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        if self.ff is not None:
            tokens = tokens.replace(tokenwise(self.ff, tokens.values))
        output, weights = self.mab.from_shared(self.S[0], tokens, self.plan, need_weights)
        return Pooled(output.squeeze(1) if self.vectors == 1 else output, weights)
