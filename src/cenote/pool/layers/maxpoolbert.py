"""MaxPoolBERT and its two parts: [CLS] over the last layers, and [CLS] as the query of one more attention.

Source: "MaxPoolBERT: Enhancing BERT Classification via Layer- and Token-Wise Aggregation", 2025.

Note:
    The defaults of `last` and `heads` are those of a third-party implementation (ModChemBERT); the paper's own were not
    available to us, nor its authors' code.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.attention import cross_attention
from cenote.core.errors import InputError
from cenote.core.masks import first_tokens, real_tokens
from cenote.core.requirements import require_one_of, require_rate
from cenote.core.sets import PaddedTokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.layers.base import LayerPool, LayersPooled, layer_tokens


class MaxCLS(LayerPool):
    """Largest value of each channel of the [CLS] token over the last layers.

    `y_c = max_{l > L - k} h_l,cls,c`; with `k = 1` the [CLS] of the last layer.

    The weight of a layer is the share of channels whose maximum it holds (ties share equally).

    Args:
        dim: width of a token.
        last: `k`, number of last layers that take part.

    Raises:
        InputError: where the stack has fewer layers than `last`.

    Example:
        >>> MaxCLS(1, last=2)(torch.tensor([9.0, 3.0, 5.0, 0.0, 4.0, 0.0]).view(1, 3, 2, 1)).tolist()
        [[5.0]]

    Source: "MaxPoolBERT: Enhancing BERT Classification via Layer- and Token-Wise Aggregation", 2025.
    """

    permutation_invariant = False
    reads_cls = True

    def __init__(self, dim: int, last: int = 3) -> None:
        super().__init__(dim)
        if last < 1:
            raise InputError(f"last: expected how many of the last layers take part, at least 1, got {last}")
        self.last = self.min_layers = last

    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        output = self.pool_only(x, mask)
        cls = layer_tokens(x, mask).token(0).unflatten(0, x.shape[:2])
        first = first_tokens(real_tokens(x, mask, tokens=2)).to(x.dtype)
        weights = torch.einsum("bl,bn->bln", winners(cls, self.last), first)
        return LayersPooled(output, weights.unsqueeze(1))

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        return layer_tokens(x[:, -self.last :], mask).token(0).unflatten(0, (x.shape[0], self.last)).amax(1)


class CLSAttention(LayerPool):
    """One more multi-head attention with [CLS] as its query, over the tokens of the last layer.

    `q = W_q h_L,cls + b_q`, `k_n = W_k h_Ln + b_k`, `v_n = W_v h_Ln + b_v`, per head
    `a = softmax_n(q . k_n / sqrt(dim/heads))`; `y = W_o [sum_n a_n v_n] + b_o`. [CLS] attends to itself too.

    Args:
        dim: width of a token.
        heads: attention heads; default 4, or the largest divisor of `dim` below.
        dropout: of the attention weights.
        residual: whether the query's [CLS] is added to `y`.
        norm: whether `y` is layer-normalised: the maximum of several layers is not centred, and a fresh classifier sees it.

    Example:
        >>> CLSAttention(16)(torch.randn(2, 6, 5, 16)).shape
        torch.Size([2, 16])

    Source: "MaxPoolBERT: Enhancing BERT Classification via Layer- and Token-Wise Aggregation", 2025 (its variant "MHA").

    Note:
        `residual` and `norm` are ours, off as in the paper.
    """

    permutation_invariant = False
    reads_cls = True
    inert_parameters = ("to_k.bias",)

    def __init__(
        self, dim: int, heads: int | None = None, dropout: float = 0.0, residual: bool = False, norm: bool = False
    ) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 4) if heads is None else heads
        require_divides("heads", self.heads, dim)
        require_rate(dropout=dropout)
        self.residual = residual
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim) if norm else None

    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        output, by_token = self.attended(x[:, -1], mask)
        return LayersPooled(output, F.pad(by_token.unsqueeze(2), (0, 0, x.shape[1] - 1, 0)))

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        return self.attended(x[:, -1], mask)[0]

    def attended(
        self, m: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch heads tokens"]]:
        """`(y, weights)` of the attention over the tokens `m`, the first of which asks."""
        tokens = PaddedTokens(m, mask)
        cls = tokens.token(0)
        attended, weights = cross_attention(
            tokens,
            self.to_q(cls).unsqueeze(1),
            key=self.to_k,
            value=self.to_v,
            heads=self.heads,
            map_weights=self.dropout,
        )
        y = self.to_out(attended.squeeze(1))
        y = y + cls if self.residual else y
        return y if self.norm is None else self.norm(y), tokens.heads_first(weights)


class MaxPoolBERT(CLSAttention):
    """Largest value over the last layers, token by token, then one attention with the resulting [CLS] as its query.

    `m_nc = max_{l > L - k} h_lnc`, then as `CLSAttention` over `m`.

    The weight of a layer's token is the attention to it times the share of its channels whose maximum the layer holds.

    Args:
        dim: width of a token.
        last: `k`, number of last layers that take part.
        heads: attention heads; default 4, or the largest divisor of `dim` below.
        dropout: of the attention weights.
        residual: whether `m_cls` is added to the output.
        norm: whether the output is layer-normalised.
        over: `"max"`, or `"mean"`: the mean of the layers in place of the maximum (the variant "MeanSeq+MHA").

    Raises:
        InputError: where the stack has fewer layers than `last`.

    Example:
        >>> output, weights = MaxPoolBERT(16).attend(torch.randn(2, 6, 5, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 4, 6, 5]))

    Source: "MaxPoolBERT: Enhancing BERT Classification via Layer- and Token-Wise Aggregation", 2025 (its variant "MaxSeq+MHA").

    Note:
        A third-party implementation lets every token ask and averages the answers of T copies of [CLS]; they are equal, so one
        asks here.
    """

    over: Literal["max", "mean"] = "max"

    def __init__(
        self,
        dim: int,
        last: int = 3,
        heads: int | None = None,
        dropout: float = 0.0,
        residual: bool = False,
        norm: bool = False,
        over: Literal["max", "mean"] = "max",
    ) -> None:
        super().__init__(dim, heads, dropout, residual, norm)
        if last < 1:
            raise InputError(f"last: expected how many of the last layers take part, at least 1, got {last}")
        require_one_of(("max", "mean"), over=over)
        self.last = self.min_layers = last
        self.over = over

    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        output, by_token = self.attended(self.over_layers(x), mask)
        if self.over == "mean":
            late = torch.arange(x.shape[1], device=x.device) >= x.shape[1] - self.last
            shares = (late.to(x.dtype) / self.last).view(1, -1, 1).expand(x.shape[:3])
        else:
            shares = winners(x, self.last)
        return LayersPooled(output, torch.einsum("bln,bhn->bhln", shares, by_token))

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        return self.attended(self.over_layers(x), mask)[0]

    def over_layers(self, x: Float[Tensor, "batch layers tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """`m`, one value for each token and channel of the last layers."""
        late = x[:, -self.last :]
        return late.amax(1) if self.over == "max" else late.mean(1)


def winners(x: Float[Tensor, "batch layers *tokens dim"], last: int) -> Float[Tensor, "batch layers *tokens"]:
    """The share of channels whose maximum over the last layers each layer holds; 0 in layers that take no part."""
    late = x[:, -last:]
    holds = (late == late.amax(1, keepdim=True)).to(x.dtype)
    share = (holds / holds.sum(1, keepdim=True)).mean(-1)
    return torch.cat([share.new_zeros((x.shape[0], x.shape[1] - last, *share.shape[2:])), share], 1)
