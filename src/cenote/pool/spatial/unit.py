"""Learned numbers between 0 and 1."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_one_of

Constraint = Literal["sigmoid", "clamp"]

NEAREST = 1e-4


def unit_parameter(value: Float[Tensor, "*any"], constraint: Constraint, learnable: bool = True) -> nn.Parameter:
    """The parameter whose `in_unit_interval` is `value` clamped to [0, 1] (a sigmoid gets no nearer to 0 or 1 than 1e-4)."""
    require_one_of(("sigmoid", "clamp"), constraint=constraint)
    value = value.detach().clone().clamp(0, 1)
    return nn.Parameter(value.logit(NEAREST) if constraint == "sigmoid" else value, requires_grad=learnable)


def in_unit_interval(parameter: Float[Tensor, "*any"], constraint: Constraint) -> Float[Tensor, "*any"]:
    """`sigmoid(p)`, or `p` clamped to [0, 1] such that a parameter beyond a bound still learns its way back."""
    return torch.sigmoid(parameter) if constraint == "sigmoid" else _Clamp.apply(parameter)  # type: ignore[no-untyped-call]


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient passes unless a step down it would lead further out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return p.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        outwards = ((p <= 0) & (grad > 0)) | ((p >= 1) & (grad < 0))
        return grad.masked_fill(outwards, 0)
