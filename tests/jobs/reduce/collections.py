"""Small collections whose best reduction is known."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cenote.core import Bags

Qrels = dict[int, dict[int, float]]


def drawn(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def themes(
    documents: int = 40, queries: int = 40, tokens: int = 8, dim: int = 16, noise: float = 0.5
) -> tuple[Bags, Bags, Qrels]:
    """Each document has tokens of its own, in pairs that follow each other; a query asks for two of them."""
    own = drawn(documents, tokens // 2, dim, seed=0)
    pairs = own.repeat_interleave(2, 1) + noise * drawn(documents, tokens, dim, seed=1) * dim**-0.5
    asked = torch.stack([own[q % documents][torch.tensor([0, -1])] for q in range(queries)])
    asked = asked + 1.5 * noise * drawn(queries, 2, dim, seed=2)
    return Bags.from_list(list(pairs)), Bags.from_list(list(asked)), {q: {q % documents: 1.0} for q in range(queries)}


def half_noise(documents: int = 30, dim: int = 16, seed: int = 0) -> tuple[Bags, Bags, Qrels]:
    """The first half of each document is the same noise in all of them; what is asked stands in the second."""
    noise, own = drawn(4, dim, seed=seed), drawn(documents, 2, dim, seed=seed + 100)
    made = [torch.cat([noise, tokens.repeat_interleave(2, 0)]) for tokens in own]
    asked = own[:, :1] + 0.8 * drawn(documents, 1, dim, seed=seed + 200)
    return Bags.from_list(made), Bags.from_list(list(asked)), {q: {q: 1.0} for q in range(documents)}


def duplicates(documents: int = 30, dim: int = 16, seed: int = 0) -> tuple[Bags, Bags, Qrels]:
    """Each token stands four times, in any order."""
    own = drawn(documents, 3, dim, seed=seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    asked = own[:, :2] + 1.8 * drawn(documents, 2, dim, seed=seed + 200)
    return (
        Bags.from_list([tokens.repeat(4, 1)[order] for tokens in own]),
        Bags.from_list(list(asked)),
        {q: {q: 1.0} for q in range(documents)},
    )
