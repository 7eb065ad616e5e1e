"""The global view: all frames of a video as a few more tokens of a prompt.

Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025. The attention is the single
modality form of Schwartz et al., "Factor Graph Attention", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_rate
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.base import Pool, Pooled

Potential = Literal["unary", "agreement"]
POTENTIALS: tuple[Potential, ...] = get_args(Potential)


class FactorGraphAttention(Pool):
    """Attention by what a frame is on its own, and by how far it agrees with all frames.

    `u_n = w . relu(U x_n + b_U) + b_w`, `s_n = mean_m cos(X x_n + b_X, Y x_m + b_Y)`, `a = softmax_n(r_0 u_n + r_1 s_n)`,
    `y = sum_n a_n x_n`.

    The mean of the cosines is one scalar product with the mean of the second vectors, so that no frame meets another:
    `O(N dim^2)` where the table of all pairs costs `O(N^2 dim)` more.

    Args:
        dim: width of a frame.
        dropout: on `relu(U x_n + b_U)`, while training.
        always_dropout: drop also in eval mode, as the authors' code does, so that no two calls agree.
        potentials: which of `"unary"` and `"agreement"` the weights follow; none of them: the mean of the frames.

    Raises:
        InputError: where `dropout` is no share, or a potential unknown.

    Example:
        >>> output, weights = FactorGraphAttention(16).attend(torch.randn(2, 9, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 1, 9]))

    Source: "STA-V2A", ICASSP 2025; Schwartz et al., "Factor Graph Attention", CVPR 2019.

    Note:
        The authors' code takes no mask; here masked frames have no weight and are left out of the mean of the cosines.
        The bias `b_w` drops out of the softmax; it is kept so that published weights load.
    """

    potentials: tuple[Potential, ...] = POTENTIALS

    def __init__(
        self,
        dim: int,
        dropout: float = 0.5,
        always_dropout: bool = False,
        potentials: Sequence[Potential] = POTENTIALS,
    ) -> None:
        super().__init__(dim)
        require_rate(dropout=dropout)
        for potential in potentials:
            require_one_of(POTENTIALS, potentials=potential)
        self.potentials = tuple(potentials)
        self.inert_parameters = ("unary_score.bias", *self._unused())
        self.dropout = dropout
        self.always_dropout = always_dropout
        self.unary = nn.Linear(dim, dim)
        self.unary_score = nn.Linear(dim, 1)
        self.first = nn.Linear(dim, dim)
        self.second = nn.Linear(dim, dim)
        # as a convolution of two channels to one starts
        self.reduce = nn.Parameter(torch.empty(2).uniform_(-(2**-0.5), 2**-0.5))

    def pool(self, tokens: Tokens) -> Pooled:
        scores = torch.zeros_like(tokens.values[..., :1])
        if "unary" in self.potentials:
            scores = scores + self.reduce[0] * tokenwise(self.unary_potential, tokens.values)
        if "agreement" in self.potentials:
            scores = scores + self.reduce[1] * self.agreement(tokens)
        weights = tokens.softmax(scores)
        return Pooled(tokens.weighted_sum(weights).squeeze(1), weights)

    def _unused(self) -> tuple[str, ...]:
        unary = () if "unary" in self.potentials else ("unary.weight", "unary.bias", "unary_score.weight")
        maps = ("first", "second")
        agreement = (
            () if "agreement" in self.potentials else tuple(f"{m}.{p}" for m in maps for p in ("weight", "bias"))
        )
        return (*unary, *agreement, *(() if self.potentials else ("reduce",)))

    def unary_potential(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows 1"]:
        """What a frame is worth on its own, `u_n`."""
        hidden = torch.relu(self.unary(x))
        return self.unary_score(F.dropout(hidden, self.dropout, self.training or self.always_dropout))

    def agreement(self, tokens: Tokens) -> Float[Tensor, "*rows 1"]:
        """The mean cosine of each frame with all frames of its set, `s_n`."""
        first = tokenwise(lambda x: _directions(self.first(x)), tokens.values)
        mean = tokens.mean(tokenwise(lambda x: _directions(self.second(x)), tokens.values))
        return (first * tokens.spread(mean)).sum(-1, keepdim=True)


class StaV2aPrompt(Pool):
    """A video as a few more tokens of a prompt: one map, factor-graph attention, and a convolution along the channels.

    `z_n = W x_n + b`, `g = FactorGraphAttention(z)`, `y_k = sum_j c_kj shift(g, j - 1) + d_k` with a kernel of 3 channels.

    Args:
        dim: width of a frame; 512 in the paper.
        width: of a token of the prompt; `None`: `dim`. In the paper 1024, that of the text states.
        prompts: number of tokens, `k`.
        dropout, always_dropout, potentials: see `FactorGraphAttention`.

    Raises:
        InputError: where `prompts` or `width` is below 1, or `dropout` is no share.

    Example:
        >>> pool = StaV2aPrompt(512, width=1024)
        >>> pool(torch.randn(2, 40, 512)).shape
        torch.Size([2, 4, 1024])

    Source: "STA-V2A: Video-to-Audio Generation with Semantic and Temporal Alignment", ICASSP 2025.

    Note:
        The authors' code computes a GELU of the frames that it does not use; there is none here.
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        prompts: int = 4,
        dropout: float = 0.5,
        always_dropout: bool = False,
        potentials: Sequence[Potential] = POTENTIALS,
    ) -> None:
        super().__init__(dim, dim if width is None else width)
        if prompts < 1 or self.out_dim < 1:
            raise InputError(f"prompts, width: expected positive numbers, got {prompts} and {self.out_dim}")
        self.vectors = prompts
        self.fc = nn.Linear(dim, self.out_dim)
        self.attention = FactorGraphAttention(self.out_dim, dropout, always_dropout, potentials)
        self.inert_parameters = tuple(f"attention.{name}" for name in self.attention.inert_parameters)
        self.conv = nn.Conv1d(1, prompts, 3, padding=1)

    def pool(self, tokens: Tokens) -> Pooled:
        pooled, weights = self.attention.pool(tokens.replace(self.fc(tokens.values)))
        prompt = self.conv(pooled.unsqueeze(1))
        return Pooled(prompt.squeeze(1) if self.vectors == 1 else prompt, weights)


def _directions(x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1).to(x.dtype)
