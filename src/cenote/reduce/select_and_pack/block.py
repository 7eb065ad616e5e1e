"""Select-and-Pack Attention in the place of window attention.

Source: Zhang, Li, Seo and Cao (2024), arXiv 2410.23608.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.reduce.select_and_pack.gate import SelectionGate, selection_loss
from cenote.reduce.select_and_pack.packing import (
    PackInfo,
    Packing,
    pack_plan,
    pack_tokens,
    packed_attention,
    shifted_order,
    unpack_tokens,
)


class Selected(NamedTuple):
    """Tokens, scores, the loss of the scores (`None` without labels), the choice, and where it was packed."""

    y: Float[Tensor, "batch tokens dim"]
    score: Float[Tensor, "batch tokens 1"]
    loss: Float[Tensor, ""] | None
    keep: Bool[Tensor, "batch tokens"]
    info: PackInfo


class SelectAndPackAttention(nn.Module):
    """`y = x + scatter(attention(pack_tokens(gated(LN(x)))))`: tokens that are not kept pass by.

    Args:
        dim: of the tokens.
        heads: of the attention; divides `dim`.
        length: of a container, the square of a window's side.
        packing: see `pack_plan`.
        gate: its own by default.
        shift: by how many rows and columns the map is moved round before it is flattened, so that containers are cut elsewhere.

    Example:
        >>> attention = SelectAndPackAttention(8, heads=2, length=4).eval()
        >>> found = attention(torch.randn(2, 9, 8))
        >>> found.y.shape, found.keep.shape
        (torch.Size([2, 9, 8]), torch.Size([2, 9]))

    Source: Zhang et al. (2024), arXiv 2410.23608; that unselected tokens pass by is inferred. There is no bias of positions: a
        token must know its own.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        length: int = 49,
        packing: Packing = "stream",
        gate: SelectionGate | None = None,
        shift: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, length=length)
        require_at_least(0, shift=shift)
        if dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}")
        self.heads, self.length, self.packing, self.shift = heads, length, packing, shift
        self.norm = nn.LayerNorm(dim)
        self.gate = SelectionGate(dim) if gate is None else gate
        self.qkv, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        score_up: Float[Tensor, "batch tokens 1"] | None = None,
        label: Bool[Tensor, "batch tokens"] | None = None,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        noise: Float[Tensor, "batch tokens 1"] | None = None,
    ) -> Selected:
        """Attend.

        Args:
            x: tokens.
            score_up: scores of the block before.
            label: which tokens show an object; without it there is no loss.
            grid: rows and columns of the map that the tokens are; needed to shift it.
            mask: True = a real token.
            noise: of the gate.
        """
        if label is not None and label.shape != x.shape[:2]:
            raise InputError(f"label: expected {list(x.shape[:2])}, one for each token, got {list(label.shape)}")
        gated = self.gate(self.norm(x), score_up, mask, noise)
        info = pack_plan(gated.keep, self.length, self.packing, self._order(x, grid))
        loss = None if label is None else selection_loss([gated.score], [label])
        if not bool(gated.keep.any()):
            return Selected(x, gated.score, loss, gated.keep, info)
        qkv = self.qkv(pack_tokens(gated.x, info)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.movedim(-3, 0).transpose(2, 3)
        found = self.output(packed_attention(q, k, v, info).transpose(1, 2).flatten(2))
        return Selected(x + unpack_tokens(found, info), gated.score, loss, gated.keep, info)

    def _order(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
        if not self.shift:
            return None
        if grid is None or grid[0] * grid[1] != x.shape[1]:
            raise InputError(f"grid: expected rows and columns of the {x.shape[1]} tokens, to shift them; got {grid}")
        return shifted_order(grid, self.shift, x.device)


class SPABlock(nn.Module):
    """`SelectAndPackAttention`, then a network of two layers on every token: `z = y + MLP(LN(y))`.

    Args:
        dim: of the tokens.
        heads, length, packing, gate, shift: see `SelectAndPackAttention`.
        ratio: hidden width of the network, in widths of a token.

    Example:
        >>> SPABlock(8, heads=2, length=4).eval()(torch.randn(2, 9, 8)).y.shape
        torch.Size([2, 9, 8])

    Source: Zhang et al. (2024), arXiv 2410.23608.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        length: int = 49,
        packing: Packing = "stream",
        gate: SelectionGate | None = None,
        shift: int = 0,
        ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.attention = SelectAndPackAttention(dim, heads, length, packing, gate, shift)
        self.network = network(dim, ratio)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        score_up: Float[Tensor, "batch tokens 1"] | None = None,
        label: Bool[Tensor, "batch tokens"] | None = None,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        noise: Float[Tensor, "batch tokens 1"] | None = None,
    ) -> Selected:
        """As of the attention."""
        found: Selected = self.attention(x, score_up, label, grid, mask, noise)
        return found._replace(y=found.y + self.network(found.y))


def network(dim: int, ratio: float) -> nn.Sequential:
    """A norm and two layers."""
    inner = max(1, round(ratio * dim))
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
