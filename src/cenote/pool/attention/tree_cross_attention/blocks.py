"""The layers of Tree Cross Attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.dense import dense_attention
from cenote.core.widths import require_divides


class NormedAttention(nn.Module):
    """Attention whose query stream is normalised first, and added in its normalised form.

    `n = LN(x)`, `y = W_o concat_h softmax(W_q n . W_k c / sqrt(dim / heads)) W_v c + b_o + n`.

    Keys and values come from the raw context `c`, in self-attention too (`c = x`).

    Args:
        dim: width of queries and context.
        heads: divides `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        require_divides("heads", heads, dim)
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch tokens dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attend to all of `context`, or to `x` itself; `mask` is True on the vectors that may be seen."""
        n = self.norm(x)
        c = x if context is None else context
        attended = dense_attention(self.to_q(n), self.to_k(c), self.to_v(c), self.heads, mask=mask)
        return self.to_out(attended) + n

    def absorbed(self, n: Float[Tensor, "batch queries dim"]) -> Float[Tensor, "batch queries heads dim"]:
        """`W_k^T q_h / sqrt(dim / heads)` of normalised queries: its product with a raw vector is that vector's score."""
        q = self.to_q(n).unflatten(-1, (self.heads, -1)) * (n.shape[-1] // self.heads) ** -0.5
        return torch.einsum("bmhw,hwd->bmhd", q, self.to_k.weight.unflatten(0, (self.heads, -1)))

    def merged(self, taken: Float[Tensor, "batch queries heads dim"]) -> Float[Tensor, "batch queries dim"]:
        """`W_o concat_h W_v t_h + b_o` of raw vectors that each head took."""
        by_head = torch.einsum("bmhd,hwd->bmhw", taken, self.to_v.weight.unflatten(0, (self.heads, -1)))
        return self.to_out(by_head.flatten(-2))


class NormedFeedForward(nn.Module):
    """`n = LN(x)`, `y = W_2 (a * gelu(g)) + b_2 + n` with `[a; g] = W_1 n + b_1`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        n = self.norm(x)
        a, gate = self.fc1(n).chunk(2, -1)
        return self.fc2(a * F.gelu(gate)) + n


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward layer."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = NormedAttention(dim, heads)
        self.ff = NormedFeedForward(dim, hidden)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.ff(self.attention(x, mask=mask))
