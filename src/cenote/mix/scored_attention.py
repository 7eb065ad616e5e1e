"""Self-attention with any scores and any normaliser, and with a cache of what it has read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_rate
from cenote.mix.base import Mixer, Normaliser, ScoreModifier
from cenote.mix.normalisers import normaliser as normaliser_named
from cenote.mix.position_scores import DotProduct


class Read(NamedTuple):
    """What attention keeps of the tokens that it has read, all before any position.

    Attributes:
        k, v: keys and values.
        gates: keys of the scores' own, where they have some.
        positions, real: of the tokens.
    """

    k: Float[Tensor, "batch kv_heads keys width"]
    v: Float[Tensor, "batch kv_heads keys width"]
    gates: Float[Tensor, "batch kv_heads keys width"] | None
    positions: Int[Tensor, "batch keys"]
    real: Bool[Tensor, "batch keys"]

    def then(self, after: Read) -> Read:
        """Both, one behind the other."""
        gates = None if self.gates is None or after.gates is None else torch.cat([self.gates, after.gates], 2)
        return Read(
            torch.cat([self.k, after.k], 2),
            torch.cat([self.v, after.v], 2),
            gates,
            torch.cat([self.positions, after.positions], 1),
            torch.cat([self.real, after.real], 1),
        )


class ScoredAttention(Mixer):
    """`W_o concat_h( normalise(scores(q_h, k_h)) v_h )`.

    Args:
        dim: of the tokens.
        heads: divides `dim`, unless `width` is given.
        scores: what makes scores of queries and keys, positions included; the dot product by default. One with an attribute
            `gate_keys` is given keys of its own, or the values, as it says.
        normaliser: what makes weights of them, see `cenote.mix.normalisers`.
        kv_heads: heads of keys and values, each read by a group of queries' heads; as many as heads by default.
        width: of a head.
        causal: whether a token reads itself and earlier ones alone.
        bias: of the projections; keys have none, which softmax would not see.
        dropout: of weights, in training.

    Example:
        >>> ScoredAttention(8, heads=2, normaliser="entmax15", causal=True)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        scores: ScoreModifier | None = None,
        normaliser: str | Normaliser = "softmax",
        kv_heads: int | None = None,
        width: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        require_at_least(1, dim=dim, heads=heads, kv_heads=kv_heads)
        require_rate(dropout=dropout)
        if width is None and dim % heads:
            raise InputError(f"heads: {heads} does not divide dim={dim}; give width")
        if heads % kv_heads:
            raise InputError(f"kv_heads: {kv_heads} does not divide heads={heads}")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.width = dim // heads if width is None else width
        self.causal = causal
        self.scores = DotProduct() if scores is None else scores
        self.normaliser = normaliser_named(normaliser)
        self.order_matters = causal or not isinstance(self.scores, DotProduct)
        self.query = nn.Linear(dim, heads * self.width, bias=bias)
        self.key = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.value = nn.Linear(dim, kv_heads * self.width, bias=bias)
        self.gate = None
        if getattr(self.scores, "gate_keys", "keys") == "own":
            self.gate = nn.Linear(dim, kv_heads * self.width, bias=bias)
        self.output = nn.Linear(heads * self.width, dim, bias=bias)
        level = self.scores.level_parameters if self.normaliser.forgets_level else ()
        unread = [(self.query, "query")] * (not self.scores.reads_queries) + [(self.key, "key")] * (
            not self.scores.reads_keys
        )
        self.inert_parameters = tuple(f"scores.{name}" for name in level) + tuple(
            f"{of}.{name}" for module, of in unread for name, _ in module.named_parameters()
        )
        self.dropout = nn.Dropout(dropout)

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "batch tokens dim"]:
        return self.read(x, mask, positions)[0]

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        mask, positions = self._checked(x, mask, positions)
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self._weights(x, self._kept(x, mask, positions), positions, mask)

    def read(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
        past: Read | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Read]:
        """Attend behind what has been read, which then holds these tokens too.

        Args:
            x: the next tokens.
            mask: True = a real token.
            positions: of these tokens.
            past: None for nothing.
        """
        kept = self._kept(x, mask, positions)
        kept = kept if past is None else past.then(kept)
        weights = self.dropout(self._weights(x, kept, positions, mask))
        y = weights.to(kept.v.dtype) @ self._grouped(kept.v)
        return self.output(y.transpose(1, 2).flatten(2)), kept

    def _kept(self, x: Tensor, mask: Tensor, positions: Tensor) -> Read:
        k, v = (m(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for m in (self.key, self.value))
        gates = None
        if self.gate is not None:
            gates = self.gate(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        return Read(k, v, gates, positions, mask)

    def _weights(
        self, x: Tensor, kept: Read, positions: Tensor, mask: Tensor
    ) -> Float[Tensor, "batch heads queries keys"]:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = kept.real[:, None, None, :] & mask[:, None, :, None]
        if self.causal:
            queries, keys = q.shape[2], kept.k.shape[2]
            seen = seen & torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        gates = {"own": kept.gates, "values": kept.v}.get(getattr(self.scores, "gate_keys", "keys"))
        own = {} if gates is None else {"gate_keys": self._grouped(gates)}
        scores = self.scores(q, self._grouped(kept.k), seen, (positions, kept.positions), **own)
        return self.normaliser(scores, seen)

    def _grouped(self, x: Tensor) -> Float[Tensor, "batch heads keys width"]:
        return x if self.kv_heads == self.heads else x.repeat_interleave(self.heads // self.kv_heads, 1)
