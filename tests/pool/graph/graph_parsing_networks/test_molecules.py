"""The bond-aware encoder against its equation, node by node."""

import pytest
import torch
from tests.graphs import both_ways, joined, path
from torch import Tensor

from cenote.core import InputError
from cenote.pool import GraphParsingNetwork, GraphParsingPool, MoleculeEncoder
from cenote.pool.graph.graph_parsing_networks.molecules import BondConv

pytest.importorskip("torch_geometric")

ATOMS, BONDS = (7, 3), (4, 2)
RING = both_ways([(0, 1), (1, 2), (2, 3), (3, 0), (3, 4)])


def molecule(nodes: int, edges: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.stack([torch.randint(k, (nodes,), generator=generator) for k in ATOMS], 1).double()
    bonds = torch.stack([torch.randint(k, (edges.shape[1],), generator=generator) for k in BONDS], 1)
    return atoms, bonds


def test_a_convolution_is_its_equation() -> None:
    conv, x = BondConv(6, BONDS).double(), torch.randn(5, 6, dtype=torch.float64)
    _, bonds = molecule(5, RING, 0)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    degree = RING[0].bincount(minlength=5) + 1
    for i in range(5):
        expected[i] = torch.relu(conv.linear(x[i]) + conv.root) / degree[i]
        for e, (j, to) in enumerate(RING.T.tolist()):
            if to == i:
                bond = conv.bonds.table.weight[bonds[e, 0]] + conv.bonds.table.weight[BONDS[0] + bonds[e, 1]]
                expected[i] += torch.relu(conv.linear(x[j]) + bond) / (degree[i] * degree[j]) ** 0.5
    torch.testing.assert_close(conv(x, RING, bonds), expected)


def test_the_encoder_stacks_convolutions_and_the_last_is_not_rectified() -> None:
    encoder = MoleculeEncoder(6, 2, ATOMS, BONDS).double().eval()
    atoms, bonds = molecule(5, RING, 1)
    torch.nn.init.constant_(encoder.norms[1].bias, -1.0)
    table, kinds = encoder.atoms.table.weight, atoms.long()
    h = table[kinds[:, 0]] + table[ATOMS[0] + kinds[:, 1]]
    h = torch.relu(encoder.norms[0](encoder.convs[0](h, RING, bonds)))
    h = encoder.norms[1](encoder.convs[1](h, RING, bonds))
    torch.testing.assert_close(encoder(atoms, RING, bonds), h)
    assert float(h.detach().min()) < 0


def test_a_parser_of_molecules_hears_the_bonds_and_not_the_batch() -> None:
    pool = GraphParsingPool(2, hidden=6, gnn_layers=1, encoder=MoleculeEncoder(6, 2, ATOMS, BONDS), readout="levels")
    pool.eval()
    first, second = molecule(5, RING, 2), molecule(9, path(9), 3)
    x, edges, batch = joined([(first[0], RING), (second[0], path(9))])
    whole = pool(x.float(), edges, torch.cat([first[1], second[1]]), batch)
    torch.testing.assert_close(whole[:1], pool(first[0].float(), RING, first[1]))
    other = first[1].clone()
    other[:, 0] = (other[:, 0] + 1) % BONDS[0]
    assert not torch.allclose(whole[:1], pool(first[0].float(), RING, other))


def test_it_learns_what_only_the_bonds_say() -> None:
    torch.manual_seed(0)
    encoder = MoleculeEncoder(8, 2, ATOMS, BONDS, dropout=0.0)
    pool = GraphParsingPool(2, 8, 1, dropout=0.0, encoder=encoder, readout="levels")
    model = GraphParsingNetwork(pool, outputs=2, dropout=0.0)
    graphs = [(torch.ones(5, 2), RING) for _ in range(12)]
    x, edges, batch = joined(graphs)
    y = torch.arange(12) % 2
    bonds = torch.stack([y.repeat_interleave(RING.shape[1]), torch.zeros(12 * RING.shape[1]).long()], 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    before = encoder.norms[0].running_mean.clone()  # type: ignore[union-attr, operator]
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(x, edges, bonds, batch), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1
    assert not torch.equal(encoder.norms[0].running_mean, before)  # type: ignore[arg-type]


def test_wrong_kinds_are_named() -> None:
    encoder = MoleculeEncoder(6, 1, ATOMS, BONDS)
    atoms, bonds = molecule(5, RING, 0)
    with pytest.raises(InputError, match="edge_attr: expected"):
        encoder(atoms, RING, None)
    with pytest.raises(InputError, match="x: column 0 has kinds from 0 to 6"):
        encoder(atoms + 7, RING, bonds)
    with pytest.raises(InputError, match="x: expected"):
        encoder(atoms[:, :1], RING, bonds)
    with pytest.raises(InputError, match="layers"):
        MoleculeEncoder(6, 0)
    with pytest.raises(InputError, match="edge_attr"):
        MoleculeEncoder(6, 1, ATOMS, ())
