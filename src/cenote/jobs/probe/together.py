"""Products with what all members of an ensemble share, under `torch.func.vmap`.

vmap's own rules copy the shared factor (the tokens) for every member, or a member's parameters for every set. Members that
share a factor are only more rows or columns of the other one, so that one product serves them all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MATMULS = (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__)

WIDE = 64
"""Columns of a map that make a product per member as fast as one for all."""


class joined_products(TorchFunctionMode):
    """Inside this context, `F.linear` and matrix products under vmap serve all members with one product.

    Results are those of vmap to rounding. For one level of `torch.func.vmap`, with the gradient taken outside of it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs and len(args) > 1 and all(isinstance(a, Tensor) and a.dim() > 1 for a in args[:2]):
            if func is F.linear:
                x, weight, bias = (*args, None)[:3]
                if bias is not None and weight.shape[0] >= WIDE:
                    return _Linear.apply(*args)  # type: ignore[no-untyped-call]
                y = _Product.apply(x, weight.T)  # type: ignore[no-untyped-call]
                return y if bias is None else y + bias
            if func in _MATMULS:
                return _Product.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`x W^T + b`; what it adds is its rule for vmap."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = upstream.flatten(0, -2)
        return upstream @ weight, rows.mT @ x.flatten(0, -2), rows.sum(0)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, int | None], x: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, int]:
        # one product per member: its columns are wide enough, and what it yields lies in one piece
        members: int = info.batch_size
        x, weight, bias = (
            t.expand(members, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip((x, weight, bias), in_dims, strict=True)
        )
        return torch.baddbmm(bias.unsqueeze(1), x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1]), 0


class _Product(torch.autograd.Function):
    """`a @ b`; what it adds is its rule for vmap."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return (upstream @ b.mT).sum_to_size(a.shape), (a.mT @ upstream).sum_to_size(b.shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:  # noqa: ARG004
        a_members, b_members = in_dims
        if a_members is None and b_members is not None:
            return _times_own(a, b.movedim(b_members, 0)), 0
        if b_members is None and a_members is not None:
            return _own_times(a.movedim(a_members, 0), b), 0
        assert a_members is not None
        assert b_members is not None
        return _own_times_own(a.movedim(a_members, 0), b.movedim(b_members, 0)), 0


def _times_own(shared: Tensor, own: Tensor) -> Tensor:
    """`shared [*sets, n, d] @ own [members, *sets, d, h]` as one product with `members * h` columns."""
    own = _without_repeats(own)
    if own.dim() - 1 > max(shared.dim(), 2):
        return torch.matmul(shared, own)
    y = torch.matmul(shared, own.movedim(0, -2).flatten(-2))
    return y.unflatten(-1, (own.shape[0], own.shape[-1])).movedim(-2, 0)


def _own_times(own: Tensor, shared: Tensor) -> Tensor:
    """`own [members, *sets, n, d] @ shared [*sets, d, h]` as one product with `members * n` rows."""
    own = _without_repeats(own)
    if own.dim() - 1 > max(shared.dim(), 2):
        return torch.matmul(own, shared)
    y = torch.matmul(own.movedim(0, -3).flatten(-3, -2), shared)
    return y.unflatten(-2, (own.shape[0], own.shape[-2])).movedim(-3, 0)


def _without_repeats(own: Tensor) -> Tensor:
    """Without leading dimensions along which a member's matrices are the same."""
    while own.dim() > 3 and (own.shape[1] == 1 or own.stride(1) == 0):
        own = own[:, 0]
    return own


def _own_times_own(a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 3:
        # one product per member; as a matmul, the factor would be copied for every set
        return torch.bmm(a.flatten(1, -2), b).unflatten(1, a.shape[1:-1])
    ones = [1] * abs(a.dim() - b.dim())
    if a.dim() < b.dim():
        a = a.view(a.shape[0], *ones, *a.shape[1:])
    else:
        b = b.view(b.shape[0], *ones, *b.shape[1:])
    return torch.matmul(a, b)
