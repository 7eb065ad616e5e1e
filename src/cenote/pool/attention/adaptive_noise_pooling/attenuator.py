from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import first_tokens, real_tokens
from cenote.core.sets import PaddedTokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.adaptive_noise_pooling.pool import AdaptiveNoisePool, Query
from cenote.pool.attention.blocks import MLP, SelfAttention, TransformerBlock
from cenote.pool.base import PaddedPool, Pool, Pooled
from cenote.pool.basic.cls import ClsPool
from cenote.pool.basic.max import MaxPool
from cenote.pool.basic.mean import MeanPool

Pooling = Literal["adaptive", "mean", "max", "token", "cls"]


class Attenuator(PaddedPool):
    """A transformer whose tokens are pooled by an adaptive query, or by a baseline: mean, max, first token, class token.

    `y = W_out pool(Transformer(W_in x + e))`, where `e` tells the first token from the others, if `query_embedding`.
    The weights are those of the pooling, on the encoded tokens; of `"cls"` what the learned token takes from each token in the
    last layer, the share of itself and its like left out.

    Args:
        dim: width of a token.
        out_dim: width of the output; default `hidden`. Without it nothing is projected after pooling.
        hidden: width inside; default `dim`. Where it differs, or with `project_in`, the tokens are projected first.
        pooling: `"adaptive"`, `"mean"`, `"max"`, `"token"`: the first token as encoded, or `"cls"`: the output of a
            learned token that stands before the others.
        query: of the adaptive pool, see `AdaptiveNoisePool`; 0 in the author's configurations.
        layers: number of transformer layers.
        heads: divides `hidden`. Default 8, or the largest divisor below it.
        ff: width of the feed-forward layers; default `4 * hidden`.
        query_embedding: whether two learned vectors tell the first token from the others.
        project_in: whether the tokens are projected; default: if `hidden` is not `dim`.
        norm_output: whether a LayerNorm follows the last layer.
        bias_attention, bias_ff: biases of the layers; `bias_ff` is also that of the projections in and out.
        bias_pool: biases of the adaptive pool.
        cls_tokens: number of learned tokens of `"cls"`, of which number `cls_index` is read.
        dropout_w, dropout_e, dropout_ff: dropout of attention weights, of attention outputs, of feed-forward outputs.

    Example:
        >>> Attenuator(8, out_dim=3, layers=2)(torch.randn(2, 32, 8)).shape
        torch.Size([2, 3])

    Source: Brothers, "Robust Noise Attenuation via Adaptive Pooling of Transformer Outputs", ICML 2025.

    Note:
        Linear maps and embeddings start from a normal distribution with standard deviation 0.02, as the author's model
        does when it is given a seed; the smaller start of output matrices in its transformer never takes effect there, for
        the model initialises everything again afterwards. The class token baseline of the author's code owns attention
        matrices that it never uses, for equal parameter counts; they are left out here.
    """

    permutation_invariant = False
    pairwise = True

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        hidden: int | None = None,
        pooling: Pooling = "adaptive",
        query: Query = 0,
        layers: int = 12,
        heads: int | None = None,
        ff: int | None = None,
        query_embedding: bool = True,
        project_in: bool | None = None,
        norm_output: bool = False,
        bias_attention: bool = False,
        bias_ff: bool = True,
        bias_pool: bool = False,
        cls_tokens: int = 1,
        cls_index: int = 0,
        dropout_w: float = 0.0,
        dropout_e: float = 0.0,
        dropout_ff: float = 0.0,
    ) -> None:
        hidden = dim if hidden is None else hidden
        super().__init__(dim, hidden if out_dim is None else out_dim)
        heads = largest_divisor(hidden, 8) if heads is None else heads
        require_divides("heads", heads, hidden)
        project_in = hidden != dim if project_in is None else project_in
        if not project_in and hidden != dim:
            raise InputError(f"project_in: width {dim} must be projected to hidden {hidden}; leave project_in out")
        self.proj_in = nn.Linear(dim, hidden, bias_ff) if project_in else None
        self.query_emb = nn.Embedding(2, hidden) if query_embedding else None
        self.layers = nn.ModuleList(
            TransformerBlock(
                hidden,
                # scores are scaled by the full width, as everywhere in the author's code
                SelfAttention(hidden, heads, bias_attention, bias_attention, hidden**-0.5, dropout_w, dropout_e),
                MLP(hidden, 4 * hidden if ff is None else ff, bias_ff, dropout=dropout_ff),
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden) if norm_output else None
        self.cls_token: nn.Parameter | None = None
        self.cls_index = cls_index
        self.head: Pool | None = None
        if pooling == "adaptive":
            self.head = AdaptiveNoisePool(hidden, heads, query, bias_pool, dropout_w, dropout_e)
        elif pooling == "mean":
            self.head = MeanPool(hidden)
        elif pooling == "max":
            self.head = MaxPool(hidden)
        elif pooling == "token":
            self.head = ClsPool(hidden)
        elif pooling == "cls":
            if not 0 <= cls_index < cls_tokens:
                raise InputError(
                    f"cls_index: expected the number of one of the {cls_tokens} learned tokens, got {cls_index}"
                )
            self.cls_token = nn.Parameter(torch.rand(1, cls_tokens, hidden))
        else:
            raise InputError(f"pooling: expected 'adaptive', 'mean', 'max', 'token' or 'cls', got {pooling!r}")
        self.proj_out = None if out_dim is None else nn.Linear(hidden, out_dim, bias_ff)
        self.apply(_small_normal)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        before, x, mask = self._encoded(tokens)
        if self.head is not None:
            y, weights = self.head.pool(PaddedTokens(x, mask))
        else:
            y, weights = x[:, self.cls_index], self._seen_by_cls(before, mask)
        return Pooled(y if self.proj_out is None else self.proj_out(y), weights)

    def padded_only(self, tokens: PaddedTokens) -> Float[Tensor, "batch out_dim"]:
        _, x, mask = self._encoded(tokens)
        y = x[:, self.cls_index] if self.head is None else self.head.pool_only(PaddedTokens(x, mask))
        return y if self.proj_out is None else self.proj_out(y)

    def _encoded(
        self, tokens: PaddedTokens
    ) -> tuple[
        Float[Tensor, "batch all_tokens hidden"],
        Float[Tensor, "batch all_tokens hidden"],
        Bool[Tensor, "batch all_tokens"] | None,
    ]:
        """What enters the last layer, what comes out at the end, and the mask of both, with the learned tokens."""
        x, mask = tokens.values, tokens.mask
        if self.proj_in is not None:
            x = self.proj_in(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(x.shape[0], self.cls_token.shape[1]), mask], 1)
        if self.query_emb is not None:
            real = real_tokens(x[:1] if mask is None else x, mask)  # without a mask one set speaks for all
            x = x + self.query_emb.weight[(~first_tokens(real)).long()]
        before = x
        for layer in self.layers:
            before, x = x, layer(x, mask)
        return before, x if self.norm is None else self.norm(x), mask

    def _seen_by_cls(
        self, x: Float[Tensor, "batch all_tokens dim"], mask: Bool[Tensor, "batch all_tokens"] | None
    ) -> Float[Tensor, "batch tokens heads"]:
        assert self.cls_token is not None
        learned = self.cls_token.shape[1]
        if not self.layers:
            return x.new_zeros((x.shape[0], x.shape[1] - learned, 1))
        last: TransformerBlock = self.layers[-1]  # type: ignore[assignment]
        maps = last.maps(x, mask, slice(self.cls_index, self.cls_index + 1))
        return maps.squeeze(2).transpose(1, 2)[:, learned:]


def _small_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
