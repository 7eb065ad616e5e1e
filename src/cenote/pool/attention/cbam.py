import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.sets import PaddedTokens
from cenote.pool.attention.blocks import TokenBatchNorm, require_square, require_tokens
from cenote.pool.base import PaddedPool, Pooled


class CbamPool(PaddedPool):
    """A channel gate, then a spatial gate, around a mean of the patches of a square grid.

    `g = sigmoid(M(mean_n x_n) + M(max_n x_n))` with `M` two maps and a ReLU between, `u_n = g * x_n`,
    `s = sigmoid(BatchNorm(conv([mean_c u; max_c u])))` over the grid, `y = mean_n relu(s_n u_n + x_n)`.

    The weight of a token is the mean over the channels of what multiplies it before the ReLU, `(1 + s_n mean_c g_c) / N`.

    Args:
        dim: width of a token.
        tokens: number of patches, a square grid row by row.
        hidden: width between the two maps of the channel gate; default `dim / 16`, rounded, at least 1.
        kernel_size: of the spatial convolution, odd.
        bias: whether the maps of the channel gate have biases.

    Raises:
        InputError: for a grid that is not square or an even kernel; when called with another number of tokens.

    Example:
        >>> CbamPool(16, tokens=9)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018; this form: Psomas et al., "Attention,
    Please!", 2025.

    Note:
        Masked patches count as the zeros around the grid in the convolution, and take no part in means, maxima and batch
        statistics.
    """

    permutation_invariant = False
    fixed_tokens = True

    def __init__(
        self, dim: int, tokens: int, hidden: int | None = None, kernel_size: int = 7, bias: bool = False
    ) -> None:
        super().__init__(dim)
        self.tokens = tokens
        self.side = require_square(tokens)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size: expected an odd number, so that the map keeps its size, got {kernel_size}")
        hidden = max(1, int(dim / 16 + 0.5)) if hidden is None else hidden
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = TokenBatchNorm(1)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        require_tokens(tokens, self.tokens)
        channel, spatial = self.gates(tokens)
        x = tokens.values
        share = 1 + spatial * channel.mean(-1, keepdim=True).unsqueeze(1)
        weights = tokens.replace(share * tokens.uniform()).values
        return Pooled(tokens.mean(F.relu(spatial * channel.unsqueeze(1) * x + x)), weights)

    def gates(self, tokens: PaddedTokens) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens 1"]]:
        """The gate of each channel and of each patch."""
        channel = torch.sigmoid(self._mixed(tokens.mean()) + self._mixed(tokens.max()))
        u = tokens.values * channel.unsqueeze(1)
        maps = torch.stack([u.mean(-1), u.amax(-1)], 1).unflatten(-1, (self.side, self.side))
        spatial = self.bn.normalised(tokens, self.conv(maps).flatten(2).transpose(1, 2))
        return channel, torch.sigmoid(spatial)

    def _mixed(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return self.fc2(F.relu(self.fc1(pooled)))
