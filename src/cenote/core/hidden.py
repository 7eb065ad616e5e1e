"""Scores of tokens by a network with one hidden layer, some rows at a time.

    s_n = W h_n,   h_n = tanh(V x_n + b)   or, gated,   h_n = tanh(V x_n + b) * sigmoid(U x_n + c)

The hidden layer of all tokens is far larger than the caches, and what is done to it, forward and backward, are ten light steps.
In pieces each step finds in the cache what the last one left there, and of many tokens no hidden layer need be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.memory import CACHED_BYTES
from cenote.core.tokenwise import ROWS_AT_ONCE, tokenwise

LEAST_NUMBERS = 2**16
"""Hidden numbers below which the pieces would cost more than they save."""

TANH_BACKWARD = torch.ops.aten.tanh_backward.grad_input
SIGMOID_BACKWARD = torch.ops.aten.sigmoid_backward.grad_input


def hidden_scores(
    x: Float[Tensor, "*rows dim"], tanh: nn.Linear, gate: nn.Linear | None, score: nn.Linear
) -> Float[Tensor, "*rows scores"]:
    """`score(tanh(x))`, with `gate` `score(tanh(x) * sigmoid(gate(x)))`, where `tanh` is `torch.tanh` of that map.

    Args:
        x: tokens.
        tanh: `dim -> hidden`.
        gate: `dim -> hidden`, or none.
        score: `hidden -> scores`.
    """
    weights = [tanh.weight, tanh.bias, *([] if gate is None else [gate.weight, gate.bias]), score.weight]
    rows = x.shape[:-1].numel()
    if not _gains(x, rows * tanh.out_features, weights):
        scores = tokenwise(lambda some: _plain(some, *weights), x)
    else:
        flat = x.reshape(1, rows, x.shape[-1])
        keep = torch.is_grad_enabled() and rows <= ROWS_AT_ONCE
        scores = _HiddenScores.apply(keep, flat, *(w.unsqueeze(0) for w in weights))[0]  # type: ignore[no-untyped-call]
        scores = scores.view(*x.shape[:-1], -1)
    return scores if score.bias is None else scores + score.bias


def _gains(x: Tensor, numbers: int, weights: list[Tensor]) -> bool:
    return (
        x.device.type == "cpu"
        and numbers >= LEAST_NUMBERS
        and all(w is not None and w.dtype == x.dtype for w in weights)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _plain(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
    hidden = torch.tanh(nn.functional.linear(x, weight, bias))
    if len(others) > 1:
        hidden = hidden * torch.sigmoid(nn.functional.linear(x, *others[:2]))
    return nn.functional.linear(hidden, others[-1])


class _HiddenScores(torch.autograd.Function):
    """Of several members at once, one after another: `x [1 or members, rows, dim]`, `weights [members, ...]`.

    Gives the scores and, with `keep`, the members' hidden layers, which the backward pass else computes again.
    """

    @staticmethod
    def forward(keep: bool, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        *maps, score = weights
        members, rows = len(score), x.shape[1]
        scores = x.new_empty((members, rows, score.shape[1]))
        halves = [x.new_empty((members, rows if keep else 0, score.shape[2])) for _ in maps[::2]]
        step = _rows_at_once(score)
        product, *scratch = (x.new_empty((min(step, rows), score.shape[2])) for _ in range(1 + len(halves)))
        for member, piece in _pieces(members, rows, step):
            out = scores[member, piece]
            hidden = [h[member, piece] for h in halves] if keep else [t[: len(out)] for t in scratch]
            _fill(hidden, x[min(member, len(x) - 1), piece], maps, member)
            gated = hidden[0] if len(hidden) == 1 else torch.mul(*hidden, out=product[: len(out)])
            torch.mm(gated, score[member].mT, out=out)
        return scores, *halves

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[1:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (1 + ctx.count)
        saved = ctx.saved_tensors
        inputs, halves = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled():
            # somebody differentiates the gradient: say the same in steps that torch can differentiate
            return None, *_differentiable(inputs, upstream, ctx.needs_input_grad[1:])
        x, *maps, score = inputs
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        grads = [torch.zeros_like(w) for w in (*maps, score)]
        step = _rows_at_once(score)
        kept = halves[0].shape[1] == x.shape[1]
        scratch = [x.new_empty((min(step, x.shape[1]), score.shape[2])) for _ in range(2 if kept else 2 + len(halves))]
        for member, piece in _pieces(len(score), x.shape[1], step):
            of_x = min(member, len(x) - 1)
            ds = upstream[member, piece]
            first, second, *hidden = (t[: len(ds)] for t in scratch)
            if kept:
                hidden = [h[member, piece] for h in halves]
            else:
                _fill(hidden, x[of_x, piece], maps, member)
            gated = hidden[0] if len(hidden) == 1 else torch.mul(*hidden, out=first)
            grads[-1][member].addmm_(ds.mT, gated)
            # one column times one row is no work for a product of matrices
            multiply = torch.mul if ds.shape[1] == 1 else torch.mm
            multiply(ds, score[member], out=first)
            through_tanh = first if len(hidden) == 1 else torch.mul(first, hidden[1], out=second)
            through = [TANH_BACKWARD(through_tanh, hidden[0], grad_input=second)]
            if len(hidden) > 1:
                through.append(SIGMOID_BACKWARD(first.mul_(hidden[0]), hidden[1], grad_input=first))
            for k, dz in enumerate(through):
                grads[2 * k][member].addmm_(dz.mT, x[of_x, piece])
                grads[2 * k + 1][member] += dz.sum(0)
                if grad_x is not None:
                    grad_x[of_x, piece].addmm_(dz, maps[2 * k][member])
        return None, grad_x, *grads

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], keep: bool, x: Tensor, *weights: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        members: int = info.batch_size

        def every(t: Tensor, dim: int | None) -> Tensor:
            return (t.expand(members, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)

        if in_dims[1] is not None or len(x) > 1:
            x = every(x, in_dims[1])
        joined = _HiddenScores.apply(  # type: ignore[no-untyped-call]
            keep, x, *(every(w, d) for w, d in zip(weights, in_dims[2:], strict=True))
        )
        return tuple(t.unflatten(0, (members, -1)) for t in joined), (0,) * len(joined)


def _fill(hidden: list[Tensor], tokens: Tensor, maps: Sequence[Tensor], member: int) -> None:
    """Compute the halves of a member's hidden layer."""
    for half, weight, bias, activate in zip(hidden, maps[::2], maps[1::2], (torch.tanh_, torch.sigmoid_), strict=False):
        activate(torch.addmm(bias[member], tokens, weight[member].mT, out=half))


def _differentiable(
    inputs: tuple[Tensor, ...], upstream: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    scores = torch.stack(
        [_plain(inputs[0][min(m, len(inputs[0]) - 1)], *(w[m] for w in inputs[1:])) for m in range(len(upstream))]
    )
    chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(scores, chosen, upstream, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)


def _rows_at_once(score: Float[Tensor, "members scores hidden"]) -> int:
    # two halves of the hidden layer, two of their gradients, and the tokens
    return max(1, CACHED_BYTES // (5 * score.shape[2] * score.element_size()))


def _pieces(members: int, rows: int, step: int) -> Iterator[tuple[int, slice]]:
    for member in range(members):
        for start in range(0, rows, step):
            yield member, slice(start, start + step)
