from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.core.widths import largest_divisor
from cenote.pool.attention.tree_cross_attention.blocks import EncoderLayer
from cenote.pool.attention.tree_cross_attention.search import Retrieved, TreeCrossAttention
from cenote.pool.attention.tree_cross_attention.tree import Tree


class ReTreever(nn.Module):
    """Encoder, tree and Tree Cross Attention: many queries answered against one context that is encoded once.

    `z = Encoder(W_c c + b_c)`, `tree = build(z)`, `prediction_j = MLP(TCA(W_q q_j + b_q; tree))`.

    Args:
        context_dim, query_dim: widths of the context tokens and of the queries.
        out_dim: width of a prediction; twice the number of targets for the `"gaussian"` task of `TreeObjective`.
        dim: width inside.
        heads, dim_feedforward, branch_factor, num_aggregation_layers, bptt: see `TreeCrossAttention`.
        encoder_layers: layers in which all context tokens attend to all, at quadratic cost; 0: none ("constant").
        order: how the leaves are ordered: `"none"`, as the context comes (sequences); the number of a feature of the
            context, such as a coordinate; or `"projection"`, along a fixed random direction of the context features.

    Raises:
        InputError: where sizes do not fit or the order is unknown.

    Example:
        >>> model = ReTreever(context_dim=3, query_dim=2, out_dim=1, dim=16, encoder_layers=1, order=0)
        >>> context, queries = torch.rand(4, 32, 3), torch.rand(4, 7, 2)
        >>> model(context, queries).shape
        torch.Size([4, 7, 1])
        >>> tree = model.encode(context)  # once, for any number of questions
        >>> model.ask(queries, tree).read().unique().tolist()  # of 32
        [6]

    Source: Feng, Tung, Hajimirsadeghi, Bengio, Ahmed, "Tree Cross Attention", ICLR 2024.

    Note:
        Context and queries are embedded by one linear layer each; the embeddings differ between the paper's tasks.
    """

    direction: Tensor | None

    def __init__(
        self,
        context_dim: int,
        query_dim: int,
        out_dim: int,
        dim: int = 64,
        heads: int | None = None,
        dim_feedforward: int | None = None,
        encoder_layers: int = 6,
        branch_factor: int = 2,
        num_aggregation_layers: int = 1,
        bptt: bool = False,
        order: int | Literal["none", "projection"] = "none",
    ) -> None:
        super().__init__()
        if order not in ("none", "projection") and not (isinstance(order, int) and 0 <= order < context_dim):
            raise InputError(
                f"order: expected 'none', 'projection' or the number of a context feature below {context_dim}, got {order!r}"
            )
        if encoder_layers < 0:
            raise InputError(f"encoder_layers: expected 0 or more, got {encoder_layers}")
        heads = largest_divisor(dim, 4) if heads is None else heads
        hidden = 2 * dim if dim_feedforward is None else dim_feedforward
        self.order = order
        self.embed_context = nn.Linear(context_dim, dim)
        self.embed_query = nn.Linear(query_dim, dim)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(encoder_layers))
        self.tca = TreeCrossAttention(dim, heads, hidden, branch_factor, num_aggregation_layers, bptt)
        self.predictor = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, out_dim))
        fixed = torch.Generator().manual_seed(0)
        self.register_buffer("direction", torch.randn(context_dim, generator=fixed) if order == "projection" else None)

    def encode(
        self, context: Float[Tensor, "batch tokens context_dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Tree:
        """The tree over the encoded context; `mask` is True on real tokens."""
        tokens = as_tokens(context, mask, self.embed_context.in_features)
        assert isinstance(tokens, PaddedTokens)
        by = None
        if self.direction is not None:
            by = tokens.values.detach() @ self.direction
        elif isinstance(self.order, int):
            by = tokens.values[..., self.order].detach()
        z = self.embed_context(tokens.values)
        for layer in self.encoder:
            z = layer(z, mask)
        return self.tca.build(z, mask, by)

    def ask(self, queries: Float[Tensor, "batch queries query_dim"], tree: Tree, sample: bool = False) -> Retrieved:
        """What each query finds in the tree, and where; `sample` draws the way, as training does."""
        return self.tca.attend(self.embed_query(queries), tree, sample)

    def forward(
        self,
        context: Float[Tensor, "batch tokens context_dim"],
        queries: Float[Tensor, "batch queries query_dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries out_dim"]:
        """Predictions from what the tree search found."""
        return self.predictor(self.ask(queries, self.encode(context, mask)).output)

    def full(
        self,
        context: Float[Tensor, "batch tokens context_dim"],
        queries: Float[Tensor, "batch queries query_dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries out_dim"]:
        """Predictions from full cross-attention with the same parameters, the paper's baseline."""
        return self.predictor(self.tca.full(self.embed_query(queries), self.encode(context, mask)))
