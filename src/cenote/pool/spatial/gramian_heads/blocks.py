from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.attention import cross_attention
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides

MLP_GROUPS = 4


class ClassAttention(nn.Module):
    """A class token attends to itself and all tokens in a narrow width, then passes a grouped perceptron.

    Args:
        dim: width of the tokens.
        dim_embed: inner width of the attention.
        heads: divides `dim_embed`.
        scale: first value of the factors on both branches.
    """

    def __init__(self, dim: int, dim_embed: int, heads: int, scale: float = 1e-4) -> None:
        super().__init__()
        require_divides("heads", heads, dim_embed)
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim_embed, bias=False)
        self.k = nn.Linear(dim, dim_embed, bias=False)
        self.v = nn.Linear(dim, dim_embed, bias=False)
        self.proj = nn.Linear(dim_embed, dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), scale))
        self.norm2 = nn.LayerNorm(dim)
        self.groups = largest_divisor(dim, MLP_GROUPS)
        self.fc1 = nn.Conv1d(dim, 4 * dim, 1, groups=self.groups)
        self.fc2 = nn.Conv1d(4 * dim, dim, 1, groups=self.groups)
        self.gamma2 = nn.Parameter(torch.full((dim,), scale))

    def forward(
        self, tokens: Tokens, z: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "*rows heads"]]:
        """The class token after the block, and the weights of the tokens."""
        output, weights = cross_attention(
            tokens,
            self.q(self.norm1(z)).unsqueeze(1),
            key=self.k,
            value=self.v,
            heads=self.heads,
            key_norm=self.norm1,
            value_norm=self.norm1,
            beside=z.unsqueeze(1),
        )
        z = z + self.gamma1 * self.proj(output.squeeze(1))
        hidden = F.gelu(self.fc1(self.norm2(z).unsqueeze(-1)))
        shuffled = hidden.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(1, 2)
        return z + self.gamma2 * self.fc2(shuffled).squeeze(-1), weights


class ConvNeXtBlock(nn.Module):
    """`x + gamma * Linear(GELU(Linear(LN(depthwise conv 7 x 7 of x))))`, of positions in rows.

    Args:
        dim: width.
        scale: first value of `gamma`.
    """

    def __init__(self, dim: int, scale: float = 1e-6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        """Refine a map of `grid = (height, width)`, given row by row."""
        y = self.conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return x + self.gamma * self.fc2(F.gelu(self.fc1(self.norm(y))))
