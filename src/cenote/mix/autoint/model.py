"""Click models on the fields of a table.

Source: Song et al. (2019), arXiv 1810.11921.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_all_positive, require_at_least, require_rate
from cenote.mix.autoint.interacting import InteractingLayer

DEVIATION = 0.01


class FieldEmbeddings(nn.Module):
    """`e_m = value_m Embedding[index_m]`; of a field with several values the mean of theirs.

    Args:
        features: how many numbers of features there are, of all fields together.
        dim: width of their vectors, `N(0, 0.01)` at first.

    Example:
        >>> FieldEmbeddings(10, 4)(torch.tensor([[1, 7]]), torch.ones(1, 2)).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, features: int, dim: int = 16) -> None:
        super().__init__()
        require_at_least(1, features=features, dim=dim)
        self.features, self.dim = features, dim
        self.table = nn.Embedding(features, dim)
        nn.init.normal_(self.table.weight, std=DEVIATION)

    def forward(
        self,
        index: Int[Tensor, "batch fields *several"],
        value: Float[Tensor, "batch fields *several"],
        present: Bool[Tensor, "batch fields *several"] | None = None,
    ) -> Float[Tensor, "batch fields dim"]:
        """A vector of each field.

        Args:
            index: numbers of features, `[batch, fields]`, or `[batch, fields, several]`.
            value: 1 of a category, the scaled number of a numeric field; a value of 0 gives zeros.
            present: which values are there; all by default. A field without any gives zeros.
        """
        if index.dim() not in (2, 3) or value.shape != index.shape:
            raise InputError(
                f"value: expected the shape of index, [batch, fields] or [batch, fields, several], got "
                f"{list(value.shape)} beside {list(index.shape)}"
            )
        there = torch.ones_like(index, dtype=torch.bool) if present is None else present
        if there.dtype != torch.bool or there.shape != index.shape:
            raise InputError(
                f"present: expected bool {list(index.shape)} as index, got {there.dtype} {list(there.shape)}"
            )
        index, value = index.masked_fill(~there, 0), value.masked_fill(~there, 0)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.features:
            raise InputError(
                f"index: expected 0 to {self.features - 1}, got {int(index.min())} to {int(index.max())}; encode the table "
                f"with the encoder that the model was made for"
            )
        e = self.table(index) * value.to(self.table.weight).unsqueeze(-1)
        return e if index.dim() == 2 else e.sum(2) / there.sum(2, keepdim=True).clamp(min=1)


class Explained(NamedTuple):
    """`logit` `[batch, outputs]`, and of each layer what each field took of each, `[batch, heads, fields, fields]`."""

    logit: Float[Tensor, "batch outputs"]
    weights: tuple[Float[Tensor, "batch heads fields fields"], ...]


class AutoInt(nn.Module):
    """`logit = w . flatten(Y_L) + b`, fields embedded and crossed by interacting layers; AutoInt+ adds the logit of an MLP.

    Args:
        features: how many numbers of features there are.
        fields: how many fields a row has.
        dim: width of the embeddings.
        blocks: units of each interacting layer; none at all is logistic regression on the embeddings.
        heads, residual, paper_form: see `InteractingLayer`.
        deep: widths of the MLP on the embeddings, such as `(400, 400)`; None for none.
        outputs: 1 for two classes; else one logit for each.
        dropout: of the attention weights.
        embedding_dropout: of the embeddings, and of the MLP's hidden layers.

    Example:
        >>> AutoInt(10, 2, blocks=(8, 8))(torch.tensor([[1, 7]]), torch.ones(1, 2)).shape
        torch.Size([1, 1])

    Source: Song et al. (2019), arXiv 1810.11921, and DeepGraphLearning/RecommenderSystems.
    """

    layer: ClassVar[type[InteractingLayer]] = InteractingLayer

    def __init__(
        self,
        features: int,
        fields: int,
        *,
        dim: int = 16,
        blocks: Sequence[int] = (16, 16),
        heads: int = 2,
        residual: bool = True,
        paper_form: bool = False,
        deep: Sequence[int] | None = None,
        outputs: int = 1,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least(1, fields=fields, outputs=outputs)
        require_rate(embedding_dropout=embedding_dropout)
        self.fields, self.outputs = fields, outputs
        self.embed = FieldEmbeddings(features, dim)
        self.dropout = nn.Dropout(embedding_dropout)
        widths = [dim, *blocks]
        self.blocks = nn.ModuleList(
            self.layer(a, b, heads=heads, residual=residual, paper_form=paper_form, dropout=dropout)
            for a, b in pairwise(widths)
        )
        self.output = nn.Linear(fields * widths[-1], outputs)
        nn.init.normal_(self.output.weight, std=(2 / (fields * widths[-1] + 1)) ** 0.5)
        nn.init.zeros_(self.output.bias)
        self.deep = None if deep is None else mlp(fields * dim, deep, outputs, embedding_dropout)

    def forward(
        self,
        index: Int[Tensor, "batch fields *several"],
        value: Float[Tensor, "batch fields *several"],
        present: Bool[Tensor, "batch fields *several"] | None = None,
    ) -> Float[Tensor, "batch outputs"]:
        """Logits of rows; see `FieldEmbeddings` for what a row is."""
        return self.explain(index, value, present).logit

    def explain(
        self,
        index: Int[Tensor, "batch fields *several"],
        value: Float[Tensor, "batch fields *several"],
        present: Bool[Tensor, "batch fields *several"] | None = None,
    ) -> Explained:
        """The same, with the attention maps of each row."""
        return self.of_embeddings(self.embed(index, value, present))

    def of_embeddings(self, e: Float[Tensor, "batch fields dim"]) -> Explained:
        """Of fields that are embedded already."""
        if e.shape[1] != self.fields:
            raise InputError(f"index: expected {self.fields} fields, got {e.shape[1]}")
        y = e = self.dropout(e)
        weights = []
        for block in self.blocks:
            assert isinstance(block, InteractingLayer)
            y, map_ = block.attend(y)
            weights.append(map_)
        logit = self.output(y.flatten(1))
        if self.deep is not None:
            logit = logit + self.deep(e.flatten(1))
        return Explained(logit, tuple(weights))


def mlp(inputs: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear maps with ReLU and dropout between them."""
    require_all_positive(hidden=hidden)
    widths = [inputs, *hidden]
    steps: list[nn.Module] = []
    for a, b in pairwise(widths):
        steps += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*steps, nn.Linear(widths[-1], outputs))
