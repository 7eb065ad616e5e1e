from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens, as_tokens
from cenote.core.widths import require_divides
from cenote.pool.attention.blocks import TokenBatchNorm
from cenote.pool.base import Pool, Pooled
from cenote.pool.spatial.gramian_heads.blocks import ClassAttention, ConvNeXtBlock


class GramianPool(Pool):
    """Several class tokens, each made from the Gramian of reduced features, that attend to all positions once.

    For each branch: `F = BN(W_c x + b_c)` of width `r`, `G = sum_n F_n F_n^T`, `t` its upper triangle with the diagonal,
    `z0 = BN(W_e t / |t| + b_e)` with `W_e` in groups; then class attention as in CaiT, in a narrow width:
    `z1 = z0 + gamma1 * Attn(LN(z0); LN([z0; x]))`, `z = z1 + gamma2 * MLP(LN(z1))`.

    Args:
        dim: width of a token.
        branches: `M`, number of class tokens.
        gram_dim: `r`. Default 192, or `dim` where that is smaller.
        groups: of `W_e`; divides `r (r + 1) / 2` and `dim`. Default 8, or the largest divisor of both below it.
        dim_embed: inner width of the attention.
        heads: attention heads; divides `dim_embed`.
        gram_layer: whether a ConvNeXt block refines `F`; then the input must be a `[batch, dim, height, width]` map, and the
            place of a token counts.

    Example:
        >>> output, weights = GramianPool(32, branches=3).attend(torch.randn(2, 32, 4, 4))
        >>> output.shape, weights.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 24, 16]))

    Source: Ryu, Han, Lim, "Gramian Attention Heads are Strong yet Efficient Vision Learners", ICCV 2023.

    Note:
        The class token attends to itself too, so that the weights of the tokens sum to less than 1. The authors divide `G` by
        its size before `t` is normalised, which cancels; the mask is ours.
    """

    inert_parameters = ("contraction.bias", "embedding.bias")

    def __init__(
        self,
        dim: int,
        branches: int = 5,
        gram_dim: int | None = None,
        groups: int | None = None,
        dim_embed: int = 128,
        heads: int = 8,
        gram_layer: bool = False,
    ) -> None:
        super().__init__(dim)
        require_at_least(1, branches=branches)
        r = min(192, dim) if gram_dim is None else gram_dim
        require_at_least(1, gram_dim=r)
        self.vectors = branches
        self.gram_dim = r
        size = r * (r + 1) // 2
        if groups is None:
            groups = next(g for g in range(8, 0, -1) if size % g == 0 and dim % g == 0)
        require_divides("groups", groups, size)
        require_divides("groups", groups, dim)
        # the branches side by side: one product reads the tokens once for all of them
        self.contraction = nn.Linear(dim, branches * r)
        self.contraction_norm = TokenBatchNorm(branches * r)
        self.gram_layers = nn.ModuleList(ConvNeXtBlock(r) for _ in range(branches)) if gram_layer else None
        self.embedding = nn.Conv1d(branches * size, branches * dim, 1, groups=branches * groups)
        self.embedding_norm = TokenBatchNorm(branches * dim)
        self.blocks = nn.ModuleList(ClassAttention(dim, dim_embed, heads) for _ in range(branches))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "batch *out"]:
        """Pool `x` to `[batch, branches, dim]`; `mask` is True on real tokens."""
        return super().forward(self._with_grid(x, mask))

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Pooled:
        """As calling the pool, and also what each head of each branch took from each token."""
        return super().attend(self._with_grid(x, mask))

    def pool(self, tokens: Tokens) -> Pooled:
        reduced = self.reduced(tokens)
        if self.gram_layers is not None:
            assert isinstance(tokens, _Grid)
            refined = [
                layer(f, tokens.grid) for layer, f in zip(self.gram_layers, self._by_branch(reduced), strict=True)
            ]
            reduced = tokens.replace(torch.cat(refined, -1)).values
        t = torch.cat([gramian(tokens, f) for f in self._by_branch(reduced)], -1).to(tokens.values.dtype)
        z0 = self._embedded(tokens, t)
        pairs = zip(self.blocks, z0.chunk(self.vectors, -1), strict=True)
        outputs, weights = zip(*(block(tokens, z) for block, z in pairs), strict=True)
        output = outputs[0] if self.vectors == 1 else torch.stack(outputs, 1)
        return Pooled(output, torch.cat(weights, -1))

    def reduced(self, tokens: Tokens) -> Float[Tensor, "*rows branches_r"]:
        """`F` of all branches side by side, zeros in padded slots."""
        f = self.contraction(tokens.values)
        return tokens.replace(self.contraction_norm.normalised(tokens, f)).values

    def _embedded(self, tokens: Tokens, t: Float[Tensor, "batch triangles"]) -> Float[Tensor, "batch branches_dim"]:
        z = self.embedding(t.unsqueeze(-1)).transpose(1, 2)
        if self.training and z.shape[0] < 2:
            raise InputError(
                "x: batch normalisation cannot train on one set; give at least two sets per batch, or call eval() first"
            )
        sets = PaddedTokens(z, (tokens.lengths() > 0).unsqueeze(1))
        return self.embedding_norm.normalised(sets, z).squeeze(1)

    def _by_branch(self, values: Float[Tensor, "*rows branches_r"]) -> tuple[Float[Tensor, "*rows r"], ...]:
        return values.chunk(self.vectors, -1)

    def _with_grid(self, x: Tensor | Tokens, mask: Tensor | None) -> Tokens:
        tokens = as_tokens(x, mask, self.dim)
        if self.gram_layers is None:
            return tokens
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise InputError(
                "x: a pool with gram_layer needs a [batch, dim, height, width] map, for its convolution needs neighbours; "
                "give the map or leave gram_layer out"
            )
        assert isinstance(tokens, PaddedTokens)
        return _Grid(tokens.values, tokens.mask, (x.shape[2], x.shape[3]))


class GramianHeads(nn.Module):
    """Several light classifiers on `GramianPool`; their mean is the answer.

    Args:
        dim: width of a token or channel of the last map.
        classes: number of classes.
        branches, gram_dim, groups, dim_embed, heads, gram_layer: see `GramianPool`.

    Example:
        >>> model = GramianHeads(32, classes=10, branches=3)
        >>> model(torch.randn(2, 32, 4, 4)).shape, model.logits(torch.randn(2, 32, 4, 4)).shape
        (torch.Size([2, 10]), torch.Size([2, 3, 10]))

    Source: as `GramianPool`.

    Note:
        The authors sum the logits of the branches where this takes their mean: the same class wins.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        branches: int = 5,
        gram_dim: int | None = None,
        groups: int | None = None,
        dim_embed: int = 128,
        heads: int = 8,
        gram_layer: bool = False,
    ) -> None:
        super().__init__()
        self.pool = GramianPool(dim, branches, gram_dim, groups, dim_embed, heads, gram_layer)
        self.classifiers = nn.ModuleList(nn.Linear(dim, classes) for _ in range(branches))

    def forward(
        self,
        x: Float[Tensor, "batch dim height width"] | Float[Tensor, "batch tokens dim"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
        branches: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Mean of the logits of all branches, or of those named."""
        logits = self.logits(x, mask)
        if branches is None:
            return logits.mean(1)
        if not branches or min(branches) < 0 or max(branches) >= logits.shape[1]:
            raise InputError(f"branches: expected numbers from 0 to {logits.shape[1] - 1}, got {list(branches)}")
        return logits[:, list(branches)].mean(1)

    def looks(
        self,
        x: Float[Tensor, "batch dim height width"] | Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "batch branches *tokens"]:
        """What each branch took from each token or place, mean over its attention heads."""
        weights = self.pool.attend(x, mask).weights
        assert weights is not None
        by_branch = weights.unflatten(1, (self.pool.vectors, -1)).mean(2)
        return by_branch.unflatten(2, x.shape[2:]) if x.dim() == 4 else by_branch

    def logits(
        self,
        x: Float[Tensor, "batch dim height width"] | Float[Tensor, "batch tokens dim"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "batch branches classes"]:
        """Logits of each branch, for `DecorrelationLoss`."""
        z = self.pool(x, mask)
        z = z.unsqueeze(1) if z.dim() == 2 else z
        return torch.stack([f(z[:, m]) for m, f in enumerate(self.classifiers)], 1)


def gramian(tokens: Tokens, f: Float[Tensor, "*rows r"]) -> Float[Tensor, "batch triangle"]:
    """Upper triangle, row by row with the diagonal, of `sum_n f_n f_n^T`, scaled to length 1 (0 where all is 0).

    >>> f = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    >>> (gramian(PaddedTokens(f), f) * torch.tensor(337.0).sqrt()).round().tolist()
    [[9.0, 0.0, 16.0]]
    """
    wide = f.to(accumulation_dtype(f.dtype))
    g = tokens.weighted_sum(wide, wide)
    i, j = torch.triu_indices(f.shape[-1], f.shape[-1], device=f.device)
    return F.normalize(g[:, i, j], eps=1e-12)


class _Grid(PaddedTokens):
    """Tokens that stand on a grid."""

    def __init__(self, values: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> None:
        super().__init__(values, mask)
        self.grid = grid
