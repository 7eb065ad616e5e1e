"""Experts that are all heads of attention but a few, and the gate between them.

Source: Peng et al. (2020), arXiv 2005.06537.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import real_tokens
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.mix.base import HeadGate


def expert_heads(heads: int, drop: int = 1) -> Bool[Tensor, "experts heads"]:
    """Which heads each expert has, all but `drop`: every choice once, in the order of `itertools.combinations`.

    With `drop` 1 the first expert is without the last head.

    Raises:
        InputError: where an expert would have no head.

    >>> expert_heads(3).int().tolist()
    [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    """
    require_at_least(1, heads=heads, drop=drop)
    if drop >= heads:
        raise InputError(f"drop: expected fewer than the {heads} heads, so that an expert has any, got {drop}")
    found = torch.zeros(len(list(combinations(range(heads), heads - drop))), heads, dtype=torch.bool)
    for expert, kept in enumerate(combinations(range(heads), heads - drop)):
        found[expert, list(kept)] = True
    return found


def head_factors(
    gates: Float[Tensor, "*batch experts"], members: Bool[Tensor, "experts heads"]
) -> Float[Tensor, "*batch heads"]:
    """`w_j = h / (h - m) sum of g_S over experts S that have head j`: the mixture of experts as a factor of each head.

    Their sum is `h` where the gates sum to 1; even gates give 1 to each head, which is plain attention.

    >>> head_factors(torch.tensor([0.25, 0.75]), expert_heads(2)).tolist()
    [0.5, 1.5]
    """
    return gates @ (members.to(gates) * members.shape[1] / members.sum(1, keepdim=True))


class ExpertGate(HeadGate):
    """`g = softmax(W2 tanh(W1 xbar + b1) + b2)`, `xbar` the mean of the tokens; even before it is trained.

    Args:
        dim: width of the tokens.
        heads: of attention.
        drop: heads that an expert is without.
        hidden: width in the middle (inferred).
        causal: the gate of a token reads the mean of it and those before it (inferred); else that of all.

    Example:
        >>> ExpertGate(8, heads=4)(torch.randn(2, 5, 8)).tolist()
        [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]

    Source: Peng et al. (2020), arXiv 2005.06537.
    """

    members: Bool[Tensor, "experts heads"]

    def __init__(self, dim: int, heads: int, *, drop: int = 1, hidden: int = 256, causal: bool = False) -> None:
        super().__init__()
        require_at_least(1, dim=dim, hidden=hidden)
        self.register_buffer("members", expert_heads(heads, drop), persistent=False)
        self.heads, self.drop, self.causal = heads, drop, causal
        self.hidden = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, len(self.members))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A random hidden layer under an even choice."""
        self.hidden.reset_parameters()
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads"] | Float[Tensor, "batch tokens heads"]:
        return head_factors(self.experts(x, mask), self.members)

    def experts(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch experts"] | Float[Tensor, "batch tokens experts"]:
        """How much each expert counts; of each token where it is causal."""
        return self.chosen(gate_input(x, mask, self.causal))

    def chosen(self, xbar: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch experts"]:
        """The same, of the mean that the gate reads."""
        return self.output(self.hidden(xbar).tanh()).softmax(-1)


def gate_input(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None, causal: bool = False
) -> Float[Tensor, "batch dim"] | Float[Tensor, "batch tokens dim"]:
    """What the gate reads: the mean of the real tokens, or of those up to each; 0 where there is none.

    >>> gate_input(torch.tensor([[[2.0], [4.0]]]), causal=True).tolist()
    [[[2.0], [3.0]]]
    """
    real = real_tokens(x, mask).unsqueeze(-1)
    kept = x.masked_fill(~real, 0.0)
    dtype = accumulation_dtype(x.dtype)
    total, count = (kept.cumsum(1, dtype=dtype), real.cumsum(1)) if causal else (kept.sum(1, dtype=dtype), real.sum(1))
    return (total / count.clamp(min=1)).to(x.dtype)
