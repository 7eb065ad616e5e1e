"""Run a module with tensors in the place of its parameters, for longer than one call."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def bind(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors where parameters and buffers of these names are, until others are put there.

    `torch.func.functional_call` takes its tensors away again when the call ends; what a checkpoint computes anew in the
    backward pass would then read the module's own parameters, and gradients would be wrong without a word.

    Example:
        >>> layer, weight = torch.nn.Linear(2, 1, bias=False), torch.ones(1, 2, requires_grad=True)
        >>> cenote.core.binding.bind(layer, {"weight": 3 * weight})(torch.ones(1, 2)).tolist()
        [[6.0]]
    """
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        place = owner._parameters if leaf in owner._parameters else owner._buffers
        place[leaf] = tensor  # type: ignore[assignment]
    return module
