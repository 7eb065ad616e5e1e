from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, as_tokens
from cenote.core.widths import largest_divisor
from cenote.pool.attention.tree_cross_attention.blocks import EncoderLayer, NormedAttention, NormedFeedForward
from cenote.pool.attention.tree_cross_attention.tree import Tree, leaf_tokens, tree_shape


class Retrieved(NamedTuple):
    """What each query read, and what it made of it.

    Attributes:
        output: `[batch, queries, dim]`.
        choices: `[batch, queries, levels]`, the child that was opened at each level.
        nodes: `[batch, queries, selected]`, numbers of the selected nodes within their levels, level 1 first, leaves last.
        seen: `[batch, queries, selected]`, True on the nodes that the attention ran over.
        weights: `[batch, queries, heads, selected]`, attention over the selected nodes, 0 where not seen.
        log_prob: `[batch, queries]`, log-probability of the choices under the policy.
        entropy: `[batch, queries]`, of the policy, mean over levels and heads.
    """

    output: Float[Tensor, "batch queries dim"]
    choices: Int[Tensor, "batch queries levels"]
    nodes: Int[Tensor, "batch queries selected"]
    seen: Bool[Tensor, "batch queries selected"]
    weights: Float[Tensor, "batch queries heads selected"]
    log_prob: Float[Tensor, "batch queries"]
    entropy: Float[Tensor, "batch queries"]

    def read(self) -> Int[Tensor, "batch queries"]:
        """Number of vectors that the attention of each query ran over; a full one runs over all tokens."""
        return self.seen.sum(-1)


class TreeCrossAttention(nn.Module):
    """Cross-attention that walks down a tree over the tokens and reads some `log N` vectors instead of `N`.

    The tokens are the leaves of a balanced tree; every other node is the mean of what one encoder layer makes of its
    children. A query `q` starts at the root. At each level it attends to the children, opens the one with the largest
    weight (mean over the heads) and keeps its siblings as they are; at the end it keeps the leaves. Over this set `S`:
    `e = Attention(LN(q), S) + LN(q)`, `y = FF(e + q)`. The choices use the same attention parameters.

    `S` has `(b - 1) k + P` vectors, with `k` the largest integer such that `b^k <= N - 1`, and `P = ceil(N / b^k)`. Sets of at
    most `b` tokens are read whole. Each selected vector is scored once, and none is projected.

    Args:
        dim: width of tokens and queries.
        heads: divides `dim`. Default 4, or the largest divisor below it.
        dim_feedforward: hidden width of the feed-forward layers; default `2 * dim`.
        branch_factor: children `b` of a node.
        num_aggregation_layers: encoder layers that read the children of a node; 0: a node is the mean of its children.
        bptt: whether gradients pass from a node to its children. Without it only the aggregator learns from them.

    Raises:
        InputError: where heads do not divide the width or there is less than 2 branches.

    Example:
        >>> tca = TreeCrossAttention(8)
        >>> tree = tca.build(torch.randn(2, 256, 8))
        >>> found = tca.attend(torch.randn(2, 5, 8), tree)
        >>> found.output.shape, found.read().unique().tolist()  # 9 of 256
        (torch.Size([2, 5, 8]), [9])

    Source: Feng, Tung, Hajimirsadeghi, Bengio, Ahmed, "Tree Cross Attention", ICLR 2024.

    Note:
        Their code leaves nodes without any token visible, as zero vectors that take attention; here nobody sees them. For
        sets of at most `b` tokens their code hides the best token. Only their pre-norm form is built: in their
        post-norm form the aggregator lacks a residual.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        dim_feedforward: int | None = None,
        branch_factor: int = 2,
        num_aggregation_layers: int = 1,
        bptt: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(2, branch_factor=branch_factor)
        require_at_least(0, num_aggregation_layers=num_aggregation_layers)
        self.dim = dim
        self.branch_factor = branch_factor
        self.bptt = bptt
        heads = largest_divisor(dim, 4) if heads is None else heads
        hidden = 2 * dim if dim_feedforward is None else dim_feedforward
        self.aggregator = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(num_aggregation_layers))
        self.query_model = NormedAttention(dim, heads)
        self.query_ff = NormedFeedForward(dim, hidden)

    def build(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        by: Float[Tensor, "batch tokens"] | None = None,
    ) -> Tree:
        """Organise the tokens of each set; built once, the tree serves any number of queries.

        Args:
            x: the tokens.
            mask: True on real tokens.
            by: numbers by which the tokens are sorted before they become leaves, so that neighbours share a subtree: a
                coordinate, or a random projection. `None`: they stay in their order.
        """
        tokens = as_tokens(x, mask, self.dim)
        assert isinstance(tokens, PaddedTokens)
        count = tokens.values.shape[1]
        if by is not None and by.shape != x.shape[:2]:
            raise InputError(
                f"by: expected one number per token, shape {tuple(x.shape[:2])}, got shape {tuple(by.shape)}"
            )
        key = torch.zeros(x.shape[:2], device=x.device) if by is None else by
        if mask is not None:
            key = key.masked_fill(~mask, float("inf"))
        order = key.sort(dim=1, stable=True).indices
        leaf, depth = leaf_tokens(count, self.branch_factor, order, None if mask is None else tokens.lengths())
        real = leaf >= 0
        place = leaf.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.dim)
        nodes = tokens.values.gather(1, place) if count else x.new_zeros(place.shape)
        levels, reals = [nodes.masked_fill(~real.unsqueeze(-1), 0)], [real]
        k, _ = tree_shape(count, self.branch_factor)
        for children in (leaf.shape[1] // self.branch_factor**k, *[self.branch_factor] * k):
            below, seen = levels[-1].unflatten(1, (-1, children)), reals[-1].unflatten(1, (-1, children))
            levels.append(self._aggregate(below, seen))
            reals.append(seen.any(-1))
        return Tree(tuple(levels[::-1]), tuple(reals[::-1]), leaf, depth)

    def forward(self, query: Float[Tensor, "batch queries dim"], tree: Tree) -> Float[Tensor, "batch queries dim"]:
        """What each query finds, always opening the child with the largest weight."""
        return self.attend(query, tree).output

    def attend(self, query: Float[Tensor, "batch queries dim"], tree: Tree, sample: bool = False) -> Retrieved:
        """As calling it, and what was read; `sample` draws the child to open from the weights, as training does."""
        self._require_query(query, tree)
        normed = self.query_model.norm(query)
        u = self.query_model.absorbed(normed)
        wide = accumulation_dtype(u.dtype)
        at = torch.zeros(query.shape[:2], dtype=torch.long, device=query.device)
        log_prob = torch.zeros(query.shape[:2], dtype=wide, device=query.device)
        entropy = torch.zeros_like(log_prob)
        choices, picked = [], []
        for level in range(1, tree.levels + 1):
            found = _Children.of(tree, level, at, u)
            by_head = _softmax(found.scores, found.real.unsqueeze(2))
            policy = by_head.mean(2)
            drawn = policy.detach()
            if sample:
                # the largest of w / Exp(1) is drawn with probability w
                drawn = drawn / torch.empty_like(drawn).exponential_().clamp(min=torch.finfo(wide).tiny)
            choice = drawn.argmax(-1, keepdim=True)
            # in a set without tokens there is nothing to choose
            taken_with = policy.gather(-1, choice).masked_fill(~found.real.any(-1, keepdim=True), 1)
            log_prob = log_prob + taken_with.squeeze(-1).clamp(min=torch.finfo(wide).tiny).log()
            entropy = entropy - (by_head * (by_head + 1e-9).log()).sum(-1).mean(-1)
            chosen = torch.arange(found.real.shape[-1], device=choice.device) == choice
            picked.append(found._replace(real=self.siblings_shown(found.real, chosen)))
            choices.append(choice.squeeze(-1))
            at = at * self.branch_factor + choices[-1]
        picked.append(_Children.of(tree, tree.levels + 1, at, u))
        seen = torch.cat([p.real for p in picked], -1)
        weights = _softmax(torch.cat([p.scores for p in picked], -1), seen.unsqueeze(2)).to(u.dtype)
        taken = weights @ torch.cat([p.values for p in picked], 2)
        output = self.query_ff(self.query_model.merged(taken) + normed + query)
        empty = at.new_zeros((*at.shape, 0))
        return Retrieved(
            output,
            torch.stack(choices, -1) if choices else empty,
            torch.cat([p.nodes for p in picked], -1),
            seen,
            weights,
            log_prob,
            entropy / tree.depth.clamp(min=1).unsqueeze(1),
        )

    def full(self, query: Float[Tensor, "batch queries dim"], tree: Tree) -> Float[Tensor, "batch queries dim"]:
        """The same attention over all tokens instead of a selection: what training compares with."""
        self._require_query(query, tree)
        return self.query_ff(self.query_model(query, tree.nodes[-1], tree.real[-1]) + query)

    def siblings_shown(
        self, real: Bool[Tensor, "batch queries children"], chosen: Bool[Tensor, "batch queries children"]
    ) -> Bool[Tensor, "batch queries children"]:
        """Which children of a level stay in the selected set: the chosen one makes way for its own children."""
        return real & ~chosen

    def token_weights(self, found: Retrieved, tree: Tree, tokens: int) -> Float[Tensor, "batch queries heads tokens"]:
        """The weight of each token: a node's weight goes to its real children in equal parts, as its mean takes them.

        Args:
            found: of `attend`.
            tree: the tree that was searched.
            tokens: number of token slots that it was built from.
        """
        carried = found.weights.new_zeros((*found.weights.shape[:3], 1))
        inner = tree.levels * self.branch_factor
        sizes = [*[self.branch_factor] * tree.levels, found.nodes.shape[-1] - inner]
        pieces = zip(found.weights.split(sizes, -1), found.nodes.split(sizes, -1), strict=True)
        for level, (piece, node) in enumerate(pieces, 1):
            real = tree.real[level]
            by_parent = real.unflatten(1, (carried.shape[-1], -1))
            share = by_parent / by_parent.sum(-1, keepdim=True).clamp(min=1)
            carried = (carried.unsqueeze(-1) * share[:, None, None].to(carried.dtype)).flatten(-2)
            carried = carried.scatter_add(-1, node.unsqueeze(2).expand_as(piece), piece)
        # empty leaves write beyond the last token
        place = torch.where(tree.tokens < 0, tokens, tree.tokens)[:, None, None].expand_as(carried)
        return carried.new_zeros((*carried.shape[:3], tokens + 1)).scatter_add(-1, place, carried)[..., :tokens]

    def routed(
        self, found: Retrieved, tree: Tree, wanted: Int[Tensor, "batch queries"]
    ) -> Bool[Tensor, "batch queries levels"]:
        """Whether the node that each query opened at a level holds the token that it wanted; the mean is routing accuracy.

        Args:
            found: of `attend`.
            tree: the tree that was searched.
            wanted: number of the token that answers each query. At levels where a smaller set has nothing to choose its
                queries are always right.

        Raises:
            InputError: where a wanted token is not in the tree.
        """
        is_it = tree.tokens.unsqueeze(1) == wanted.unsqueeze(-1)
        if not bool(is_it.any(-1).all()) or bool((wanted < 0).any()):
            raise InputError(f"wanted: expected numbers of real tokens, got {wanted.flatten().tolist()[:10]}")
        leaf, leaves = is_it.int().argmax(-1), tree.tokens.shape[1]
        at, right = torch.zeros_like(leaf), [leaf.new_zeros((*leaf.shape, 0), dtype=torch.bool)]
        for level in range(1, tree.levels + 1):
            at = at * self.branch_factor + found.choices[..., level - 1]
            right.append((leaf // (leaves // tree.nodes[level].shape[1]) == at).unsqueeze(-1))
        return torch.cat(right, -1)

    def _aggregate(
        self, children: Float[Tensor, "batch parents children dim"], real: Bool[Tensor, "batch parents children"]
    ) -> Float[Tensor, "batch parents dim"]:
        h, m = (children if self.bptt else children.detach()).flatten(0, 1), real.flatten(0, 1)
        for layer in self.aggregator:
            h = layer(h, m)
        wide = accumulation_dtype(h.dtype)
        total = h.masked_fill(~m.unsqueeze(-1), 0).to(wide).sum(1)
        return (total / m.sum(1, keepdim=True).clamp(min=1)).to(h.dtype).unflatten(0, children.shape[:2])

    def _require_query(self, query: Tensor, tree: Tree) -> None:
        batch = len(tree.tokens)
        if query.dim() != 3 or query.shape[0] != batch or query.shape[-1] != self.dim:
            raise InputError(f"query: expected [{batch}, queries, {self.dim}] for this tree, got {tuple(query.shape)}")


class _Children(NamedTuple):
    """The children of the node that each query stands on."""

    values: Float[Tensor, "batch queries children dim"]
    real: Bool[Tensor, "batch queries children"]
    nodes: Int[Tensor, "batch queries children"]
    scores: Float[Tensor, "batch queries heads children"]

    @classmethod
    def of(
        cls,
        tree: Tree,
        level: int,
        at: Int[Tensor, "batch queries"],
        u: Float[Tensor, "batch queries heads dim"],
    ) -> _Children:
        count = tree.nodes[level].shape[1] // tree.nodes[level - 1].shape[1]
        nodes = at.unsqueeze(-1) * count + torch.arange(count, device=at.device)
        flat = nodes.flatten(1)
        values = tree.nodes[level].gather(1, flat.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
        values = values.unflatten(1, nodes.shape[1:])
        real = tree.real[level].gather(1, flat).unflatten(1, nodes.shape[1:])
        scores = u.to(accumulation_dtype(u.dtype)) @ values.transpose(-1, -2).to(accumulation_dtype(u.dtype))
        return cls(values, real, nodes, scores)


def _softmax(
    scores: Float[Tensor, "batch queries heads selected"], seen: Bool[Tensor, "batch queries 1 selected"]
) -> Float[Tensor, "batch queries heads selected"]:
    hidden = ~seen
    return torch.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), -1).masked_fill(hidden, 0)
