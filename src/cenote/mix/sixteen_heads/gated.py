"""Attention with a factor on each head, and what heads are worth by the gradient at these factors.

Source: Michel, Levy and Neubig (2019), arXiv 1905.10650.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import cleared, real_tokens
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.mix.base import Mixer

Granularity = Literal["token", "example", "batch"]
"""Where the absolute value is taken: of each token (the authors' code), of each example (the paper's formula), of the whole
batch."""
EPS = 1e-20


class GatedAttention(Mixer):
    """`sum_h xi_h Att_h(x) + b`, `Att_h` what a head gives behind its part of the output projection.

    Args:
        dim: width of the tokens.
        heads: of attention.
        head_dim: width of a head; `dim / heads` by default.
        rescale: times heads over those that are left, where any is at 0.
        causal: no token reads a later one.
        dropout: of the attention weights.

    Attributes:
        gates: `xi` `[heads]`, a buffer of ones; 0 takes a head out. Set `requires_grad` to have its gradient.

    Example:
        >>> layer = GatedAttention(8, 4)
        >>> layer.gates[1:] = 0.0
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Source: Michel, Levy and Neubig (2019), arXiv 1905.10650.
    """

    order_matters = False
    # adds the same to every score of a query
    inert_parameters: tuple[str, ...] = ("key.bias",)
    gates: Float[Tensor, "heads"]

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        rescale: bool = False,
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
        self.dim, self.heads, self.rescale, self.dropout = dim, heads, rescale, dropout
        self.causal = self.order_matters = causal
        self.query, self.key, self.value = (nn.Linear(dim, width) for _ in range(3))
        self.output = nn.Linear(width, dim)
        self.register_buffer("gates", torch.ones(heads))

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.joined(self.contexts(x, mask))

    def contexts(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads tokens width"]:
        """What each head read, before its gate and the output projection."""
        real, _ = self._checked(x, mask, None)
        x = cleared(x, real)
        weights = self.weights_of(x, mask)
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.dropout(weights, self.dropout, self.training) @ value

    def joined(self, contexts: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch tokens dim"]:
        """The heads times their gates, through the output projection."""
        return self.output(scaled(contexts, self.gates, self.rescale).transpose(1, 2).flatten(2))

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        real = real_tokens(x, mask)
        x = x.masked_fill(~real.unsqueeze(-1), 0.0)
        q, k = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key))
        seen = (real[:, None] & real[:, :, None])[:, None]
        if self.causal:
            seen = seen & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(x.dtype).min)
        return scores.softmax(-1).masked_fill(~seen, 0.0)


def scaled(
    contexts: Float[Tensor, "batch heads tokens width"], gates: Float[Tensor, "heads"], rescale: bool = False
) -> Float[Tensor, "batch heads tokens width"]:
    """Outputs of heads times their gates; with `rescale` times all heads over those that are not at 0."""
    if gates.shape != contexts.shape[1:2]:
        raise InputError(f"gates: expected one for each of {contexts.shape[1]} heads, got {list(gates.shape)}")
    gates = gates.to(contexts)
    if rescale:
        left = (gates.detach() != 0).sum().clamp(min=1)
        gates = gates * (len(gates) / left)
    return contexts * gates.view(1, -1, 1, 1)


def gate_gradients(
    contexts: Float[Tensor, "batch heads tokens width"],
    gradients: Float[Tensor, "batch heads tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads"]:
    """`dL/dxi_h` of each example: its outputs of heads times the gradient there, summed over tokens and width."""
    return _products(contexts, gradients, mask).sum(-1)


def head_importance(
    contexts: Float[Tensor, "batch heads tokens width"],
    gradients: Float[Tensor, "batch heads tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    granularity: Granularity = "token",
    others: bool = False,
) -> Float[Tensor, "heads"]:
    """`|Att_h . dL/dAtt_h|`, summed over tokens or examples, not yet divided by their number (`denominator`).

    Args:
        contexts: outputs of heads, before or behind their part of the output projection.
        gradients: of the loss, there.
        mask: True on real tokens; padding counts nothing.
        granularity: see `Granularity`.
        others: of all other heads together in each head's place, as for keeping one head alone.
    """
    require_one_of(get_args(Granularity), granularity=granularity)
    products = _products(contexts, gradients, mask)
    if others:
        products = products.sum(1, keepdim=True) - products
    if granularity == "token":
        return products.abs().sum((0, 2))
    if granularity == "example":
        return products.sum(2).abs().sum(0)
    return products.sum((0, 2)).abs()


def denominator(
    mask: Bool[Tensor, "batch tokens"], granularity: Granularity = "token", last_layer: bool = False
) -> Float[Tensor, ""]:
    """What sums of `head_importance` are divided by: real tokens; examples for the other two, and for the last layer of an
    encoder of which [CLS] alone has a gradient.

    >>> denominator(torch.tensor([[True, True], [True, False]])).item()
    3.0
    """
    require_one_of(get_args(Granularity), granularity=granularity)
    count = mask.sum() if granularity == "token" and not last_layer else mask.any(1).sum()
    return count.float()


def normalised(importance: Float[Tensor, "layers heads"]) -> Float[Tensor, "layers heads"]:
    """Each layer's divided by its length, `sqrt(sum I^2) + 1e-20`, so that layers can be sorted together.

    >>> normalised(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return importance / (importance.square().sum(-1, keepdim=True).sqrt() + EPS)


def _products(contexts: Tensor, gradients: Tensor, mask: Tensor | None) -> Float[Tensor, "batch heads tokens"]:
    if contexts.shape != gradients.shape or contexts.dim() != 4:
        raise InputError(
            f"gradients: expected {list(contexts.shape)} as the contexts [batch, heads, tokens, width], got "
            f"{list(gradients.shape)}"
        )
    products = (contexts * gradients).sum(-1)
    if mask is None:
        return products
    if mask.shape != (contexts.shape[0], contexts.shape[2]):
        raise InputError(
            f"mask: expected {[contexts.shape[0], contexts.shape[2]]} as the contexts, got {list(mask.shape)}"
        )
    return products.masked_fill(~mask[:, None], 0.0)
