from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.attention import Plan, Projection, cross_attention
from cenote.core.errors import InputError
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.base import Pooled, QueryPool

Query = int | Sequence[int] | None


class AdaptiveNoisePool(QueryPool):
    """Attention from a query that is made of the tokens themselves: what resembles it is averaged, the rest is noise.

    `q` is token `i`, the mean of chosen tokens, or the mean of all; `a = softmax_n((W_q q) . (W_k x_n) / sqrt(dim))` per
    head; `y = W_o concat_h (sum_n a_n W_v x_n)`, and for a single token `y + q`.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 8, or the largest divisor below it.
        query: `None`: the mean of all tokens; a number: that token (negative: counted from the last); several numbers: the
            mean of those tokens. A token that a set lacks counts as zero, or is left out of the mean.
        bias: whether the linear maps have biases.
        dropout_w, dropout_e: dropout of the weights and of the output, in training.
        plan: see `cenote.core.cross_attention`.

    Example:
        >>> output, weights = AdaptiveNoisePool(16, heads=4, query=0).attend(torch.randn(2, 9, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 4, 9]))

    Source: Brothers, "Robust Noise Attenuation via Adaptive Pooling of Transformer Outputs", ICML 2025.

    Note:
        The author calls the layer AdaPool, a name that another method had before. Scores are scaled by the full width, not
        by that of a head. In the author's code the mean query reads masked tokens too; here it does not.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        query: Query = None,
        bias: bool = False,
        dropout_w: float = 0.0,
        dropout_e: float = 0.0,
        plan: Plan = "auto",
    ) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 8) if heads is None else heads
        require_divides("heads", self.heads, dim)
        if query is not None and not isinstance(query, int) and not query:
            raise InputError("query: got an empty list; give token numbers, or None for the mean of all tokens")
        self.query = query if query is None or isinstance(query, int) else tuple(query)
        self.plan = plan
        self.permutation_invariant = query is None
        self.q = nn.Linear(dim, dim, bias)
        self.kv = nn.Linear(dim, 2 * dim, bias)
        self.out = nn.Linear(dim, dim, bias)
        self.dropout_w = nn.Dropout(dropout_w)
        self.dropout_e = nn.Dropout(dropout_e)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.query_of(tokens)
        key, value = self.kv.weight.chunk(2)
        key_bias, value_bias = (None, None) if self.kv.bias is None else self.kv.bias.chunk(2)
        attended, weights = cross_attention(
            tokens,
            self.q(query).unsqueeze(1),
            key=Projection(key, key_bias),
            value=Projection(value, value_bias),
            heads=self.heads,
            scale=self.dim**-0.5,
            plan=self.plan,
            map_weights=self.dropout_w if self.training and self.dropout_w.p > 0 else None,
            need_weights=need_weights,
        )
        y = self.dropout_e(self.out(attended.squeeze(1)))
        return Pooled(y + query if isinstance(self.query, int) else y, weights)

    def query_of(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        """The query of each set before its projection."""
        if self.query is None:
            return tokens.mean()
        if isinstance(self.query, int):
            return tokens.token(self.query)
        lengths = tokens.lengths()
        chosen = torch.stack([tokens.token(i) for i in self.query]).sum(0)
        present = torch.stack([lengths > i if i >= 0 else lengths >= -i for i in self.query]).sum(0)
        return chosen / present.clamp(min=1).unsqueeze(-1).to(chosen.dtype)


def attenuation_bound(tokens: int, signal: int, spread: float, margin: float) -> float:
    """How far an attention average can lie from the mean of the signal tokens, in units of the longest token.

    Of `N` tokens `k` are signal. If their scores lie within an interval of width `spread` and exceed every noise score by
    at least `margin`, then `|y - mean of the signal| <= (e^spread - 1 + 2 (N - k)/k e^-margin) max_n |x_n|`: the noise
    takes at most `(N - k)/k e^-margin` of the weight, and the signal shares the rest evenly up to factors `e^(+-spread)`.

    Example:
        >>> round(attenuation_bound(tokens=32, signal=8, spread=0.0, margin=10.0), 6)
        0.000272

    Source: Brothers, ICML 2025, for the setting; the paper's own constants may differ.
    """
    if not 1 <= signal <= tokens:
        raise InputError(f"signal: expected 1 to {tokens} of the tokens, got {signal}")
    scores = torch.tensor([spread, -margin], dtype=torch.float64)
    even, noise = scores.exp().tolist()
    return even - 1 + 2 * (tokens - signal) / signal * noise
