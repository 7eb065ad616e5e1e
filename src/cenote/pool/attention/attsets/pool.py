from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.by_sets import by_sets
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens, as_tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.base import Pool, Pooled


class AttSets(Pool):
    """A weight for every token and every channel: one linear layer scores, a softmax over the tokens normalises.

    `c_n = W x_n + b`, `s_nd = exp(c_nd) / sum_m exp(c_md)`, `y_d = sum_n s_nd x_nd`; with `outputs = M` there are `M` such
    maps, their results side by side. The weights that `attend` gives are means over the channels, one row per map; the
    weights of single channels come from `channel_weights`.

    Args:
        dim: width of a token.
        outputs: number of maps `M`; the output has width `M * dim`.
        tanh: whether scores pass a tanh.

    Example:
        >>> pool = AttSets(8, outputs=2)
        >>> pool(torch.randn(3, 5, 8)).shape
        torch.Size([3, 16])
        >>> pool.channel_weights(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 2, 8])

    Source: Yang et al., "Robust Attentional Aggregation of Deep Feature Sets for Multi-view 3D Reconstruction", IJCV 2019.

    Note:
        The bias is shared by all tokens, so that without the tanh it drops out of the softmax.
    """

    def __init__(self, dim: int, outputs: int = 1, tanh: bool = False) -> None:
        super().__init__(dim, outputs * dim)
        require_at_least(1, outputs=outputs)
        self.outputs = outputs
        self.tanh = tanh
        self.score = nn.Linear(dim, outputs * dim)
        nn.init.xavier_uniform_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.inert_parameters = () if tanh else ("score.bias",)

    def pool(self, tokens: Tokens) -> Pooled:
        weights = self._weights(tokens)
        taken = weights.unflatten(-1, (self.outputs, self.dim)) * tokens.values.unsqueeze(-2)
        return Pooled(tokens.sum(taken.flatten(-2)), weights.unflatten(-1, (self.outputs, self.dim)).mean(-1))

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch outputs_dim"]:
        return by_sets(self._sums, tokens)

    def _sums(self, tokens: Tokens) -> Float[Tensor, "batch outputs_dim"]:
        """`sum_n e_n x_n / sum_n e_n` with `e_n = exp(c_n - max_m c_m)`: no normalised weight is made."""
        scores = self._scores(tokens)
        wide = accumulation_dtype(scores.dtype)
        shares = (scores - tokens.spread(tokens.max(scores.detach()))).to(wide).exp()
        taken = shares.unflatten(-1, (self.outputs, self.dim)) * tokens.values.unsqueeze(-2).to(wide)
        total = tokens.sum(shares).clamp(min=torch.finfo(wide).tiny)
        return (tokens.sum(taken.flatten(-2)) / total).to(tokens.values.dtype)

    def channel_weights(
        self,
        x: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim height width"] | Tokens,
        mask: Bool[Tensor, "batch *tokens"] | None = None,
    ) -> Float[Tensor, "*rows outputs dim"]:
        """`s [batch, tokens, outputs, dim]` (`[total, outputs, dim]` for `Bags`): over the tokens of a set they sum to 1."""
        return self._weights(as_tokens(x, mask, self.dim)).unflatten(-1, (self.outputs, self.dim))

    def _weights(self, tokens: Tokens) -> Float[Tensor, "*rows outputs_dim"]:
        return tokens.softmax(self._scores(tokens))

    def _scores(self, tokens: Tokens) -> Float[Tensor, "*rows outputs_dim"]:
        scores = tokenwise(self.score, tokens.values)
        return torch.tanh(scores) if self.tanh else scores


class AttSetsConv(nn.Module):
    """AttSets on feature maps or volumes: a convolution scores each view, the softmax runs over the views.

    `c_n = Conv(x_n)`, `s_n = softmax_n(c_n)` for every channel and place, `y = sum_n s_n x_n`.

    Args:
        channels: of the feature maps.
        outputs: number of maps `M`; the output has `M * channels` channels.
        space: 2 for maps, 3 for volumes.
        kernel_size: of the convolution, odd; its padding keeps the size.
        tanh: whether scores pass a tanh.

    Example:
        >>> AttSetsConv(4)(torch.randn(2, 6, 4, 5, 5)).shape  # 6 views
        torch.Size([2, 4, 5, 5])

    Source: Yang et al., IJCV 2019.

    Note:
        The authors' released code holds the fully connected form only; kernel size 3 and the padding are our choice.
    """

    def __init__(
        self,
        channels: int,
        outputs: int = 1,
        space: Literal[2, 3] = 2,
        kernel_size: int = 3,
        tanh: bool = False,
    ) -> None:
        super().__init__()
        if space not in (2, 3):
            raise InputError(f"space: expected 2 for maps or 3 for volumes, got {space}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size: expected an odd number, so that the size is kept, got {kernel_size}")
        self.channels = channels
        require_at_least(1, outputs=outputs)
        self.outputs = outputs
        self.space = space
        self.tanh = tanh
        conv = nn.Conv2d if space == 2 else nn.Conv3d
        self.score = conv(channels, outputs * channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.score.weight)
        assert self.score.bias is not None
        nn.init.zeros_(self.score.bias)

    def forward(
        self, x: Float[Tensor, "batch views channels *places"], mask: Bool[Tensor, "batch views"] | None = None
    ) -> Float[Tensor, "batch outputs_channels *places"]:
        """Pool `[batch, views, channels, (depth,) height, width]` over the views; `mask` is True on real views.

        Raises:
            InputError: where the shape is another one.
        """
        views = self._views(x, mask)
        taken = self._weights(x, views) * views.values.unsqueeze(2)
        return views.sum(taken.flatten(2)).unflatten(1, (self.outputs * self.channels, *x.shape[3:]))

    def channel_weights(
        self, x: Float[Tensor, "batch views channels *places"], mask: Bool[Tensor, "batch views"] | None = None
    ) -> Float[Tensor, "batch views outputs channels *places"]:
        """The weights of every view, channel and place; over the real views they sum to 1."""
        return self._weights(x, self._views(x, mask)).unflatten(-1, (self.channels, *x.shape[3:]))

    def _views(self, x: Tensor, mask: Tensor | None) -> PaddedTokens:
        if x.dim() != 3 + self.space or x.shape[2] != self.channels:
            places = "height, width" if self.space == 2 else "depth, height, width"
            raise InputError(f"x: expected [batch, views, {self.channels}, {places}], got shape {tuple(x.shape)}")
        views = as_tokens(x.flatten(2), mask)
        assert isinstance(views, PaddedTokens)
        return views

    def _weights(self, x: Tensor, views: PaddedTokens) -> Float[Tensor, "batch views outputs features"]:
        scores = self.score(views.values.unflatten(2, x.shape[2:]).flatten(0, 1))
        scores = torch.tanh(scores) if self.tanh else scores
        return views.softmax(scores.flatten(1).unflatten(0, x.shape[:2])).unflatten(2, (self.outputs, -1))
