"""Self-attention over the fields of a table.

Source: Song et al. (2019), arXiv 1810.11921.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive, require_rate


class Interacted(NamedTuple):
    """Fields `[batch, fields, units]`, and what each took of each, `[batch, heads, fields, fields]`."""

    fields: Float[Tensor, "batch fields units"]
    weights: Float[Tensor, "batch heads fields fields"]


class InteractingLayer(nn.Module):
    """`Y = norm(relu(O + R))`, `O = heads softmax(Q K' / sqrt(u / heads)) V`, `Q, K, V, R = relu(X W + b)`.

    Args:
        dim: width of the fields.
        units: width of what comes out, `u`; `dim` by default.
        heads: of attention; they share the units.
        residual: whether there is an `R`, always a map of its own.
        paper_form: as in the paper and not in its code: linear maps, no scale, no norm.
        dropout: of the attention weights.
        eps: added to the variance by the norm.

    Raises:
        InputError: where heads do not share the units, or a setting is impossible.

    Example:
        >>> import torch
        >>> InteractingLayer(4, 8)(torch.randn(2, 5, 4)).shape
        torch.Size([2, 5, 8])

    Source: Song et al. (2019), arXiv 1810.11921, and DeepGraphLearning/RecommenderSystems.
    """

    def __init__(
        self,
        dim: int,
        units: int | None = None,
        *,
        heads: int = 2,
        residual: bool = True,
        paper_form: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        units = dim if units is None else units
        require_at_least(1, dim=dim, units=units, heads=heads)
        require_rate(dropout=dropout)
        require_positive(eps=eps)
        if units % heads:
            raise InputError(f"heads: expected to share {units} units evenly, got {heads}")
        self.dim, self.units, self.heads, self.paper_form = dim, units, heads, paper_form
        self.query, self.key, self.value = (nn.Linear(dim, units) for _ in range(3))
        self.residual = nn.Linear(dim, units) if residual else None
        self.norm = nn.Identity() if paper_form else nn.LayerNorm(units, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Maps as TensorFlow makes them: Glorot's uniform, biases 0."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch fields units"]:
        """The fields, each with what it took of the others."""
        return self.attend(x).fields

    def attend(self, x: Float[Tensor, "batch fields dim"]) -> Interacted:
        """The same, and the weights."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise InputError(f"x: expected [batch, fields, {self.dim}], got {list(x.shape)}")
        weights = self.weights_of(x)
        mixed = self.dropout(weights) @ self._by_heads(self.value, x)
        y = mixed.transpose(1, 2).flatten(2)
        if self.residual is not None:
            y = y + self._mapped(self.residual, x)
        return Interacted(self.norm(y.relu()), weights)

    def weights_of(self, x: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch heads fields fields"]:
        """What each field takes of each; rows sum to 1."""
        scores = self._by_heads(self.query, x) @ self._by_heads(self.key, x).mT
        return (scores if self.paper_form else scores * (self.units // self.heads) ** -0.5).softmax(-1)

    def _mapped(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(x)
        return y if self.paper_form else y.relu()

    def _by_heads(self, module: nn.Module, x: Tensor) -> Float[Tensor, "batch heads fields width"]:
        return self._mapped(module, x).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def averaged(weights: Float[Tensor, "batch heads fields fields"]) -> Float[Tensor, "fields fields"]:
    """The mean map over instances and heads: the picture of which fields are crossed.

    >>> import torch
    >>> averaged(torch.ones(3, 2, 4, 4) / 4).sum(1).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    return weights.mean((0, 1))
