"""What stands in the place of attention: each form takes one principle away.

Source: Xue, Moosavi, Aletras, "Deconstructing Attention", 2025, section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import rotary
from cenote.core.errors import InputError
from cenote.core.requirements import require_heads, require_one_of
from cenote.mix.base import Mixer
from cenote.mix.deconstructing_attention.running import running_softmax, taylor_joint, taylor_literal, token_scores

Tokens = Float[Tensor, "batch tokens dim"]
Taylor = Literal["joint", "literal"]
ROPE_BASE = 10_000.0


class CausalForm(Mixer):
    """Base of the forms: `run` also goes on from a state, token by token.

    Args:
        dim: width of a token.
        heads: number of heads.
    """

    causal = True

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        require_heads(dim, heads)
        self.dim, self.heads = dim, heads

    def mix(
        self, x: Tokens, mask: Bool[Tensor, "batch tokens"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.run(x, x, mask, positions, None)[0]

    @abstractmethod
    def run(
        self,
        x: Tokens,
        asks: Float[Tensor, "#batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None,
        positions: Int[Tensor, "#batch tokens"],
        state: Any,
    ) -> tuple[Tokens, Any]:
        """The tokens that came now, mixed with those that came before.

        Args:
            x: of which values are made.
            asks: of which queries and keys are made, where there are any; one item for all where it does not depend on them.
            mask: True = a real token, None for all.
            positions: where they stand.
            state: what an earlier call gave, None at the beginning.

        Returns:
            The output, and the state behind the last token.
        """


class _Projected(CausalForm):
    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__(dim, heads)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def by_head(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def joined(self, y: Tensor) -> Tensor:
        return self.o(y.transpose(1, 2).flatten(2))

    def values_of(self, x: Tokens) -> tuple[Float[Tensor, "batch heads tokens width"], nn.Linear]:
        """What weights sum up, and what maps the heads' sums, joined, to the output."""
        return self.by_head(self.v(x)), self.o


class DotProductForm(_Projected):
    """Causal softmax attention; queries and keys may come from elsewhere than values: the static forms.

    Args:
        dim: width of a token.
        heads: number of heads.
        rope: whether queries and keys are turned by their positions.
    """

    def __init__(self, dim: int, heads: int = 1, *, rope: bool = True) -> None:
        super().__init__(dim, heads)
        _require_pairs(rope, dim // heads)
        self.rope = rope

    def run(
        self,
        x: Tokens,
        asks: Float[Tensor, "#batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None,
        positions: Int[Tensor, "#batch tokens"],
        state: Any,
    ) -> tuple[Tokens, Any]:
        q, k = self._turned(asks, positions)
        q, k, v = q.expand(len(x), -1, -1, -1), k.expand(len(x), -1, -1, -1), self.by_head(self.v(x))
        seen = torch.ones_like(v[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
        if state is not None:
            k, v, seen = (
                torch.cat(pair, d) for pair, d in zip(zip(state, (k, v, seen), strict=True), (2, 2, 1), strict=True)
            )
        read = F.scaled_dot_product_attention(q, k, v, _may_read(seen, x.shape[1]))
        return self.joined(read), (k, v, seen)

    def maps(
        self, asks: Tokens, positions: Int[Tensor, "#batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Weights of queries and keys that are made of these tokens."""
        q, k = self._turned(asks, positions)
        seen = torch.ones(asks.shape[:2], dtype=torch.bool, device=asks.device) if mask is None else mask
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~_may_read(seen, asks.shape[1]), -torch.inf).softmax(-1)
        return weights * seen[:, None, :, None]

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        mask, positions = self._checked(x, mask, positions)
        return self.maps(x.masked_fill(~mask.unsqueeze(-1), 0.0), positions, mask)

    def _turned(self, asks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.by_head(self.q(asks)), self.by_head(self.k(asks))
        return _by_positions(q, k, positions) if self.rope else (q, k)


class TaylorForm(_Projected):
    """Attention whose exponential is its Taylor expansion of second order, in linear time.

    Args:
        dim: width of a token.
        heads: number of heads.
        taylor: `"joint"`: the true expansion over one positive divisor; `"literal"`: each order by a divisor of its own, as
            printed.
        rope: whether queries and keys are turned by their positions.
    """

    def __init__(self, dim: int, heads: int = 1, *, taylor: Taylor = "joint", rope: bool = True) -> None:
        super().__init__(dim, heads)
        require_one_of(("joint", "literal"), taylor=taylor)
        _require_pairs(rope, dim // heads)
        self.taylor, self.rope = taylor, rope

    def run(
        self,
        x: Tokens,
        asks: Float[Tensor, "#batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None,
        positions: Int[Tensor, "#batch tokens"],
        state: Any,
    ) -> tuple[Tokens, Any]:
        q, k, v = self.by_head(self.q(asks)), self.by_head(self.k(asks)), self.by_head(self.v(x))
        if self.rope:
            q, k = _by_positions(q, k, positions)
        form = taylor_joint if self.taylor == "joint" else taylor_literal
        y, state = form(q, k, v, mask, state)
        return self.joined(y), state


class RunningForm(_Projected):
    """`o_i = sum_(j <= i) e^(s_j) v_j / sum_(j <= i) e^(s_j)`, `s_j = silu(q_j) . k_j / sqrt(width)`: no query chooses.

    Args:
        dim: width of a token.
        heads: number of heads.

    Example:
        >>> form = RunningForm(8, 2)
        >>> form(torch.randn(1, 5, 8)).shape, form.weights_of(torch.randn(1, 5, 8)).shape
        (torch.Size([1, 5, 8]), torch.Size([1, 2, 5, 5]))

    Source:
        Xue et al. 2025, arXiv 2510.11602, equations 7 and 8.
    """

    def run(
        self,
        x: Tokens,
        asks: Float[Tensor, "#batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None,
        positions: Int[Tensor, "#batch tokens"],  # noqa: ARG002
        state: Any,
    ) -> tuple[Tokens, Any]:
        y, state = running_softmax(self._scores(asks), self.by_head(self.v(x)), mask, state)
        return self.joined(y), state

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        mask, _ = self._checked(x, mask, positions)
        scores = self._scores(x.masked_fill(~mask.unsqueeze(-1), 0.0))
        seen = _may_read(mask, x.shape[1])
        every = scores.unsqueeze(2).expand(-1, -1, x.shape[1], -1)
        return every.masked_fill(~seen, -torch.inf).softmax(-1) * mask[:, None, :, None]

    def _scores(self, asks: Tensor) -> Tensor:
        return token_scores(self.by_head(F.silu(self.q(asks))), self.by_head(self.k(asks)))


class GatedMLPForm(CausalForm):
    """`W_d (silu(W_g x) * W_u x)` of inner width 4/3 of the outer: mixes nothing.

    It has as many parameters as attention where 3 divides the width; else the inner width is rounded, which adds or takes away
    at most `dim` of them.

    Args:
        dim: width of a token.
        heads: not used.
    """

    mixes = False
    order_matters = False

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__(dim, heads)
        inner = round(4 * dim / 3)
        self.gate, self.up = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, dim, bias=False)

    def run(
        self,
        x: Tokens,
        asks: Float[Tensor, "#batch tokens dim"],  # noqa: ARG002
        mask: Bool[Tensor, "batch tokens"] | None,  # noqa: ARG002
        positions: Int[Tensor, "#batch tokens"],  # noqa: ARG002
        state: Any,
    ) -> tuple[Tokens, Any]:
        return self.down(F.silu(self.gate(x)) * self.up(x)), state


class SilentForm(CausalForm):
    """Adds nothing: what a block is without its attention.

    Args:
        dim, heads: not used.
    """

    mixes = False
    order_matters = False

    def run(
        self,
        x: Tokens,
        asks: Float[Tensor, "#batch tokens dim"],  # noqa: ARG002
        mask: Bool[Tensor, "batch tokens"] | None,  # noqa: ARG002
        positions: Int[Tensor, "#batch tokens"],  # noqa: ARG002
        state: Any,
    ) -> tuple[Tokens, Any]:
        return torch.zeros_like(x), state


def _require_pairs(rope: bool, width: int) -> None:
    if rope and width % 2:
        raise InputError(f"rope: turns pairs of channels; heads are {width} wide, expected an even width or rope=False")


def _by_positions(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch heads queries width"],
    positions: Int[Tensor, "#batch queries"],
) -> tuple[Tensor, Tensor]:
    by = rotary.angles(positions, q.shape[-1], ROPE_BASE)
    return rotary.rotated(q, by), rotary.rotated(k, by)


def _may_read(seen: Bool[Tensor, "batch keys"], queries: int) -> Bool[Tensor, "batch 1 queries keys"]:
    keys = seen.shape[1]
    square = torch.ones(queries, keys, dtype=torch.bool, device=seen.device)
    before, own = square.tril(keys - queries), square.triu(keys - queries).tril(keys - queries)
    # padding reads itself, so that no row is empty
    return (seen.unsqueeze(1) & before | own).unsqueeze(1)
