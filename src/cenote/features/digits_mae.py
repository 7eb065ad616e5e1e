"""The small vision transformer behind the embedded data: 8 x 8 digits in, one [CLS] and 16 patch tokens out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

IMAGE, PATCH = 8, 2
GRID = IMAGE // PATCH
PATCHES = GRID * GRID
PIXELS = PATCH * PATCH


class Block(nn.Module):
    """A pre-norm transformer block: `x + attention(LN(x))`, then `x + MLP(LN(x))`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class DigitsEncoder(nn.Module):
    """The encoder of a masked autoencoder for scikit-learn's digits.

    Args:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads; divides `dim`.

    Example:
        >>> DigitsEncoder()(torch.rand(2, 8, 8)).shape
        torch.Size([2, 17, 64])

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
    """

    def __init__(self, dim: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, dim)
        self.position = nn.Parameter(torch.randn(PATCHES, dim) * 0.02)
        self.cls = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self, images: Float[Tensor, "batch 8 8"], keep: Int[Tensor, "batch kept"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens of images with pixels from 0 to 1: [CLS] first, then the patches row by row.

        Args:
            images: the digits.
            keep: the patches that the encoder may see, per image; default: all.
        """
        x = self.embed(patches(images)) + self.position
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def patches(images: Float[Tensor, "batch 8 8"]) -> Float[Tensor, "batch 16 4"]:
    """The 2 x 2 pixels of each patch, patches row by row."""
    return images.unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)
