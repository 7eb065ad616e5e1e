"""What every pool of the set kind is: many tokens in, few vectors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.requirements import require_dtype_of
from cenote.core.sets import Bags, PaddedTokens, Tokens, as_tokens
from cenote.pool.traits import Traits


class Pooled(NamedTuple):
    """A pooled batch and where it came from.

    Attributes:
        output: `[batch, out_dim]` or `[batch, k, out_dim]`.
        weights: what each output took from each token, `[batch, heads, tokens]` (`[heads, total]` for `Bags`);
            `None` where the method has no such numbers.
    """

    output: Float[Tensor, "batch *out"]
    weights: Float[Tensor, "*sets heads tokens"] | None


class Pool(Traits, ABC):
    """Base of the pools that map `[batch, tokens, dim]` or `Bags` to `[batch, out_dim]`.

    A pool defines `pool(tokens)`, written against the set algebra of `cenote.core.Tokens`, so that it holds for padded and
    ragged batches alike. Where its weights cost extra, it also defines `pool_only(tokens)` without them.

    Its `dim`, `out_dim`, `vectors` and what it says of itself are those of `cenote.pool.traits.Traits`.
    """

    method_kind: ClassVar[str] = "sets"

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "batch *out"]:
        """Pool `x` to `[batch, out_dim]`; `mask` is True on real tokens."""
        tokens = self._tokens(x, mask)
        return _zero_where_empty(tokens, self.pool_only(tokens))

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Pooled:
        """As calling the pool, and also what each output took from each token."""
        tokens = self._tokens(x, mask)
        output, weights = self.pool(tokens)
        return Pooled(_zero_where_empty(tokens, output), None if weights is None else tokens.heads_first(weights))

    def _tokens(self, x: Tensor | Tokens, mask: Tensor | None) -> Tokens:
        tokens = as_tokens(x, mask, self.dim)
        require_dtype_of(self, tokens.values)
        return tokens

    @abstractmethod
    def pool(self, tokens: Tokens) -> Pooled:
        """`Pooled(output, weights)` with weights still in the order `[*rows, heads]` of the tokens."""

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch *out"]:
        """The output alone; overridden where the weights would cost extra."""
        return self.pool(tokens).output


class QueryPool(Pool):
    """Base of the pools whose queries attend to the tokens by `cenote.core.cross_attention`, where weights cost extra."""

    @abstractmethod
    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        """As `pool`; without `need_weights` nothing is said about the weights."""

    def pool(self, tokens: Tokens) -> Pooled:
        return self.attended(tokens, need_weights=True)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch *out"]:
        return self.attended(tokens, need_weights=False).output


def _zero_where_empty(tokens: Tokens, output: Float[Tensor, "batch *out"]) -> Float[Tensor, "batch *out"]:
    if isinstance(tokens, PaddedTokens) and tokens.mask is None and tokens.values.shape[1] > 0:
        return output
    empty = tokens.lengths() == 0
    return output.masked_fill(empty.view(-1, *[1] * (output.dim() - 1)), 0)


class PaddedPool(Pool):
    """Base of the pools that need the padded form (tokens attend to each other, or stand on a grid).

    A ragged batch is cut into groups of similar length, each padded on its own: at most `1 + 1/8` times its real tokens.

    Args:
        dim: width of a token.
        out_dim: width of an output vector; default `dim`.
    """

    @abstractmethod
    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        """As `pool`, of padded sets."""

    def padded_only(self, tokens: PaddedTokens) -> Float[Tensor, "batch *out"]:
        """The output of padded sets alone; overridden where the weights would cost extra."""
        return self.pool_padded(tokens).output

    def pool(self, tokens: Tokens) -> Pooled:
        return self._grouped(tokens, self.pool_padded)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch *out"]:
        return self._grouped(tokens, lambda padded: Pooled(self.padded_only(padded), None)).output

    def _grouped(self, tokens: Tokens, pool_padded: Callable[[PaddedTokens], Pooled]) -> Pooled:
        if isinstance(tokens, PaddedTokens):
            return pool_padded(tokens)
        assert isinstance(tokens, Bags)
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        groups = similar_lengths(tokens.lengths().tolist())
        for group in groups:
            bags = tokens.select(torch.tensor(group, device=tokens.values.device))
            padded = PaddedTokens(*bags.to_padded())
            output, w = pool_padded(padded)
            outputs.append(output)
            if w is not None:
                assert padded.mask is not None
                weights.append(w[padded.mask])
        order = torch.tensor([i for group in groups for i in group], device=tokens.values.device)
        back = order.argsort()
        output = torch.cat(outputs)[back]
        if not weights:
            return Pooled(output, None)
        by_group = Bags(torch.cat(weights), torch.nn.functional.pad(tokens.lengths()[order].cumsum(0), (1, 0)))
        return Pooled(output, by_group.select(back).values)


def similar_lengths(lengths: list[int], slack: float = 1 / 8, worth_a_call: int = 512) -> list[list[int]]:
    """Indices grouped by length: few calls on short sets, little padding on long ones.

    A group takes a longer set where that has at most `1 + slack` times the tokens of the group's shortest, or where the group
    then holds at most `worth_a_call` padded tokens, which cost less than another call.

    >>> similar_lengths([3, 40, 20, 5000, 2900, 2600])
    [[0, 2, 1], [5, 4], [3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    tokens = 0
    for i in order:
        padded = len(groups[-1]) * lengths[i] - tokens if groups else 0
        if groups and (lengths[i] <= lengths[groups[-1][0]] * (1 + slack) or padded <= worth_a_call):
            groups[-1].append(i)
            tokens += lengths[i]
        else:
            groups.append([i])
            tokens = lengths[i]
    return groups
