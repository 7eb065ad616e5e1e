from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.requirements import require_one_of, require_positive
from cenote.pool.spatial.weighted import Cell, Grad, LeanWindowPool, Owned
from cenote.pool.spatial.windows import Size


class SoftPool(LeanWindowPool):
    """Each activation of a window weighted by its softmax over the window.

    `w_i = exp(a_i / t) / sum_j exp(a_j / t)`, `y = sum_i w_i a_i`, for each channel on its own; `t = 1` in the paper. Large
    `a / t` tends to the maximum, small to the mean. `dy/da_i = w_i (1 + (a_i - y) / t)`, which can be negative.

    Use `SoftPool1d`, `SoftPool2d` or `SoftPool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        weights: `"channel"`, or `"shared"`: one weight map for all channels, `w_i ~ sum_c exp(a_ic / t)`.
        grad: `"full"`, or `"weights"`: `dy/da_i = w_i`, the rule of the paper and of the authors' CUDA kernel.
        temperature: `t`.
        clamp_output: whether negative results become 0.

    Raises:
        InputError: where an argument is out of range or the input is no map that holds a window.

    Example:
        >>> round(SoftPool2d(2)(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])).item(), 3)
        2.493
        >>> SoftPool2d(3, stride=2)(torch.randn(2, 8, 9, 9)).shape
        torch.Size([2, 8, 4, 4])

    Source: Stergiou, Poppe, Kalliatakis, "Refining Activation Downsampling with SoftPool", ICCV 2021.

    Note:
        The authors do not subtract the maximum before `exp` and zero the windows that overflow; here no magnitude overflows.
        Their kernel misplaces results where `stride != kernel_size`; here every stride is right. Their fallback without CUDA
        is another function, `weights="shared"` with `clamp_output=True`. Temperature, padding and ceil mode are ours.
    """

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        weights: Literal["channel", "shared"] = "channel",
        grad: Grad = "full",
        temperature: float = 1.0,
        clamp_output: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, grad)
        require_one_of(("channel", "shared"), weights=weights)
        require_positive(temperature=temperature)
        self.weights = weights
        self.channels_apart = weights == "channel"
        self.temperature = temperature
        self.clamp_output = clamp_output
        self.keeps_constants = not clamp_output

    def finished(self, y: Cell) -> Cell:
        return y.clamp(min=0) if self.clamp_output else y

    def context(self, x: Float[Tensor, "batch channels *map"], cells: Sequence[Cell]) -> Cell:
        x = x.detach()
        if self.weights == "shared":
            return self.windows.mean(x)
        if self.windows.inside(x.shape[2:], x.device) is None:
            # on a CPU several times faster than max_pool2d, which also looks for the place of the maximum
            return functools.reduce(torch.maximum, (a.detach() for a in cells))
        return self.windows.max(x)

    def score(self, a: Cell, context: Cell) -> Owned:  # noqa: ARG002
        scaled = a if self.temperature == 1 else a / self.temperature
        return scaled if self.weights == "channel" else scaled.logsumexp(1, keepdim=True)

    def score_gradient(self, g: Owned, a: Cell, context: Cell) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        g = g if self.temperature == 1 else g / self.temperature
        return g if self.weights == "channel" else g * (a / self.temperature).softmax(1), None


class SoftPool1d(SoftPool):
    dims = 1


class SoftPool2d(SoftPool):
    dims = 2


class SoftPool3d(SoftPool):
    dims = 3
