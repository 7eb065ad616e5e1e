"""Digests of what lies in memory."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_sha256(module: nn.Module) -> str:
    """Of a module's names and numbers, and of how it and its configuration write themselves: activations and the eps of norms
    are no weights.

    >>> weights_sha256(nn.ReLU()) == weights_sha256(nn.GELU())
    False
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(f"{type(module).__name__} {module!r} {getattr(module, 'config', '')!r}".encode())
    return digest.hexdigest()
