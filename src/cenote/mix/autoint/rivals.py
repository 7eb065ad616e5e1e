"""What a click model is compared with: other ways to cross the fields of a table.

Each gives logits of the same rows as `AutoInt`, whose embeddings they share, with or without an MLP beside.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.requirements import require_at_least
from cenote.mix.autoint.model import FieldEmbeddings, mlp


class ClickModel(nn.Module):
    """A linear model of the features, and what `crossed` makes of the embeddings.

    Args:
        features, fields, dim: as of `AutoInt`.
        deep: widths of an MLP on the embeddings, trained along; None for none.
    """

    def __init__(self, features: int, fields: int, *, dim: int = 16, deep: Sequence[int] | None = None) -> None:
        super().__init__()
        require_at_least(1, fields=fields)
        self.fields, self.dim = fields, dim
        self.linear = FieldEmbeddings(features, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.embed = FieldEmbeddings(features, dim)
        self.deep = None if deep is None else mlp(fields * dim, deep, 1)

    def forward(
        self,
        index: Int[Tensor, "batch fields *several"],
        value: Float[Tensor, "batch fields *several"],
        present: Bool[Tensor, "batch fields *several"] | None = None,
    ) -> Float[Tensor, "batch 1"]:
        """Logits of rows; see `FieldEmbeddings` for what a row is."""
        e = self.embed(index, value, present)
        logit = self.linear(index, value, present).sum(1) + self.bias + self.crossed(e)
        return logit if self.deep is None else logit + self.deep(e.flatten(1))

    @abstractmethod
    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        """What the embeddings of a row give together."""


class LinearModel(ClickModel):
    """Logistic regression: a weight for each feature."""

    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        return e.new_zeros(len(e), 1)


class FactorisationMachine(ClickModel):
    """`sum_(i<j) e_i . e_j` (Rendle 2010)."""

    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        return pairs_pooled(e).sum(1, keepdim=True)


class AttentionalFM(ClickModel):
    """`p . sum_(i<j) a_ij (e_i * e_j)`, weights by a small network (Xiao et al. 2017)."""

    def __init__(self, features: int, fields: int, *, dim: int = 16, deep: Sequence[int] | None = None) -> None:
        super().__init__(features, fields, dim=dim, deep=deep)
        self.attention = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1, bias=False))
        self.output = nn.Linear(dim, 1, bias=False)
        first, second = torch.triu_indices(fields, fields, 1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        if self.fields == 1:
            return e.new_zeros(len(e), 1)
        products = e[:, self.first] * e[:, self.second]  # type: ignore[index]
        return self.output((self.attention(products).softmax(1) * products).sum(1))


class NeuralFM(ClickModel):
    """An MLP on `sum_(i<j) e_i * e_j` (He and Chua 2017)."""

    def __init__(self, features: int, fields: int, *, dim: int = 16, deep: Sequence[int] | None = None) -> None:
        super().__init__(features, fields, dim=dim, deep=deep)
        self.pooled = mlp(dim, (dim,), 1)

    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        return self.pooled(pairs_pooled(e))


class CrossNetwork(ClickModel):
    """`x_(l+1) = x_0 (w_l . x_l) + b_l + x_l` on all embeddings of a row (Wang et al. 2017).

    Args:
        features, fields, dim, deep: as of `AutoInt`.
        layers: how many.
    """

    def __init__(
        self, features: int, fields: int, *, dim: int = 16, deep: Sequence[int] | None = None, layers: int = 2
    ) -> None:
        super().__init__(features, fields, dim=dim, deep=deep)
        require_at_least(1, layers=layers)
        self.weights = nn.ModuleList(nn.Linear(fields * dim, 1, bias=False) for _ in range(layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(fields * dim)) for _ in range(layers))
        self.output = nn.Linear(fields * dim, 1, bias=False)

    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        x = first = e.flatten(1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = first * weight(x) + bias + x
        return self.output(x)


class CompressedInteraction(ClickModel):
    """`X^l_h = sum_ij W^lh_ij (X^(l-1)_i * X^0_j)`, all maps summed over the width (Lian et al. 2018).

    Args:
        features, fields, dim, deep: as of `AutoInt`.
        maps: how many of each layer.
    """

    def __init__(
        self,
        features: int,
        fields: int,
        *,
        dim: int = 16,
        deep: Sequence[int] | None = None,
        maps: Sequence[int] = (16, 16),
    ) -> None:
        super().__init__(features, fields, dim=dim, deep=deep)
        counts = [fields, *maps]
        self.maps = nn.ModuleList(nn.Linear(a * fields, b, bias=False) for a, b in pairwise(counts))
        self.output = nn.Linear(sum(maps), 1, bias=False)

    def crossed(self, e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch 1"]:
        x, found = e, []
        for layer in self.maps:
            x = layer((x[:, :, None] * e[:, None]).flatten(1, 2).mT).mT
            found.append(x.sum(2))
        return self.output(torch.cat(found, 1))


RIVALS: dict[str, type[ClickModel]] = {
    "logistic regression": LinearModel,
    "FM": FactorisationMachine,
    "AFM": AttentionalFM,
    "NFM": NeuralFM,
    "cross network": CrossNetwork,
    "CIN": CompressedInteraction,
}


def pairs_pooled(e: Float[Tensor, "batch fields dim"]) -> Float[Tensor, "batch dim"]:
    """`sum_(i<j) e_i * e_j`, at the cost of one pass.

    >>> pairs_pooled(torch.tensor([[[1.0], [2.0], [3.0]]])).tolist()
    [[11.0]]
    """
    return (e.sum(1).square() - e.square().sum(1)) / 2
