"""Multi-Layers Trainable Pooling and its one-layer form: learned latents look a stack up, and are averaged.

Source: Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.attention import cross_attention
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.sets import PaddedTokens, Tokens
from cenote.pool.attention.blocks import split_projection
from cenote.pool.base import Pool, Pooled
from cenote.pool.basic.positions import all_of
from cenote.pool.layers.base import LayerPool, LayersPooled, layer_tokens

WITHOUT_A_CHOICE = ("look_up.to_q.weight", "look_up.norm_latents.weight", "look_up.norm_latents.bias")
"""Parameters of the queries, which cannot change anything where the softmax goes over one vector."""


class TrainableLatents(nn.Module):
    """Cross-attention from learned latents `Z` to a set of vectors `H`, a feed-forward, and the mean of the latents.

    `A = W_o attention(W_q LN(Z), W_k LN(H), W_v LN(H)) + Z`, `A <- A + W_2 (u * gelu(g)) + b_2` with
    `[u; g] = W_1 LN(A) + b_1`, `y = mean_q A_q / ||mean_q A_q||`. No biases in the attention.

    Args:
        dim: width of the vectors, of the latents and of the output.
        latents: number of latents.
        heads: number of heads.
        head_dim: width of a head; default half of `dim`, the paper's 2048 of 4096.

    Note:
        The arguments of the authors' class carry the names the other way round; the latents are the queries.
    """

    def __init__(self, dim: int, latents: int = 768, heads: int = 32, head_dim: int | None = None) -> None:
        super().__init__()
        head_dim = max(1, dim // 2) if head_dim is None else head_dim
        require_at_least(1, dim=dim, latents=latents, heads=heads, head_dim=head_dim)
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.norm_latents = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff_norm = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, 8 * dim)
        self.ff_out = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tokens) -> Pooled:
        """`Pooled(output, weights)`, the weights `[*rows, heads]` averaged over the latents, as the output is."""
        key, value = split_projection(self.to_kv, 2)
        query = self.to_q(self.norm_latents(self.latents))
        attended, weights = cross_attention(
            tokens, query, key=key, value=value, heads=self.heads, key_norm=self.norm, value_norm=self.norm
        )
        a = self.to_out(attended) + self.latents
        u, gate = self.ff_in(self.ff_norm(a)).chunk(2, -1)
        a = a + self.ff_out(u * F.gelu(gate))
        return Pooled(F.normalize(a.mean(1), dim=-1), weights.unflatten(-1, (self.heads, -1)).mean(-1))


class MultiLayerTrainable(LayerPool):
    """One vector per layer with a learned layer embedding, looked up by trainable latents: a sentence from all layers.

    `H_l = pool_n h_ln + p_l`, then as `TrainableLatents`; the output has unit length.

    Args:
        dim: width of a token.
        layers: number of layers, without the output of the embeddings.
        tokens: `"last"`: the last real token speaks for a layer, as in a causal model; `"mean"`: the mean of its tokens, as in
            a bidirectional one.
        latents: number of latents.
        heads: number of heads.
        head_dim: width of a head; default half of `dim`. With the defaults and 4096 channels there are 1.3 billion
            parameters: give less to small models.
        use: numbers of the layers that are looked up, from 0; default all.

    Raises:
        InputError: where such a layer is not there.

    Example:
        >>> pool = MultiLayerTrainable(16, layers=6, latents=8, heads=2)
        >>> pool(torch.randn(2, 6, 5, 16)).norm(dim=-1).allclose(torch.ones(2))
        True

    Source: Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.

    Note:
        The last token is the last that the mask calls real; the authors pad on the left and take the last slot. Their mean
        leaves out every token equal to the padding token, which drops the end of the sequence where that is the same token.

        The paper's five designs, by name (`-small`: few latents, for models of a few hundred channels), are: of a causal model
        `last` (1), `last-token-trainable-small` (2) and `multi-layer-last-token-small` (3); of a bidirectional one
        `last-layer-trainable-small` (4) and `multi-layer-trainable-small` (5). Which of the two a model is, is the model's
        matter. `cenote.jobs.probe.across` has the paper's test of their differences, Wilcoxon's over data sets; `cenote probe`
        tests those on one data set, over its test items.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        tokens: Literal["last", "mean"] = "last",
        latents: int = 768,
        heads: int = 32,
        head_dim: int | None = None,
        use: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dim, layers)
        require_one_of(("last", "mean"), tokens=tokens)
        self.use = None if use is None else list(use)
        if self.use is not None and not (self.use and set(self.use) <= set(range(layers))):
            raise InputError(f"use: expected numbers of layers from 0 to {layers - 1}, got {self.use}")
        layers = layers if self.use is None else len(self.use)
        self.tokens = tokens
        self.permutation_invariant = tokens == "mean"
        self.layer_embedding = nn.Parameter(torch.randn(layers, dim))
        self.look_up = TrainableLatents(dim, latents, heads, head_dim)
        # over one layer the softmax is 1, whatever the scores
        self.inert_parameters = WITHOUT_A_CHOICE if layers == 1 else ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled by a version without the choice
        state.setdefault("use", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        output, by_layer = self._looked_up(x, mask)
        assert by_layer is not None
        by_token = self.token_weights(x, mask)
        if self.use is not None:
            every = by_layer.new_zeros((len(x), x.shape[1], by_layer.shape[-1]))
            by_layer = every.index_add(1, torch.tensor(self.use, device=x.device), by_layer)
        return LayersPooled(output, torch.einsum("blh,bn->bhln", by_layer, by_token))

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        return self._looked_up(x, mask).output

    def token_weights(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens"]:
        """What a layer's vector takes from each of its tokens."""
        tokens = PaddedTokens(x[:, 0], mask)
        return (tokens.uniform() if self.tokens == "mean" else all_of(tokens, tokens.lengths() - 1)).squeeze(-1)

    def _looked_up(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Pooled:
        x = x if self.use is None else x[:, self.use]
        per_layer = layer_tokens(x, mask)
        vectors = per_layer.mean() if self.tokens == "mean" else per_layer.token(-1)
        return self.look_up(PaddedTokens(vectors.unflatten(0, x.shape[:2]) + self.layer_embedding))


class LastLayerTrainable(Pool):
    """The tokens of one layer, looked up by trainable latents: what the paper compares its multi-layer pooling with.

    As `TrainableLatents` over the tokens themselves, without layer embeddings; the output has unit length.

    Args:
        dim: width of a token.
        latents: number of latents.
        heads: number of heads.
        head_dim: width of a head; default half of `dim`.
        last_only: look up the last real token alone, as with a causal model (design 2), instead of every token, as with a
            bidirectional one (design 4).

    Example:
        >>> LastLayerTrainable(16, latents=8, heads=2)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 16])

    Source: Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.

    Note:
        Padding is masked; the authors' bidirectional model feeds it in. With `last_only` the softmax goes over one key and is
        1: the attention is a linear map, to which the queries contribute nothing, and the weights are 1 on the last token.
    """

    def __init__(
        self,
        dim: int,
        latents: int = 768,
        heads: int = 32,
        head_dim: int | None = None,
        last_only: bool = False,
    ) -> None:
        super().__init__(dim)
        self.last_only = last_only
        self.permutation_invariant = not last_only
        self.look_up = TrainableLatents(dim, latents, heads, head_dim)
        self.inert_parameters = WITHOUT_A_CHOICE if last_only else ()

    def pool(self, tokens: Tokens) -> Pooled:
        if not self.last_only:
            return self.look_up(tokens)
        return Pooled(self.pool_only(tokens), all_of(tokens, tokens.lengths() - 1))

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        looked_up = PaddedTokens(tokens.token(-1).unsqueeze(1)) if self.last_only else tokens
        return self.look_up(looked_up).output
