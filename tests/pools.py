"""What the tests of pools share: parameters that hide nothing, and attention written out in full."""

from typing import TypeVar

import torch
from torch import Tensor, nn

P = TypeVar("P", bound=nn.Module)

QUICK_SETTINGS = {"last-layer-trainable": {"latents": 8, "heads": 4}, "gramian": {"branches": 2}}
"""Of pools whose defaults are wide enough, or repeat themselves often enough, to take a test of seconds to minutes."""


def shaken(pool: P, seed: int = 0) -> P:
    """The pool in float64 and eval mode, every parameter and running statistic drawn anew: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    pool = pool.double().eval()
    with torch.no_grad():
        for p in pool.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for name, b in pool.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator, dtype=torch.float64))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64))
    return pool


def randn(*shape: int) -> Tensor:
    """In float64, from PyTorch's own generator."""
    return torch.randn(*shape, dtype=torch.float64)


def features(batch: int = 2, tokens: int = 9, dim: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`(output [batch, queries, width], weights [batch, heads, queries, tokens])`, every token projected by the caller."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights
