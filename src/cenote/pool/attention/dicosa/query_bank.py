from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_positive


def query_bank_normalise(
    similarity: Float[Tensor, "queries items"],
    bank: Float[Tensor, "bank items"],
    beta: float = 70.0,
    top_k: int = 1,
) -> Float[Tensor, "queries items"]:
    """Normalise similarities at test time by those of a bank of training queries, against items that suit every query.

    `log(exp(beta s_qi) / sum_b exp(beta s_bi))` for the queries whose best item some query of the bank has among its `top_k`;
    for the others `beta s_qi`. It is for ranking the items of one query: the numbers of different rows are not on one scale.

    Args:
        similarity: of test queries with the items.
        bank: of training queries with the same items.
        beta: inverse temperature; the authors take 70 or 50.
        top_k: how many items each query of the bank retrieves.

    Raises:
        InputError: where the items are not the same or a number makes no sense.

    Example:
        >>> s, bank = torch.tensor([[0.9, 0.8]]), torch.tensor([[0.9, 0.1], [0.9, 0.2]])  # item 0 suits everybody
        >>> query_bank_normalise(s, bank).argmax(1).tolist()
        [1]

    Source: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", CVPR 2022, as used by Jin et al., IJCAI 2023.

    Note:
        Their code divides the exponentials; the logarithm keeps the ranking and cannot overflow.
    """
    if bank.dim() != 2 or bank.shape[1] != similarity.shape[1] or not len(bank):
        raise InputError(
            f"bank: expected [bank queries, {similarity.shape[1]}] with at least one query, got shape {tuple(bank.shape)}"
        )
    require_positive(beta=beta)
    if not 1 <= top_k <= bank.shape[1]:
        raise InputError(f"top_k: expected between 1 and the number of items {bank.shape[1]}, got {top_k}")
    retrieved = torch.zeros(bank.shape[1], dtype=torch.bool, device=bank.device)
    retrieved[bank.topk(top_k, dim=1).indices.flatten()] = True
    scaled = beta * similarity
    normalised = scaled - (beta * bank).logsumexp(0)
    return torch.where(retrieved[similarity.argmax(1)].unsqueeze(1), normalised, scaled)
