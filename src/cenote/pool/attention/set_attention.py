"""The attention blocks of the Set Transformer: tokens in, tokens out."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.attention import Latents, Plan, cross_attention
from cenote.core.dense import dense_attention
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.sets import PaddedTokens, Tokens, as_tokens
from cenote.core.widths import largest_divisor, require_divides

Variant = Literal["code", "paper"]


class MAB(nn.Module):
    """Multihead attention block: queries attend to a set, then a row-wise feed-forward layer.

    With `Q = x W_q + b_q`, `K`, `V` likewise from `y`, and `A = softmax(Q_h K_h^T / sqrt(dim_v))` per head `h`:
    `H = LN(Q + concat_h A V_h)`, `MAB(x, y) = LN(H + ReLU(H W_o + b_o))`. `variant="paper"`:
    `H = LN(x + concat_h(A V_h) W_O)`, `MAB(x, y) = LN(H + W_2 ReLU(W_1 H))`.

    Args:
        dim_q, dim_k, dim_v: widths of queries, of the set, and of the result.
        heads: divides `dim_v`. Default 4, or the largest divisor below it.
        ln: whether the LayerNorms are there.
        variant: `"code"`, the authors' code, or `"paper"`, the equations of the paper (needs `dim_q == dim_v`).

    Example:
        >>> MAB(6, 5, 8)(torch.randn(2, 3, 6), torch.randn(2, 9, 5)).shape
        torch.Size([2, 3, 8])

    Source: Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.

    Note:
        The scores are scaled by the full width `dim_v`, not by the width of a head, in both variants. The paper leaves its
        row-wise layer open; two linear layers of width `dim_v` with a ReLU between them are taken for it.
    """

    def __init__(
        self,
        dim_q: int,
        dim_k: int,
        dim_v: int,
        heads: int | None = None,
        ln: bool = False,
        variant: Variant = "code",
    ) -> None:
        super().__init__()
        self.heads = largest_divisor(dim_v, 4) if heads is None else heads
        require_divides("heads", self.heads, dim_v)
        require_one_of(("code", "paper"), variant=variant)
        if variant == "paper" and dim_q != dim_v:
            raise InputError(
                f"variant: 'paper' adds the raw queries to the result, so their width {dim_q} must be {dim_v}; "
                f"make the widths equal or take 'code'"
            )
        self.variant = variant
        self.scale = dim_v**-0.5
        self.fc_q = nn.Linear(dim_q, dim_v)
        self.fc_k = nn.Linear(dim_k, dim_v)
        self.fc_v = nn.Linear(dim_k, dim_v)
        self.merge = nn.Linear(dim_v, dim_v) if variant == "paper" else None
        self.ln0 = nn.LayerNorm(dim_v) if ln else None
        self.fc_o = nn.Linear(dim_v, dim_v)
        self.fc_2 = nn.Linear(dim_v, dim_v) if variant == "paper" else None
        self.ln1 = nn.LayerNorm(dim_v) if ln else None

    def forward(
        self,
        x: Float[Tensor, "batch queries dim_q"],
        y: Float[Tensor, "batch tokens dim_k"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim_v"]:
        """`MAB(x, y)`; `mask` is True on real tokens of `y`, of which an empty set has none to attend to."""
        tokens = as_tokens(y, mask, self.fc_k.in_features)
        query = self.fc_q(x)
        attended = dense_attention(
            query, self.fc_k(tokens.values), self.fc_v(tokens.values), self.heads, self.scale, mask
        )
        return self._feed_forward(x, query, attended)

    def from_shared(
        self, x: Float[Tensor, "queries dim_q"], tokens: Tokens, plan: Plan = "auto", need_weights: bool = True
    ) -> Latents:
        """`MAB(x, y)` and its weights, with queries that all sets share: see `cenote.core.cross_attention`."""
        query = self.fc_q(x)
        attended = cross_attention(
            tokens,
            query,
            key=self.fc_k,
            value=self.fc_v,
            heads=self.heads,
            scale=self.scale,
            plan=plan,
            need_weights=need_weights,
        )
        return Latents(self._feed_forward(x, query, attended.output), attended.weights)

    def _feed_forward(self, x: Tensor, query: Tensor, attended: Tensor) -> Float[Tensor, "batch queries dim_v"]:
        h = query + attended if self.merge is None else x + self.merge(attended)
        h = h if self.ln0 is None else self.ln0(h)
        row = torch.relu(self.fc_o(h))
        h = h + (row if self.fc_2 is None else self.fc_2(row))
        return h if self.ln1 is None else self.ln1(h)


class SAB(nn.Module):
    """Set attention block, `SAB(x) = MAB(x, x)`: all tokens attend to all, at a cost quadratic in their number.

    Args:
        dim_in, dim_out: widths of the tokens before and after.
        heads, ln, variant: see `MAB`.

    Example:
        >>> SAB(6, 8)(torch.randn(2, 9, 6)).shape
        torch.Size([2, 9, 8])

    Source: Lee et al., ICML 2019.
    """

    def __init__(
        self, dim_in: int, dim_out: int, heads: int | None = None, ln: bool = False, variant: Variant = "code"
    ) -> None:
        super().__init__()
        self.mab = MAB(dim_in, dim_in, dim_out, heads, ln, variant)

    def forward(
        self, x: Float[Tensor, "batch tokens dim_in"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim_out"]:
        """The tokens after the block; padded slots hold zeros."""
        x = as_tokens(x, mask, self.mab.fc_q.in_features).values
        return PaddedTokens(self.mab(x, x, mask), mask).values


class ISAB(nn.Module):
    """Induced set attention block: tokens attend to a few learned points that attend to the tokens, at linear cost.

    `H = MAB(I, x)`, `ISAB(x) = MAB(x, H)` with `m` learned inducing points `I`.

    Args:
        dim_in, dim_out: widths of the tokens before and after.
        heads, ln, variant: see `MAB`.
        inducing: number `m` of inducing points.

    Example:
        >>> ISAB(6, 8, inducing=3)(torch.randn(2, 9, 6)).shape
        torch.Size([2, 9, 8])

    Source: Lee et al., ICML 2019.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        heads: int | None = None,
        inducing: int = 32,
        ln: bool = False,
        variant: Variant = "code",
    ) -> None:
        super().__init__()
        require_at_least(1, inducing=inducing)
        self.I = nn.Parameter(torch.empty(1, inducing, dim_out))
        nn.init.xavier_uniform_(self.I)
        self.mab0 = MAB(dim_out, dim_in, dim_out, heads, ln, variant)
        self.mab1 = MAB(dim_in, dim_out, dim_out, heads, ln, variant)

    def forward(
        self, x: Float[Tensor, "batch tokens dim_in"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim_out"]:
        """The tokens after the block; padded slots hold zeros."""
        tokens = as_tokens(x, mask, self.mab1.fc_q.in_features)
        induced, _ = self.mab0.from_shared(self.I[0], tokens, need_weights=False)
        return PaddedTokens(self.mab1(tokens.values, induced), mask).values
