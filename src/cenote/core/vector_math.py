"""Exponentials that are right from the first one on.

torch hands exponentials of contiguous CPU tensors to a vector library. Where the first call of a process ran on two threads at
once, it now and then came out wrong by up to 1e-4 (float32) or 1e-9 (float64): with torch 2.13.0 in 2 of 24 and in 15 of 110
processes. After one call on one thread none was (36 processes).
"""

from __future__ import annotations


def settle() -> None:
    """Have the library choose its way of computing before several threads ask it to."""
    import torch

    for dtype in (torch.float32, torch.float64):
        torch.zeros(1, dtype=dtype, device="cpu").exp()
