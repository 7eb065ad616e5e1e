"""What the tests of graph pools share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def both_ways(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """`edge_index` of undirected edges, sorted."""
    return torch.tensor(sorted([*pairs, *((v, u) for u, v in pairs)]), dtype=torch.int64).reshape(-1, 2).T


def path(nodes: int) -> Tensor:
    return both_ways([(i, i + 1) for i in range(nodes - 1)])


def star(leaves: int) -> Tensor:
    return both_ways([(0, i + 1) for i in range(leaves)])


def random_graph(nodes: int, edges: int, seed: int = 0) -> Tensor:
    """So many pairs drawn at random; repeats and loops are left out."""
    drawn = torch.randint(nodes, (edges, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return both_ways(sorted({(min(p), max(p)) for p in drawn if p[0] != p[1]}))


def joined(graphs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """`x, edge_index, batch` of several `(x, edge_index)`."""
    sizes = [len(x) for x, _ in graphs]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = torch.cat([e + s for (_, e), s in zip(graphs, starts, strict=True)], 1)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.cat([x for x, _ in graphs]), edges, batch
