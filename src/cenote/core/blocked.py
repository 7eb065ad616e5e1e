"""Softmax pooling of frozen tokens, a few sets at a time, so that the second pass over a set finds it in the cache.

    s_bqn = f_bn u_bq . x_bn,   a_bq = softmax_n(s_bq),   y_bq = sum_n a_bqn g_bn x_bn

with factors `f`, `g` of the tokens (the inverse deviations of folded LayerNorms). The backward pass goes in the same blocks and
keeps nothing but `a`; tokens that need a gradient take the plain way through torch. Where nobody wants `a`, and there are no
factors, torch's own flash attention reads each token once: keys and values are both the tokens. With many queries over sets
that fit the cache, the blocks are faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.memory import CACHED_BYTES
from cenote.core.segments import accumulation_dtype, flush_tiny
from cenote.core.sets import LARGE_SET, PaddedTokens, Tokens

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What `scaled_dot_product_attention` calls on a CPU; it also returns the logsumexp, by which parts of a set are joined."""

FLASH_QUERIES = 48
"""Above so many queries, blocks of sets that fit the cache are faster than flash attention."""

SOFTMAX_BACKWARD = torch.ops.aten._softmax_backward_data
"""`a (da - sum a da)` in one step."""

LEAST_PART = 1024
"""Tokens of a set that one thread reads, at least, where several share a set."""

PIECE_BYTES = 2**22
"""Pooled vectors that wait for their map; more would take memory that has to come from the system first."""


class PooledSets(NamedTuple):
    """`pooled [batch, queries, dim]` and `weights [batch, queries, tokens]`, which may have no columns where nobody asked."""

    pooled: Float[Tensor, "batch queries dim"]
    weights: Float[Tensor, "batch queries tokens"]


def takes(tokens: Tokens) -> bool:
    """Whether these tokens gain by blocks: frozen, on a CPU, not in half precision, and many numbers in a set."""
    x = tokens.values
    return (
        isinstance(tokens, PaddedTokens)
        and x.device.type == "cpu"
        and x.is_floating_point()
        and accumulation_dtype(x.dtype) == x.dtype
        and x.shape[1:].numel() >= LARGE_SET
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


def pieces(tokens: PaddedTokens, queries: int) -> list[slice]:
    """Sets to pool before their vectors are mapped on: all at once where the backward pass keeps the vectors anyway."""
    x = tokens.values
    one_set = queries * x.shape[2] * x.element_size()
    step = max(1, x.shape[0] if torch.is_grad_enabled() else PIECE_BYTES // max(one_set, 1))
    return [slice(i, i + step) for i in range(0, x.shape[0], step)] or [slice(0, 0)]


def pool_frozen(
    tokens: PaddedTokens,
    queries: Float[Tensor, "queries dim"] | Float[Tensor, "batch queries dim"],
    key_factor: Float[Tensor, "batch tokens"] | None = None,
    value_factor: Float[Tensor, "batch tokens"] | None = None,
    need_weights: bool = True,
) -> PooledSets:
    """Pool the tokens of every set with queries that are as wide as the tokens; zeros for a set without tokens.

    Args:
        tokens: ask `takes` first.
        queries: shared by all sets, or one group per set; scale included.
        key_factor: factor of each token in the scores.
        value_factor: factor of each token in the sum.
        need_weights: whether the weights are wanted; a backward pass needs them in any case.
    """
    x = tokens.values
    plain = key_factor is None and value_factor is None and x.stride(-1) == 1
    flash = queries.shape[-2] <= FLASH_QUERIES or x.shape[1:].numel() * x.element_size() > CACHED_BYTES
    keep = need_weights or torch.is_grad_enabled() or not (plain and flash)
    pooled, weights = _PoolFrozen.apply(  # type: ignore[no-untyped-call]
        queries, x, tokens.mask, key_factor, value_factor, keep
    )
    return PooledSets(pooled, weights)


class _PoolFrozen(torch.autograd.Function):
    @staticmethod
    def forward(
        u: Tensor,
        x: Tensor,
        mask: Tensor | None,
        key_factor: Tensor | None,
        value_factor: Tensor | None,
        keep_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        if not keep_weights:
            return _flash(u, x, mask), x.new_empty((x.shape[0], u.shape[-2], 0))
        weights = x.new_empty((x.shape[0], u.shape[-2], x.shape[1]))
        pooled = x.new_empty((x.shape[0], u.shape[-2], x.shape[2]))
        for sets in _blocks(x):
            block, a = x[sets], weights[sets]
            torch.bmm(_of(u, sets, len(block)), block.mT, out=a)
            _softmax(a, None if mask is None else ~mask[sets].unsqueeze(1), _factor(key_factor, sets))
            g = _factor(value_factor, sets)
            torch.bmm(a if g is None else a * g, block, out=pooled[sets])
        return pooled, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, upstream_weights: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        u, x, mask, key_factor, value_factor, weights = ctx.saved_tensors
        if upstream is None and upstream_weights is None:
            return None, None, None, None, None, None
        if torch.is_grad_enabled():
            # somebody differentiates the gradient: say the same in steps that torch can differentiate
            scores = torch.matmul(u, x.mT)
            scores = scores if key_factor is None else scores * key_factor.unsqueeze(1)
            hidden = None if mask is None else ~mask.unsqueeze(1)
            if hidden is not None:
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, -1)
            weights = weights if hidden is None else weights.masked_fill(hidden, 0)
            by_set = _gradient(weights, x, upstream, upstream_weights, key_factor, value_factor) @ x
            return (by_set.sum(0) if u.dim() == 2 else by_set), None, None, None, None, None
        grad = torch.zeros_like(u, memory_format=torch.contiguous_format)
        for sets in _blocks(x):
            block = x[sets]
            ds = _gradient(
                weights[sets],
                block,
                None if upstream is None else upstream[sets],
                None if upstream_weights is None else upstream_weights[sets],
                None if key_factor is None else key_factor[sets],
                None if value_factor is None else value_factor[sets],
            )
            if u.dim() == 3:
                torch.bmm(ds, block, out=grad[sets])
            elif block.is_contiguous():
                grad.addmm_(ds.transpose(0, 1).flatten(1), block.flatten(0, 1))
            else:
                grad += torch.bmm(ds, block).sum(0)
        return grad, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        u: Tensor,
        x: Tensor,
        mask: Tensor | None,
        key_factor: Tensor | None,
        value_factor: Tensor | None,
        keep_weights: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        members: int = info.batch_size
        others = (x, mask, key_factor, value_factor)
        if all(d is None for d in in_dims[1:5]):
            # members that read the same tokens are only more queries
            u = u.movedim(in_dims[0] or 0, -3)
            joined = _PoolFrozen.apply(u.flatten(-3, -2), *others, keep_weights)  # type: ignore[no-untyped-call]
            pooled, weights = (t.unflatten(1, (members, -1)) for t in joined)
            return (pooled, weights), (1, 1)
        sets = x.shape[0] if in_dims[1] is None else x.movedim(in_dims[1], 0).shape[1]
        u = _every_member(u, in_dims[0], members)
        if u.dim() == 3:
            u = u.unsqueeze(1).expand(members, sets, *u.shape[1:])
        flat = [
            None if t is None else _every_member(t, d, members).flatten(0, 1)
            for t, d in zip(others, in_dims[1:5], strict=True)
        ]
        joined = _PoolFrozen.apply(u.flatten(0, 1), *flat, keep_weights)  # type: ignore[no-untyped-call]
        pooled, weights = (t.unflatten(0, (members, -1)) for t in joined)
        return (pooled, weights), (0, 0)


def _flash(u: Tensor, x: Tensor, mask: Tensor | None) -> Float[Tensor, "batch queries dim"]:
    """Pooled vectors alone. Where threads outnumber the sets, they share a set part by part."""
    batch, tokens = x.shape[:2]
    u = (u if u.dim() == 3 else u.expand(batch, *u.shape)).unsqueeze(1)
    hidden = None if mask is None else torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
    parts = max(1, min(2 * torch.get_num_threads() // max(batch, 1), tokens // LEAST_PART))
    even = tokens // parts * parts
    outputs, masses = [], []
    for part, count in (slice(0, even), parts), (slice(even, tokens), 1):
        if part.start == part.stop:
            continue
        keys = x[:, part].unflatten(1, (count, -1))
        bias = None if hidden is None else hidden[:, part].unflatten(1, (count, -1)).unsqueeze(2)
        output, logsumexp = FLASH(u.expand(-1, count, -1, -1), keys, keys, attn_mask=bias, scale=1.0)
        if bias is not None:
            # what comes of a part without tokens differs between versions of torch
            empty = (bias == -torch.inf).all(-1)
            output.masked_fill_(empty.unsqueeze(-1), 0)
            logsumexp.masked_fill_(empty, torch.finfo(x.dtype).min)
        outputs.append(output)
        masses.append(logsumexp)
    if parts == 1:
        return outputs[0].squeeze(1)
    share = torch.softmax(torch.cat(masses, 1), 1)
    return (share.unsqueeze(-1) * torch.cat(outputs, 1)).sum(1)


def _every_member(t: Tensor, dim: int | None, members: int) -> Tensor:
    return t.expand(members, *t.shape) if dim is None else t.movedim(dim, 0)


def _blocks(x: Float[Tensor, "batch tokens dim"]) -> list[slice]:
    one_set = x.shape[1:].numel() * x.element_size()
    step = max(1, CACHED_BYTES // max(one_set, 1))
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def _of(u: Tensor, sets: slice, count: int) -> Float[Tensor, "sets queries dim"]:
    return u.expand(count, *u.shape) if u.dim() == 2 else u[sets]


def _factor(factor: Float[Tensor, "batch tokens"] | None, sets: slice) -> Float[Tensor, "sets 1 tokens"] | None:
    return None if factor is None else factor[sets].unsqueeze(1)


def _softmax(a: Tensor, hidden: Bool[Tensor, "sets 1 tokens"] | None, factor: Tensor | None) -> None:
    """Scores to weights, in place."""
    if factor is not None:
        a.mul_(factor)
    if hidden is not None:
        a.masked_fill_(hidden, torch.finfo(a.dtype).min)
    torch.softmax(a, -1, out=a)
    flush_tiny(a)
    if hidden is not None:
        a.masked_fill_(hidden, 0)


def _gradient(
    weights: Float[Tensor, "sets queries tokens"],
    x: Float[Tensor, "sets tokens dim"],
    upstream: Float[Tensor, "sets queries dim"] | None,
    upstream_weights: Float[Tensor, "sets queries tokens"] | None,
    key_factor: Float[Tensor, "sets tokens"] | None,
    value_factor: Float[Tensor, "sets tokens"] | None,
) -> Float[Tensor, "sets queries tokens"]:
    """Gradient of `u . x`, before the factor of the keys is applied."""
    da = upstream_weights
    if upstream is not None:
        through_sum = torch.bmm(upstream, x.mT)
        through_sum = through_sum if value_factor is None else through_sum * value_factor.unsqueeze(1)
        da = through_sum if da is None else da + through_sum
    assert da is not None
    ds = SOFTMAX_BACKWARD(da, weights, -1, weights.dtype)
    return ds if key_factor is None else ds * key_factor.unsqueeze(1)
