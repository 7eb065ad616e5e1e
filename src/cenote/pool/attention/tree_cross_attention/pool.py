from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens
from cenote.pool.attention.tree_cross_attention.search import TreeCrossAttention
from cenote.pool.base import PaddedPool, Pooled

Order = Literal["projection", "none"]


class TreeCrossAttentionPool(PaddedPool):
    """Learned queries that each walk down a tree over the tokens, read some `log N` vectors, and become an output.

    `y_j = TCA(q_j; tree(x))`, see `TreeCrossAttention`. The weights are those of the tokens: what a query gave to the summary
    of a subtree is split among its tokens as the summary's means do.

    Args:
        dim: width of a token.
        queries: number of learned queries, each an output vector.
        heads, dim_feedforward, branch_factor, num_aggregation_layers, bptt: see `TreeCrossAttention`; here gradients
            reach the tokens by default.
        order: `"projection"`: tokens are sorted along a fixed random direction, so that their order does not matter;
            `"none"`: the tree stands on the sequence as it comes.

    Example:
        >>> pool = TreeCrossAttentionPool(16)
        >>> output, weights = pool.attend(torch.randn(2, 50, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 4, 50]))

    Source: Feng et al., "Tree Cross Attention", ICLR 2024.

    Note:
        The paper answers given queries; learned ones, as in its cited latent models, make a pool of it. The choices are
        trained by the attention that shares their parameters, without REINFORCE; `TreeObjective` has that.
    """

    def __init__(
        self,
        dim: int,
        queries: int = 1,
        heads: int | None = None,
        dim_feedforward: int | None = None,
        branch_factor: int = 2,
        num_aggregation_layers: int = 1,
        bptt: bool = True,
        order: Order = "projection",
    ) -> None:
        super().__init__(dim)
        require_at_least(1, queries=queries)
        require_one_of(("projection", "none"), order=order)
        self.vectors = queries
        self.permutation_invariant = order == "projection"
        tca = TreeCrossAttention(dim, heads, dim_feedforward, branch_factor, num_aggregation_layers, bptt)
        self.walk = _Walk(tca, queries, order)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        x, mask = tokens.values, tokens.mask
        wide = accumulation_dtype(x.dtype)
        if wide == x.dtype:
            output, weights = self.walk(x, mask)
        else:  # a rounding error that flips one choice would change all that is found below it
            state = {k: v.to(wide) for k, v in (*self.walk.named_parameters(), *self.walk.named_buffers())}
            output, weights = torch.func.functional_call(self.walk, state, (x.to(wide), mask))
        output = output.squeeze(1) if self.vectors == 1 else output
        return Pooled(output.to(x.dtype), weights.to(x.dtype))


class _Walk(nn.Module):
    """The learned queries, and the tree that they walk down."""

    direction: Tensor | None

    def __init__(self, tca: TreeCrossAttention, queries: int, order: Order) -> None:
        super().__init__()
        self.tca = tca
        self.queries = nn.Parameter(torch.randn(queries, tca.dim))
        fixed = torch.Generator().manual_seed(0)
        self.register_buffer("direction", torch.randn(tca.dim, generator=fixed) if order == "projection" else None)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch queries dim"], Float[Tensor, "batch tokens heads_queries"]]:
        tree = self.tca.build(x, mask, None if self.direction is None else x.detach() @ self.direction)
        found = self.tca.attend(self.queries.expand(len(x), -1, -1), tree)
        weights = self.tca.token_weights(found, tree, x.shape[1])
        return found.output, weights.transpose(1, 2).flatten(1, 2).transpose(1, 2)
