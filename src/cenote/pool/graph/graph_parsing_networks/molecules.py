"""The encoder of Graph Parsing Networks for molecules: convolutions that read the bonds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.pool.graph.base import sum_by

ATOM_KINDS = (119, 5, 12, 12, 10, 6, 6, 2, 2)
BOND_KINDS = (5, 6, 2)


class MoleculeEncoder(nn.Module):
    """Atoms and bonds, described by numbered kinds, to node features: `GraphParsingPool(..., encoder=...)`.

    `h_0 = sum_c E_c[x_c]` over the columns; `h_{l+1} = Dropout(ReLU(BatchNorm(BondConv(h_l))))`, the last without ReLU.

    Args:
        hidden: width of the features.
        layers: number of convolutions.
        atom_kinds: for each column of `x`, how many kinds it tells apart; their sum of embeddings is an atom's first feature.
        bond_kinds: likewise for the columns of `edge_attr`.
        dropout: behind each convolution.

    Raises:
        InputError: where there is no column or no layer.

    Example:
        >>> encoder = MoleculeEncoder(8, layers=2, atom_kinds=(10, 3), bond_kinds=(4,))
        >>> pool = cenote.pool.GraphParsingPool(2, hidden=8, encoder=encoder, readout="levels")
        >>> atoms, bonds = torch.tensor([[6.0, 0.0], [8.0, 1.0], [6.0, 2.0]]), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> pool(atoms, bonds, torch.tensor([[1], [1], [2], [2]])).shape
        torch.Size([1, 8])

    Source: Song et al., "Graph Parsing Networks", ICLR 2024: for ogbg-molpcba, five convolutions of width 300, dropout 0.3,
        before a hierarchy with `gnn_layers=3, parse_layers=1, activate_last=False, dropout=0.3, readout="levels"`.

    Note:
        The default kinds are those of the Open Graph Benchmark's molecules: atomic number, chirality, degree, charge,
        hydrogens, radical electrons, hybridisation, aromatic, in a ring; and bond type, stereo, conjugated. Batch
        normalisation makes training, not evaluation, depend on who is in the batch.
    """

    def __init__(
        self,
        hidden: int = 300,
        layers: int = 5,
        atom_kinds: Sequence[int] = ATOM_KINDS,
        bond_kinds: Sequence[int] = BOND_KINDS,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        require_at_least(1, layers=layers)
        self.atoms = KindEmbedding("x", atom_kinds, hidden)
        self.convs = nn.ModuleList([BondConv(hidden, bond_kinds) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in range(layers)])
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Shaped[Tensor, "nodes columns"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Shaped[Tensor, "edges _"],
    ) -> Float[Tensor, "nodes hidden"]:
        """Features of the atoms.

        Args:
            x: the kinds of each atom, whole numbers from 0.
            edge_index: every bond in both directions.
            edge_attr: the kinds of each bond.

        Raises:
            InputError: where a number is no kind of its column.
        """
        h = self.atoms(x)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h, edge_index, edge_attr))
            h = self.dropout(torch.relu(h) if i < len(self.convs) - 1 else h)
        return h


class BondConv(nn.Module):
    """`y_i = sum_j ReLU(W x_j + b_ij) / sqrt(d_i d_j) + ReLU(W x_i + r) / d_i`, with `d` the number of neighbours plus 1.

    Args:
        dim: width of a node.
        bond_kinds: kinds that each column of `edge_attr` tells apart; `b_ij` is the sum of their embeddings.
    """

    def __init__(self, dim: int, bond_kinds: Sequence[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.root = nn.Parameter(torch.randn(dim))
        self.bonds = KindEmbedding("edge_attr", bond_kinds, dim)

    def forward(
        self,
        x: Float[Tensor, "nodes dim"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Shaped[Tensor, "edges columns"] | None,
    ) -> Float[Tensor, "nodes dim"]:
        h, (start, end) = self.linear(x), edge_index
        degree = 1 + start.bincount(minlength=len(x)).to(h.dtype)
        scale = (degree[start] * degree[end]).rsqrt().unsqueeze(1)
        heard = sum_by(scale * torch.relu(h[start] + self.bonds(edge_attr)), end, len(x))
        return heard + torch.relu(h + self.root) / degree.unsqueeze(1)


class KindEmbedding(nn.Module):
    """Sum over the columns of the embedding of each one's kind.

    Args:
        name: of the argument, for messages.
        kinds: how many kinds each column tells apart.
        dim: width of the embeddings.
    """

    def __init__(self, name: str, kinds: Sequence[int], dim: int) -> None:
        super().__init__()
        if not kinds or min(kinds) < 1:
            raise InputError(f"{name}: expected columns with at least one kind each, got {list(kinds)}")
        self.name = name
        self.kinds = tuple(kinds)
        self.table = nn.Embedding(sum(kinds), dim)
        with torch.no_grad():
            for rows in self.table.weight.split(self.kinds):
                nn.init.xavier_uniform_(rows)
        starts = torch.tensor([0, *kinds]).cumsum(0)[:-1]
        self.starts: Tensor
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, kinds: Shaped[Tensor, "rows columns"] | None) -> Float[Tensor, "rows dim"]:
        if kinds is None or kinds.dim() != 2 or kinds.shape[1] != len(self.kinds):
            came = "nothing" if kinds is None else f"shape {tuple(kinds.shape)}"
            raise InputError(f"{self.name}: expected [rows, {len(self.kinds)}] numbers of kinds, got {came}")
        numbers = kinds.long()
        for i, count in enumerate(self.kinds):
            wrong = numbers[(numbers[:, i] < 0) | (numbers[:, i] >= count), i]
            if len(wrong):
                raise InputError(f"{self.name}: column {i} has kinds from 0 to {count - 1}, got {int(wrong[0])}")
        return self.table(numbers + self.starts).sum(1)
