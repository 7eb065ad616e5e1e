"""Looking up words in a dictionary: the task that static attention cannot do.

Source: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?", ICLR 2022, section 3.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.fitting import in_training
from cenote.mix.gatv2.network import ATTENTIVE
from cenote.mix.gatv2.static import rank_agreement

MOST = 32_000


def permutations(k: int, most: int = MOST, seed: int = 0) -> Int[Tensor, "rows k"]:
    """All orders of `k` values, or so many different ones drawn at random where there are more.

    >>> permutations(3).shape, permutations(8, most=50).shape
    (torch.Size([6, 3]), torch.Size([50, 8]))
    """
    require_at_least(1, k=k, most=most)
    if math.factorial(k) <= most:
        return torch.tensor(list(itertools.permutations(range(k))))
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < most:
        drawn = torch.rand(most - len(found), k, generator=generator).argsort(1)
        found.update(dict.fromkeys(map(tuple, drawn.tolist())))
    return torch.tensor(list(found))


class Split(NamedTuple):
    """Dictionaries to train on, and those with pairs of key and value that are in none of them."""

    train: Int[Tensor, "rows k"]
    test: Int[Tensor, "others k"]


def unseen_combinations(orders: Int[Tensor, "rows k"], share: float = 0.8, seed: int = 0) -> Split:
    """Allow a random part of all pairs of key and value; dictionaries of allowed pairs alone are trained on.

    Args:
        orders: the value of each key.
        share: of dictionaries that are trained on, about: `share^(1 / k)` of the pairs are allowed.
        seed: of the part.
    """
    k = orders.shape[1]
    if not 0 < share <= 1:
        raise InputError(f"share: expected a part, above 0 to 1, got {share}")
    order = torch.randperm(k * k, generator=torch.Generator().manual_seed(seed))
    allowed = torch.zeros(k * k, dtype=torch.bool)
    allowed[order[: round(k * k * share ** (1 / k))]] = True
    inside = allowed[torch.arange(k) * k + orders].all(1)
    return Split(orders[inside], orders[~inside])


class Lookup(nn.Module):
    """One layer between `k` keys that ask and `k` pairs of key and value; logits of the value of each key.

    `h = relu(K[key] + V[value])`, with a row of either table for what is not there; no loops, no bias behind.

    Args:
        k: number of keys.
        dim: width.
        heads: of the layer, means of which are taken, `dim` wide each.
        conv: `"gatv2"`, `"gat"` or `"dot"`.
        settings: of the layer, such as `slope`.

    Example:
        >>> Lookup(4, 8)(torch.tensor([[2, 0, 1, 3]])).shape
        torch.Size([1, 4, 4])
    """

    def __init__(
        self, k: int, dim: int = 128, heads: int = 1, conv: Literal["gatv2", "gat", "dot"] = "gatv2", **settings: Any
    ) -> None:
        super().__init__()
        require_at_least(1, k=k, dim=dim)
        require_one_of(ATTENTIVE, conv=conv)
        self.keys, self.values = nn.Embedding(k + 1, dim), nn.Embedding(k + 1, dim)
        self.conv = ATTENTIVE[conv](dim, dim, heads, join=False, loops=False, **settings)
        self.out = nn.Linear(dim, k, bias=False)
        self.k = k

    def forward(self, orders: Int[Tensor, "batch k"]) -> Float[Tensor, "batch k k"]:
        """Logits of the value of each key."""
        asking, known = self.nodes(orders)
        every = torch.ones(1, self.k, self.k, dtype=torch.bool, device=orders.device)
        return self.out(self.conv.dense(asking, known, every).output)

    def nodes(
        self, orders: Int[Tensor, "batch k"]
    ) -> tuple[Float[Tensor, "batch k dim"], Float[Tensor, "batch k dim"]]:
        """Those that ask, and those that know, `[batch, k, dim]`."""
        keys = self.keys.weight[: self.k]
        asking = (keys + self.values.weight[self.k]).relu().expand(len(orders), -1, -1)
        return asking, (keys + self.values(orders)).relu()

    @torch.no_grad()
    def agreement(self, orders: Int[Tensor, "batch k"]) -> float:
        """How much those that ask agree on the order of those that know, the mean over heads: 1 for static attention."""
        asking, known = self.nodes(orders)
        q, k, _ = self.conv.projected(known, asking)
        return float(rank_agreement(self.conv.dense_scores(q, k)).mean())


def train_lookup(
    model: Lookup,
    orders: Int[Tensor, "rows k"] | None = None,
    *,
    steps: int,
    batch: int = 1024,
    learning_rate: float = 1e-3,
    clip: float = 1.0,
    patience: int = 20,
    every: int = 50,
    seed: int = 0,
) -> list[float]:
    """Train by Adam; the rate is halved where the loss stops falling.

    Args:
        model: trained in place, left in eval mode.
        orders: dictionaries to train on; None draws fresh ones at each step.
        steps, batch: of the training.
        learning_rate: at the beginning.
        clip: largest norm of the gradient.
        patience: so many looks at the loss without a fall.
        every: steps between two looks.
        seed: of the draws.

    Returns:
        The loss of each step.

    Note:
        The authors' benchmark drops out half of all features, in evaluation too, and gives loops to GAT alone; neither is done.
    """
    require_at_least(1, steps=steps, batch=batch, every=every)
    if orders is not None and (orders.dim() != 2 or orders.shape[1] != model.k or not len(orders)):
        raise InputError(f"orders: expected [rows, {model.k}] with a row, got {list(orders.shape)}")
    stepper = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(stepper, factor=0.5, patience=patience)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with in_training(model):
        for step in range(1, steps + 1):
            if orders is None:
                drawn = torch.rand(batch, model.k, generator=generator).argsort(1)
            else:
                drawn = orders[torch.randint(len(orders), (batch,), generator=generator)]
            loss = F.cross_entropy(model(drawn).flatten(0, 1), drawn.flatten())
            stepper.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            stepper.step()
            losses.append(float(loss.detach()))
            if step % every == 0:
                schedule.step(sum(losses[-every:]) / every)
    return losses


@torch.no_grad()
def lookup_accuracy(model: Lookup, orders: Int[Tensor, "rows k"], batch: int = 1024) -> float:
    """Share of the keys whose value is found."""
    right = [(model(part).argmax(-1) == part).float().mean(1) for part in orders.split(batch)]
    return float(torch.cat(right).mean())
