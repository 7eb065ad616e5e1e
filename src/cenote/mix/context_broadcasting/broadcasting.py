"""Context broadcasting: every token is given the mean of all.

Source: Nam et al., "Scratching Visual Transformer's Back with Uniform Attention", ICCV 2023.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.mix.base import Mixer

START = 1e-5


class ContextBroadcasting(Mixer):
    """`y_i = (x_i + mean_j x_j) / 2` over the real tokens; no parameters.

    The mean of the tokens is kept and what sets each apart from it is halved, so that it belongs on a branch: on the residual
    stream, block after block, it would leave the mean alone.

    Args:
        running: whether each token is given the mean of those before it and itself, for causal models.

    Example:
        >>> ContextBroadcasting()(torch.tensor([[[0.0], [4.0]]])).flatten().tolist()
        [1.0, 3.0]

    Source:
        Nam et al. 2023, arXiv 2210.08457.

    Note:
        The factor 1/2 is inferred; the paper's method section was not at hand. So is the running mean.
    """

    order_matters = False

    def __init__(self, *, running: bool = False) -> None:
        super().__init__()
        self.running = self.causal = self.order_matters = running

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return (x + mean_of(x, mask, self.running)) / 2

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch 1 tokens tokens"]:
        mask, _ = self._checked(x, mask, positions)
        own = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        uniform = mask.to(x.dtype).unsqueeze(1).expand(-1, x.shape[1], -1)
        uniform = uniform.tril() if self.running else uniform
        uniform = uniform / uniform.sum(-1, keepdim=True).clamp(min=1)
        return ((own + uniform) / 2 * mask.unsqueeze(-1)).unsqueeze(1)


class ScaledContextBroadcasting(Mixer):
    """`y_i = x_i + lambda * mean_j x_j` with a factor per channel, from almost 0 on.

    Args:
        dim: width of a token.
        start: first value of the factors.
        running: as of `ContextBroadcasting`.

    Source:
        Nam et al. 2023, arXiv 2210.08457.

    Note:
        The first value is inferred.
    """

    order_matters = False

    def __init__(self, dim: int, start: float = START, *, running: bool = False) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        self.dim = dim
        self.running = self.causal = self.order_matters = running
        self.scale = nn.Parameter(torch.full((dim,), start))

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return x + self.scale * mean_of(x, mask, self.running)


class SqueezeExcitation(Mixer):
    """`y_i = x_i * sigmoid(W_2 relu(W_1 mean_j x_j))`: a heavier way to tell each token of all.

    Args:
        dim: width of a token.
        ratio: of the width to the hidden one.

    Source:
        Hu et al. 2018, arXiv 1709.01507.
    """

    order_matters = False

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        require_at_least(1, dim=dim, ratio=ratio)
        self.dim = dim
        self.squeeze = nn.Linear(dim, max(dim // ratio, 1))
        self.excite = nn.Linear(max(dim // ratio, 1), dim)

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return x * self.excite(self.squeeze(mean_of(x, mask)).relu()).sigmoid()


def mean_of(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"], running: bool = False
) -> Float[Tensor, "batch tokens_or_1 dim"]:
    """The mean of the real tokens, or of those up to each; `x` is zero elsewhere. Half precision is summed in float32."""
    wide = x.to(accumulation_dtype(x.dtype))
    total = wide.cumsum(1) if running else wide.sum(1, keepdim=True)
    count = mask.cumsum(1) if running else mask.sum(1, keepdim=True)
    return (total / count.clamp(min=1).unsqueeze(-1)).to(x.dtype)
