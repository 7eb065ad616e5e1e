"""What every pool of layer stacks is: the hidden states of all layers in, one vector out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_dtype_of, require_floating
from cenote.core.sets import PaddedTokens
from cenote.pool.traits import Traits


class LayersPooled(NamedTuple):
    """A pooled batch of layer stacks and where it came from.

    Attributes:
        output: `[batch, out_dim]`.
        weights: what the output took from each token of each layer, `[batch, heads, layers, tokens]`, 0 in padded slots;
            `None` where the method has no such numbers.
    """

    output: Float[Tensor, "batch out_dim"]
    weights: Float[Tensor, "batch heads layers tokens"] | None


def stack_layers(
    hidden_states: Sequence[Float[Tensor, "batch tokens dim"]], embeddings: bool = False
) -> Float[Tensor, "batch layers tokens dim"]:
    """The `hidden_states` of a transformers model as one layer stack.

    Args:
        hidden_states: the output of the embeddings, then of each layer, as `output_hidden_states=True` gives them.
        embeddings: whether the output of the embeddings stays in as a first layer; the published layer pools leave it out.

    Raises:
        InputError: where nothing is left to stack or the shapes differ.

    Example:
        >>> stack_layers([torch.zeros(2, 5, 8)] * 7).shape
        torch.Size([2, 6, 5, 8])
    """
    kept = list(hidden_states) if embeddings else list(hidden_states)[1:]
    if not kept:
        raise InputError(
            f"hidden_states: expected the embeddings and at least one layer, got {len(hidden_states)} tensors; "
            f"call the model with output_hidden_states=True"
        )
    shapes = {tuple(h.shape) for h in kept}
    if len(shapes) > 1 or kept[0].dim() != 3:
        raise InputError(f"hidden_states: expected [batch, tokens, dim] of the same shape each, got {sorted(shapes)}")
    return torch.stack(kept, 1)


class LayerPool(Traits, ABC):
    """Base of the pools that map `[batch, layers, tokens, dim]` to `[batch, out_dim]`.

    A layer pool defines `pool(x, mask)` on a checked stack whose padded slots are zero. Where its weights cost extra, it also
    defines `pool_only(x, mask)` without them. A set without tokens gives zeros.

    Args:
        dim: width of a token.
        layers: number of layers that the stack must have; `None`: any number that is at least `min_layers`.
        out_dim: width of the output; default `dim`.

    Attributes:
        layers: number of layers that the stack must have, `None` where any will do.
        min_layers: fewest layers that the pool can work with.
        layer_invariant: whether the order of the layers leaves the output unchanged.

    The others are those of `cenote.pool.traits.Traits`.
    """

    method_kind: ClassVar[str] = "layers"

    layer_invariant: bool = False
    min_layers: int = 1

    layers: int | None

    def __init__(self, dim: int, layers: int | None = None, out_dim: int | None = None) -> None:
        super().__init__(dim, out_dim)
        if layers is not None and layers < 1:
            raise InputError(f"layers: expected at least one layer, got {layers}")
        self.layers = layers

    def forward(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch out_dim"]:
        """Pool `x` to `[batch, out_dim]`; `mask` is True on real tokens."""
        x = self._checked(x, mask)
        return _zero_where_empty(self.pool_only(x, mask), x, mask)

    def attend(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> LayersPooled:
        """As calling the pool, and also what the output took from each token of each layer."""
        x = self._checked(x, mask)
        output, weights = self.pool(x, mask)
        return LayersPooled(_zero_where_empty(output, x, mask), weights)

    @abstractmethod
    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        """`LayersPooled(output, weights)` of a stack whose padded slots are zero."""

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        """The output alone; overridden where the weights would cost extra."""
        return self.pool(x, mask).output

    def _checked(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch layers tokens dim"]:
        if not isinstance(x, Tensor):
            raise InputError(
                f"x: expected a [batch, layers, tokens, dim] tensor, got {type(x).__name__}; "
                f"cenote.pool.stack_layers joins the hidden states of a model"
            )
        if x.dim() != 4:
            raise InputError(f"x: expected [batch, layers, tokens, dim], got shape {tuple(x.shape)}")
        require_floating(x)
        if x.shape[-1] != self.dim:
            raise InputError(
                f"x: expected tokens of width {self.dim}, got {x.shape[-1]}; build the pool with dim={x.shape[-1]}"
            )
        if self.layers is not None and x.shape[1] != self.layers:
            raise InputError(
                f"x: this pool was built for {self.layers} layers, got {x.shape[1]}; build it with layers={x.shape[1]}"
            )
        if x.shape[1] < self.min_layers:
            raise InputError(f"x: this pool needs at least {self.min_layers} layers, got {x.shape[1]}")
        require_dtype_of(self, x)
        if mask is None:
            return x
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"mask: expected a bool tensor with True on real tokens, got {came}; use mask.bool()")
        if mask.shape != (x.shape[0], x.shape[2]):
            raise InputError(
                f"mask: expected shape {(x.shape[0], x.shape[2])} to match the sets and tokens of x, got {tuple(mask.shape)}"
            )
        return x.masked_fill(~mask[:, None, :, None], 0)


def layer_tokens(
    x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
) -> PaddedTokens:
    """Every layer of every stack as a set of its own, `batch * layers` sets."""
    return PaddedTokens(x.flatten(0, 1), None if mask is None else mask.repeat_interleave(x.shape[1], 0))


def _zero_where_empty(output: Tensor, x: Tensor, mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:
    if x.shape[2] == 0:
        return torch.zeros_like(output)
    return output if mask is None else output.masked_fill(~mask.any(1, keepdim=True), 0)
