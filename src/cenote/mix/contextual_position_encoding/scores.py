"""Scores whose positions are sums of gates.

Source: Golovneva, Wang, Weston and Sukhbaatar, "Contextual Position Encoding" (2024), arXiv 2405.18719.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.base import ScoreModifier
from cenote.mix.position_scores import RelativeTable

GateKeys = Literal["keys", "own", "values"]


class Counted(NamedTuple):
    """What `CoPE.counted` returns.

    Attributes:
        scores: before what makes weights of them, -inf where the mask is False.
        gates: `g_ij`, how much query i counts token j.
        positions: `p_ij`, what it counted from token j on.
    """

    scores: Float[Tensor, "batch heads queries keys"]
    gates: Float[Tensor, "batch heads queries keys"]
    positions: Float[Tensor, "batch heads queries keys"]


class CoPE(ScoreModifier):
    """Scores with positions that count tokens by gates.

        g_ij = sigmoid(q_i . z_j / sqrt(d)),   p_ij = min(sum_{t >= j} g_it, P - 1),
        c_ij = q_i . e[p_ij], e linear between whole positions,   s_ij = (q_i . k_j + c_ij) / sqrt(d)

    The sum is over the keys that the query may read: with a causal mask from j to i. The products `q . e` are made once for all
    whole positions and then looked up, so that no `[queries, keys, width]` tensor is made.

    Args:
        width: of a head.
        positions: P, how many whole positions the table has; further keys share the last one.
        gate_keys: z: the `"keys"`, keys of its `"own"` (a projection of the attention layer), or the `"values"`.
        scaled_gates: whether products are divided by `sqrt(d)` before the sigmoid, as in the authors' repository; False takes
            them raw, as in the paper's listing.
        scaled_positions: whether `c` is divided by `sqrt(d)` too (the repository's `nodiv` is False here).
        relative: so many distances of a learned table are added, `q_i . r[i - j]`; None for none.

    Example:
        >>> cope = CoPE(8, positions=4)
        >>> x = torch.randn(1, 2, 5, 8)
        >>> cope(x, x, torch.ones(5, 5, dtype=torch.bool).tril()[None, None]).shape
        torch.Size([1, 2, 5, 5])

    Source: Golovneva et al. (2024), arXiv 2405.18719.
    """

    def __init__(
        self,
        width: int,
        positions: int = 64,
        gate_keys: GateKeys = "keys",
        scaled_gates: bool = True,
        scaled_positions: bool = True,
        relative: int | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, width=width, positions=positions)
        require_one_of(get_args(GateKeys), gate_keys=gate_keys)
        self.width, self.positions, self.gate_keys = width, positions, gate_keys
        self.scaled_gates, self.scaled_positions = scaled_gates, scaled_positions
        self.table = nn.Parameter(torch.zeros(1, width, positions))
        self.relative = None if relative is None else RelativeTable(width, relative)

    def forward(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]] | None = None,
        gate_keys: Float[Tensor, "batch heads keys width"] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Scores, see `ScoreModifier`.

        Args:
            gate_keys: z where it is not the keys: the layer's own projection, or the values.
        """
        return self.counted(q, k, mask, positions, gate_keys).scores

    def counted(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]] | None = None,
        gate_keys: Float[Tensor, "batch heads keys width"] | None = None,
    ) -> Counted:
        """The same with gates and positions.

        Raises:
            InputError: where `gate_keys` lacks, is given for nothing, or q is of another width.
        """
        if q.shape[-1] != self.width:
            raise InputError(f"q: expected heads of width {self.width}, got {q.shape[-1]}")
        if (gate_keys is None) != (self.gate_keys == "keys"):
            said = "is given, and gates are of the keys" if gate_keys is not None else "is missing"
            raise InputError(f"gate_keys: {said}; this CoPE was built with gate_keys={self.gate_keys!r}")
        products = q @ k.mT
        asked = products if gate_keys is None else q @ gate_keys.mT
        gates = gates_of(asked / math.sqrt(self.width) if self.scaled_gates else asked, mask)
        places = counted_positions(gates, self.positions)
        counted = between(q @ self.table, places)
        if self.relative is not None:
            products = products + self.relative.added(q, k, positions)
        scale = 1 / math.sqrt(self.width)
        scores = products * scale + (counted * scale if self.scaled_positions else counted)
        return Counted(scores if mask is None else scores.masked_fill(~mask, -math.inf), gates, places)

    def extra_repr(self) -> str:
        return f"width={self.width}, positions={self.positions}, gate_keys={self.gate_keys!r}"


def gates_of(
    products: Float[Tensor, "*batch queries keys"], mask: Bool[Tensor, "*#batch queries keys"] | None
) -> Float[Tensor, "*batch queries keys"]:
    """`sigmoid(products)`, 0 where the mask is False."""
    gates = products.sigmoid()
    return gates if mask is None else gates.masked_fill(~mask, 0.0)


def counted_positions(gates: Float[Tensor, "*batch keys"], count: int) -> Float[Tensor, "*batch keys"]:
    """`min(sum_{t >= j} g_t, count - 1)`, summed in float32 at least.

    >>> counted_positions(torch.tensor([1.0, 0.5, 1.0]), 3)
    tensor([2.0000, 1.5000, 1.0000])
    """
    wide = gates.to(torch.promote_types(gates.dtype, torch.float32))
    return wide.flip(-1).cumsum(-1).flip(-1).clamp(max=count - 1)


def between(
    by_position: Float[Tensor, "*batch positions"], places: Float[Tensor, "*batch keys"]
) -> Float[Tensor, "*batch keys"]:
    """Values at fractional positions, linear between those at whole ones; gradients reach both and the share between them.

    >>> between(torch.tensor([0.0, 10.0, 30.0]), torch.tensor([0.5, 2.0]))
    tensor([ 5., 30.])
    """
    below = places.detach().floor()
    share = places - below
    at = below.long()
    above = places.detach().ceil().long()
    mixed = by_position.gather(-1, above) * share + by_position.gather(-1, at) * (1 - share)
    return mixed.to(by_position.dtype)
