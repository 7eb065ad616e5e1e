"""Cross-attention from a few queries to many tokens, without projecting the tokens.

With queries that are few per set, the projections of keys and values move to the other side of the sums:

    q_h . (W_k x_n + b_k) = (W_k^T q_h) . x_n + const          (the constant drops out of the softmax)
    sum_n a_n (W_v x_n + b_v) = W_v (sum_n a_n x_n) + b_v      (the weights sum to 1)

so no token is ever projected and the cost falls from `O(N D^2)` to `O(N D H Q)`, with the same output to rounding. A
LayerNorm on the tokens folds in as well: with `sigma_n` the deviation of token `n`, `g`, `b` the affine part and
`c(u) = u - mean(u)`, which may be applied to either side of a product,

    u . LN(x_n) = c(u*g) . x_n / sigma_n + u . b
    sum_n a_n LN(x_n) = g * c(sum_n (a_n/sigma_n) x_n) + b

The means of the tokens then leave after the sums. Where `|mean(x_n)| >> sigma_n`, rounding errors grow with their ratio, as
those of a LayerNorm do, but are some ten times as large (in float32 about 1e-6 of the ratio). Tokens of transformers have
ratios below 1; for data with a ratio above 10 in half precision, or above 1000 in float32, take the projected plan.

Further vectors `e` that the queries see besides the tokens (a class token among its own keys) need no concatenation: with
`L` the logsumexp of the scores on either side, the tokens' share of the softmax is `sigmoid(L_x - L_e)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import absorbed, blocked
from cenote.core.errors import InputError
from cenote.core.moments import token_moments
from cenote.core.requirements import require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens

Plan = Literal["auto", "absorbed", "projected"]


class Projection(NamedTuple):
    """An affine map given by its tensors, where a method's map is a slice or a product of its parameters."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"] | None = None


class Latents(NamedTuple):
    """What `cross_attention` returns: `output [batch, queries, width]`, `weights [*rows, heads * queries]`."""

    output: Float[Tensor, "batch queries width"]
    weights: Float[Tensor, "*rows heads_queries"]


def cross_attention(
    tokens: Tokens,
    query: Float[Tensor, "queries width"] | Float[Tensor, "batch queries width"],
    *,
    key: nn.Linear | Projection | None = None,
    value: nn.Linear | Projection | None = None,
    heads: int = 1,
    scale: float | None = None,
    key_norm: nn.LayerNorm | None = None,
    value_norm: nn.LayerNorm | None = None,
    head_norm: nn.LayerNorm | None = None,
    beside: Float[Tensor, "batch others dim"] | None = None,
    plan: Plan = "auto",
    map_weights: Callable[[Tensor], Tensor] | None = None,
    need_weights: bool = True,
) -> Latents:
    """Multi-head attention of `query` over the tokens of each set.

    Args:
        tokens: the sets; a set without tokens gives zeros (its value bias included).
        query: already projected queries, heads side by side: shared by all sets, or one group per set.
        key: `dim -> width` map of the (normalised) tokens; `None`: every head sees the whole token, and `width` is
            `heads * dim`.
        value: `dim -> value_width` map, head `h` owning the `h`-th slice; `None`: the (normalised) token itself is sliced.
        heads: number of heads; divides `width` and the value width.
        scale: factor on the scores; default `head_width ** -0.5`.
        key_norm, value_norm: LayerNorms over `dim` applied to the tokens before keys and values; give the same module
            twice where the method normalises once.
        head_norm: LayerNorm over the key of each head (QK-norm); such keys cannot be absorbed and are always projected.
        beside: vectors of each set that the queries see besides its tokens; they pass the same norms and maps, and the
            weights of the tokens then sum to less than 1.
        plan: `"absorbed"` never projects a token, `"projected"` projects each, `"auto"` takes for keys and for values
            whichever needs fewer multiplications.
        map_weights: applied to the weights before the sum (dropout, say); they need not sum to 1 after it.
        need_weights: whether the weights are wanted; if not, they may come back with no columns. A kernel of
            `cenote.core.absorbed` then reads the tokens once where it is available; its gradients cannot be
            differentiated again.

    Returns:
        `Latents(output, weights)`; `weights[..., h * queries + q]` is the weight of head `h`, query `q`.

    Raises:
        InputError: where widths and heads do not fit together.
    """
    require_one_of(("auto", "absorbed", "projected"), plan=plan)
    if query.dim() not in (2, 3) or (query.dim() == 3 and query.shape[0] != tokens.batch):
        raise InputError(
            f"query: expected [queries, width] for all sets or [{tokens.batch}, queries, width] for each, "
            f"got shape {tuple(query.shape)}"
        )
    dim, (queries, width) = tokens.dim, query.shape[-2:]
    for name, map_ in (("key", key), ("value", value)):
        if map_ is not None and map_.weight.shape[1] != dim:
            raise InputError(f"{name}: maps vectors of width {map_.weight.shape[1]}, but the tokens have width {dim}")
    for name, norm in (("key_norm", key_norm), ("value_norm", value_norm)):
        if norm is not None and not (isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (dim,)):
            raise InputError(f"{name}: expected a LayerNorm over the token width {dim}, got {norm}")
    key_width = heads * dim if key is None else key.weight.shape[0]
    value_width = dim if value is None else value.weight.shape[0]
    if width != key_width:
        raise InputError(f"query: expected width {key_width} to match the keys, got {width}")
    for name, size in (("key", key_width), ("value", value_width)):
        if heads < 1 or size % heads:
            raise InputError(f"heads: {heads} does not divide the {name} width {size}")
    if head_norm is not None and key is None:
        raise InputError(
            "head_norm: normalises the projected keys of a head, so it needs key; give key or leave it out"
        )
    scale = (key_width // heads) ** -0.5 if scale is None else scale

    n = tokens.tokens_per_set
    # products per set: absorbing maps the queries once, projecting maps every token
    absorb_keys = key is None or (
        head_norm is None
        and _choose(
            plan,
            absorbed=n * dim * heads * queries + (queries * width * dim if query.dim() == 3 else 0),
            projected=n * dim * width + n * width * queries,
        )
    )
    absorb_values = _choose(
        plan,
        absorbed=n * dim * heads * queries + (queries * dim * value_width if value is not None else 0),
        projected=(n * dim * value_width if value is not None else 0) + n * value_width * queries,
    )

    by_head = (query * scale).unflatten(-1, (heads, width // heads)).transpose(-2, -3)

    def absorbed_query() -> Float[Tensor, "*sets heads_queries dim"]:
        u = by_head if key is None else _map_by_head(by_head, key.weight.unflatten(0, (heads, -1)))
        return u.flatten(-3, -2)

    def scored(side: _TokenNorms) -> Float[Tensor, "*rows heads_queries"]:
        if absorb_keys:
            return side.scores(absorbed_query(), key_norm)
        assert key is not None
        k = F.linear(side.applied(key_norm), key.weight, None if head_norm is None else key.bias)
        if head_norm is not None:
            k = head_norm(k.unflatten(-1, (heads, -1))).flatten(-2)
        return _scores_by_head(side.tokens, k, by_head)

    def mapped_values(pooled: Float[Tensor, "batch heads_queries dim"]) -> Float[Tensor, "batch heads queries width"]:
        pooled = pooled.unflatten(1, (heads, queries))
        if value is None:
            return _own_slices(pooled, heads)
        return _map_by_head(pooled, value.weight.unflatten(0, (heads, -1)).mT)

    def summed(side: _TokenNorms, weights: Float[Tensor, "*rows heads_queries"]) -> Tensor:
        if absorb_values:
            pooled = mapped_values(side.weighted_sum(weights, value_norm))
        else:
            v = side.applied(value_norm)
            v = v if value is None else F.linear(v, value.weight)
            pooled = _weighted_sum_by_head(side.tokens, weights, v, heads)
        output = pooled.transpose(1, 2).flatten(2)
        if value is not None and value.bias is not None:
            mass = side.tokens.sum(weights).unflatten(-1, (heads, queries)).transpose(1, 2)
            output = output + (mass.unsqueeze(-1) * value.bias.unflatten(0, (heads, -1))).flatten(2).to(output.dtype)
        return output

    side = _TokenNorms(tokens)
    if absorb_keys and absorb_values and beside is None and map_weights is None:
        by_kernel = not need_weights and absorbed.available(tokens.values) and _same_eps(key_norm, value_norm)
        if by_kernel or blocked.takes(tokens):
            u = absorbed_query()
            mapped, seen = [], []
            if by_kernel:
                mapped.append(mapped_values(absorbed.layer_normed_pool(tokens, u, key_norm, value_norm)))
            else:
                for pooled, weights in side.pool_frozen(u, key_norm, value_norm, need_weights):
                    mapped.append(mapped_values(pooled))
                    seen.append(weights)
            output = _joined(mapped).transpose(1, 2).flatten(2)
            if value is not None and value.bias is not None:
                output = output + (tokens.lengths() > 0).view(-1, 1, 1) * value.bias
            return Latents(output, _joined(seen).transpose(1, 2) if need_weights else tokens.values[..., :0])

    scores = scored(side)
    weights = tokens.softmax(scores)
    if beside is None:
        weights = weights.to(tokens.values.dtype)
        return Latents(summed(side, weights if map_weights is None else map_weights(weights)), weights)

    others = PaddedTokens(beside)
    other_side = _TokenNorms(others)
    other_scores = scored(other_side)
    share = torch.sigmoid(tokens.logsumexp(scores) - others.logsumexp(other_scores))
    share = share * (tokens.lengths() > 0).unsqueeze(-1)
    weights = (weights * tokens.spread(share)).to(tokens.values.dtype)
    other_weights = (others.softmax(other_scores) * others.spread(1 - share)).to(beside.dtype)
    if map_weights is None:
        return Latents(summed(side, weights) + summed(other_side, other_weights), weights)
    return Latents(summed(side, map_weights(weights)) + summed(other_side, map_weights(other_weights)), weights)


def _same_eps(*norms: nn.LayerNorm | None) -> bool:
    return len({norm.eps for norm in norms if norm is not None}) <= 1


def _choose(plan: Plan, absorbed: float, projected: float) -> bool:
    return plan == "absorbed" or (plan == "auto" and absorbed <= projected)


def _map_by_head(
    by_head: Float[Tensor, "*sets heads queries in"], weight: Float[Tensor, "heads in out"]
) -> Float[Tensor, "*sets heads queries out"]:
    # one product per head for all sets: a plain matmul would copy the weight once per set
    if by_head.dim() == 3:
        return by_head @ weight
    rows = by_head.movedim((-3, -2), (0, 1))
    mapped: Tensor = _Mapped.apply(rows.flatten(1, -2), weight.mT)  # type: ignore[no-untyped-call]
    return mapped.unflatten(1, rows.shape[1:-1]).movedim((0, 1), (-3, -2))


class _Mapped(torch.autograd.Function):
    """`rows weight^T` by head; what it adds is that the weight's gradient lies in memory as the weight does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Float[Tensor, "heads rows in"], weight: Float[Tensor, "heads out in"]) -> Tensor:
        return torch.bmm(rows, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        return torch.bmm(upstream, weight), torch.bmm(upstream.mT, rows)


def _scores_by_head(
    tokens: Tokens, k: Float[Tensor, "*rows width"], by_head: Float[Tensor, "*sets heads queries head_width"]
) -> Float[Tensor, "*rows heads_queries"]:
    keys = k.chunk(by_head.shape[-3], -1)
    return torch.cat([tokens.replace(keys[h]).scores(by_head[..., h, :, :]) for h in range(len(keys))], -1)


def _weighted_sum_by_head(
    tokens: Tokens, weights: Float[Tensor, "*rows heads_queries"], v: Float[Tensor, "*rows width"], heads: int
) -> Float[Tensor, "batch heads queries head_width"]:
    pairs = zip(weights.chunk(heads, -1), v.chunk(heads, -1), strict=True)
    return torch.stack([tokens.weighted_sum(w, v_h) for w, v_h in pairs], 1)


def _own_slices(pooled: Float[Tensor, "batch heads queries dim"], heads: int) -> Tensor:
    slices = pooled.unflatten(-1, (heads, -1))
    return torch.stack([slices[:, h, :, h] for h in range(heads)], 1)


class _TokenNorms:
    """LayerNorms on the tokens, folded into products with them; statistics are shared where epsilons agree."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._statistics: dict[float, tuple[Tensor, Tensor]] = {}
        self._applied: dict[int, Tensor] = {}

    def statistics(self, eps: float) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]:
        """`(mu_n, 1/sigma_n)` of each token."""
        if eps not in self._statistics:
            mean, variance = token_moments(self.tokens.values)
            self._statistics[eps] = mean, (variance + eps).rsqrt()
        return self._statistics[eps]

    def applied(self, norm: nn.LayerNorm | None) -> Float[Tensor, "*rows dim"]:
        if norm is None:
            return self.tokens.values
        if id(norm) not in self._applied:
            self._applied[id(norm)] = norm(self.tokens.values)
        return self._applied[id(norm)]

    def scores(
        self, u: Float[Tensor, "*sets heads_queries dim"], norm: nn.LayerNorm | None
    ) -> Float[Tensor, "*rows heads_queries"]:
        if norm is None:
            return self.tokens.scores(u)
        mean, inverse_std = self.statistics(norm.eps)
        u = _centred(u.to(mean.dtype), norm)
        narrow = u.to(self.tokens.values.dtype)
        scores = self.tokens.scores(narrow).to(mean.dtype)
        if narrow.dtype != mean.dtype:
            # in half precision u is centred only to rounding
            left = narrow.to(mean.dtype).sum(-1)
            scores = scores - mean * (left if u.dim() == 2 else self.tokens.spread(left))
        return scores * inverse_std

    def weighted_sum(
        self, weights: Float[Tensor, "*rows heads_queries"], norm: nn.LayerNorm | None
    ) -> Float[Tensor, "batch heads_queries dim"]:
        if norm is None:
            return self.tokens.weighted_sum(weights)
        wide, x = accumulation_dtype(weights.dtype), self.tokens.values
        scaled = weights.to(wide) * self.statistics(norm.eps)[1]
        pooled = self.tokens.weighted_sum(scaled.to(x.dtype)).to(wide)
        mass = None if norm.bias is None else self.tokens.sum(weights.to(wide))
        return _normalised_sums(pooled, mass, norm).to(x.dtype)

    def pool_frozen(
        self,
        u: Float[Tensor, "*sets heads_queries dim"],
        key_norm: nn.LayerNorm | None,
        value_norm: nn.LayerNorm | None,
        need_weights: bool,
    ) -> Iterator[blocked.PooledSets]:
        """Scores, softmax and sums in one go, for a few sets after the other; ask `blocked.takes` first."""
        assert isinstance(self.tokens, PaddedTokens)
        u = u if key_norm is None else _centred(u, key_norm)
        by_key, by_value = (
            None if norm is None else self.statistics(norm.eps)[1].squeeze(-1) for norm in (key_norm, value_norm)
        )
        nonempty = (self.tokens.lengths() > 0).to(u.dtype).unsqueeze(-1)
        for sets in blocked.pieces(self.tokens, u.shape[-2]):
            pooled, weights = blocked.pool_frozen(
                self.tokens.part(sets),
                u if u.dim() == 2 else u[sets],
                None if by_key is None else by_key[sets],
                None if by_value is None else by_value[sets],
                need_weights,
            )
            if value_norm is not None:
                pooled = _normalised_sums(pooled, nonempty[sets].expand(-1, u.shape[-2]), value_norm)
            yield blocked.PooledSets(pooled, weights)


def _joined(pieces: Sequence[Float[Tensor, "_sets *rest"]]) -> Float[Tensor, "batch *rest"]:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _centred(u: Float[Tensor, "*sets dim"], norm: nn.LayerNorm) -> Float[Tensor, "*sets dim"]:
    """Queries of tokens that are divided by their deviation only; what the bias adds is the same for every token."""
    u = u if norm.weight is None else u * norm.weight.to(u.dtype)
    return u - u.mean(-1, keepdim=True)


def _normalised_sums(
    pooled: Float[Tensor, "batch heads_queries dim"],
    mass: Float[Tensor, "batch heads_queries"] | None,
    norm: nn.LayerNorm,
) -> Float[Tensor, "batch heads_queries dim"]:
    """Sums of normalised tokens from sums of tokens that were divided by their deviation only."""
    pooled = pooled - pooled.mean(-1, keepdim=True)
    pooled = pooled if norm.weight is None else pooled * norm.weight
    return pooled if norm.bias is None or mass is None else pooled + mass.unsqueeze(-1) * norm.bias
