"""Multi-head attention as a mixture of experts.

Source: Peng et al. (2020), arXiv 2005.06537.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import cleared, real_tokens
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.mix.base import Mixer
from cenote.mix.mixture_of_attentive_experts.experts import ExpertGate, head_factors

Mixture = Literal["soft", "hard", "even", "sampled"]
"""All experts by the gate; its best alone, of each item, or of each token where gates are causal (then all heads are computed);
all evenly, which is plain attention; one drawn by the gate for each item, as in training."""


class Attended(NamedTuple):
    """`output` `[batch, tokens, dim]`, `gates` `[batch, experts]`, of each token where the layer is causal."""

    output: Float[Tensor, "batch tokens dim"]
    gates: Float[Tensor, "batch experts"] | Float[Tensor, "batch tokens experts"]


class MixtureAttention(Mixer):
    """`sum_i g_i(x) f_i`, expert `f_S = h / (h - m) sum_(j in S) H_j`, `H_j` what head j gives behind the output projection.

    It is computed as `sum_j w_j H_j` (`head_factors`), at the cost of plain attention: no expert is built, but where one alone
    is asked for, and then only its heads are.

    Args:
        dim: width of the tokens.
        heads: of attention.
        drop: heads that each expert is without, `m`; the paper's MAE-7 and MAE-6 of 8 heads are 1 and 2.
        head_dim: width of a head; `dim / heads` by default.
        hidden: of the gate (inferred).
        bias: whether the maps have one.
        causal: no token reads a later one, nor does its gate.
        dropout: of the attention weights.

    Attributes:
        gate: an `ExpertGate`, even before it is trained.
        mixture: how experts are mixed, see `Mixture`.

    Raises:
        InputError: for impossible settings.

    Example:
        >>> layer = MixtureAttention(8, 4)
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Source: Peng et al. (2020), arXiv 2005.06537.
    """

    order_matters = False
    # adds the same to every score of a query
    inert_parameters: tuple[str, ...] = ("key.bias",)

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        drop: int = 1,
        head_dim: int | None = None,
        hidden: int = 256,
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads)
        require_rate(dropout=dropout)
        if head_dim is None and dim % heads:
            raise InputError(f"heads: expected to share the width {dim} evenly, got {heads}; or give head_dim")
        width = (dim // heads if head_dim is None else head_dim) * heads
        require_at_least(1, head_dim=width)
        self.dim, self.heads, self.causal, self.order_matters = dim, heads, causal, causal
        self.dropout, self.mixture = dropout, "soft"
        self.query, self.key, self.value = (nn.Linear(dim, width, bias=bias) for _ in range(3))
        self.output = nn.Linear(width, dim, bias=bias)
        self.gate = ExpertGate(dim, heads, drop=drop, hidden=hidden, causal=causal)

    @classmethod
    def of(cls, attention: nn.MultiheadAttention, *, drop: int = 1, hidden: int = 256, causal: bool = False) -> Self:
        """Attention that is trained already, under an even gate: it gives what that gives.

        Raises:
            InputError: for attention whose keys have another width, or additional ones.
        """
        dim, bias = attention.embed_dim, attention.in_proj_bias is not None
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise InputError("attention: expected queries and keys of one width and no additional key")
        like = attention.out_proj.weight
        made = cls(
            dim, attention.num_heads, drop=drop, hidden=hidden, bias=bias, causal=causal, dropout=attention.dropout
        ).to(like.device, like.dtype)
        with torch.no_grad():
            for module, weight in zip(
                (made.query, made.key, made.value), attention.in_proj_weight.chunk(3), strict=True
            ):
                module.weight.copy_(weight)
            made.output.weight.copy_(like)
            if bias:
                for module, own in zip(
                    (made.query, made.key, made.value), attention.in_proj_bias.chunk(3), strict=True
                ):
                    module.bias.copy_(own)
                made.output.bias.copy_(attention.out_proj.bias)
        return made.train(attention.training)

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.attend(x, mask=mask).output

    def attend(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch sources dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        memory_mask: Bool[Tensor, "batch sources"] | None = None,
        expert: Int[Tensor, "batch"] | None = None,
    ) -> Attended:
        """Mix, and tell the gates.

        Args:
            x: the tokens; the gate reads these.
            memory: what is read; the tokens themselves by default.
            mask, memory_mask: True = real.
            expert: of each item, to be used alone, as in training; no gradient reaches the gate then.
        """
        gates = self.gate.experts(x, mask)
        if expert is None and self.mixture == "hard" and gates.dim() == 2:
            expert = gates.argmax(-1)
        if expert is None and self.mixture == "sampled":
            expert = drawn(gates, mask)
        if expert is not None:
            return Attended(self._alone(x, memory, mask, memory_mask, expert), gates.detach())
        context = self._contexts(x, memory, mask, memory_mask, None)
        if self.mixture != "even":
            used = F.one_hot(gates.argmax(-1), gates.shape[-1]).to(gates) if self.mixture == "hard" else gates
            factors = head_factors(used, self.gate.members)
            wide = factors[:, :, None] if factors.dim() == 2 else factors.transpose(1, 2)
            context = context * wide.unsqueeze(-1)
        return Attended(self.output(context.transpose(1, 2).flatten(2)), gates)

    def use(self, mixture: Mixture) -> Self:
        """Mix experts this way from now on."""
        require_one_of(get_args(Mixture), mixture=mixture)
        self.mixture = mixture
        return self

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        mask, _ = self._checked(x, mask, positions)
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        q, k, _ = self._projected(x, x, None)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        seen = _readable(mask, x.shape[1], self.causal) & mask[:, None, :, None]
        # a query that may read nothing reads all, and its weights are dropped
        blind = ~seen.any(-1, keepdim=True)
        return scores.masked_fill(~(seen | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)

    def head_outputs(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch sources dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        memory_mask: Bool[Tensor, "batch sources"] | None = None,
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """`H_j`: what each head gives behind its part of the output projection, without the bias."""
        context = self._contexts(x, memory, mask, memory_mask, None)
        return torch.einsum("bhtw,hwd->bhtd", context, self._output_of(None))

    def _alone(
        self,
        x: Tensor,
        memory: Tensor | None,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        expert: Int[Tensor, "batch"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """One expert for each item; the heads that it is without are not computed."""
        if expert.shape != x.shape[:1] or expert.is_floating_point():
            raise InputError(f"expert: expected a number for each of {x.shape[0]} items, got {list(expert.shape)}")
        found = x.new_zeros(x.shape)
        for number in expert.unique().tolist():
            if not 0 <= number < len(self.gate.members):
                raise InputError(f"expert: expected 0 to {len(self.gate.members) - 1}, got {number}")
            at = (expert == number).nonzero().squeeze(1)
            of = [None if t is None else t[at] for t in (x, memory, mask, memory_mask)]
            heads = self.gate.members[number].nonzero().squeeze(1)
            context = self._contexts(of[0], of[1], of[2], of[3], heads)  # type: ignore[arg-type]
            y = torch.einsum("bhtw,hwd->btd", context, self._output_of(heads)) * (self.heads / len(heads))
            found = found.index_copy(0, at, y)
        return found if self.output.bias is None else found + self.output.bias

    def _contexts(
        self,
        x: Float[Tensor, "batch tokens dim"],
        memory: Float[Tensor, "batch sources dim"] | None,
        mask: Bool[Tensor, "batch tokens"] | None,
        memory_mask: Bool[Tensor, "batch sources"] | None,
        heads: Int[Tensor, "kept"] | None,
    ) -> Float[Tensor, "batch kept tokens width"]:
        x = cleared(x, mask)
        source, real = (x, mask) if memory is None else (cleared(memory, memory_mask), memory_mask)
        real = real_tokens(source, real)
        q, k, v = self._projected(x, source, heads)
        seen = _readable(real, x.shape[1], self.causal and memory is None)
        # a query that may read nothing reads all, and its output is dropped
        blind = ~seen.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, seen | blind, self.dropout if self.training else 0.0)
        return y.masked_fill(blind, 0.0)

    def _projected(self, x: Tensor, source: Tensor, heads: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of these heads, `[batch, heads, tokens, width]`."""
        found = []
        for module, of in ((self.query, x), (self.key, source), (self.value, source)):
            weight = module.weight.unflatten(0, (self.heads, -1))
            bias = None if module.bias is None else module.bias.unflatten(0, (self.heads, -1))
            if heads is not None:
                weight, bias = weight[heads], None if bias is None else bias[heads]
            y = F.linear(of, weight.flatten(0, 1), None if bias is None else bias.flatten())
            found.append(y.unflatten(-1, (len(weight), -1)).transpose(1, 2))
        return found[0], found[1], found[2]

    def _output_of(self, heads: Tensor | None) -> Float[Tensor, "kept width dim"]:
        weight = self.output.weight.T.unflatten(0, (self.heads, -1))
        return weight if heads is None else weight[heads]


def drawn(
    gates: Float[Tensor, "batch experts"] | Float[Tensor, "batch tokens experts"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch"]:
    """An expert for each item by its gate; of a causal gate by that of its last real token, which reads them all (inferred)."""
    if gates.dim() == 3:
        last = gates.shape[1] - 1 if mask is None else (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)
        gates = gates[torch.arange(len(gates), device=gates.device), last]
    return torch.multinomial(gates.detach(), 1).squeeze(1)


def _readable(
    real: Bool[Tensor, "batch sources"], queries: int, causal: bool
) -> Bool[Tensor, "batch 1 queries sources"]:
    seen = real[:, None, None].expand(-1, 1, queries, -1)
    if causal:
        seen = seen & torch.ones(queries, real.shape[1], dtype=torch.bool, device=real.device).tril()
    return seen
