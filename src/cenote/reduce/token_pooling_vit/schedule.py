"""How many tokens each block leaves: listed, a constant share, or searched for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.reduced import Reduced
from cenote.core.requirements import require_at_least, require_positive
from cenote.reduce.base import Budget
from cenote.reduce.reducible_vit.model import ReducibleViT
from cenote.reduce.token_pooling_vit.reducers import KMedoidsTokens


def pooling_at(
    tokens: Sequence[int],
    *,
    first: int = 0,
    reducer: Callable[..., Any] = KMedoidsTokens,
    **settings: Any,
) -> dict[int, Any]:
    """A pooling layer in each block: what `ReducibleViT.run(images, at=...)` takes.

    Args:
        tokens: `K` of each block, [CLS] not counted; where a block has no more than that it leaves all.
        first: the block of the first number.
        reducer: its class.
        settings: of the class.

    Example:
        >>> sorted(pooling_at([64, 32, 16], first=1))
        [1, 2, 3]
    """
    for before, after in pairwise(tokens):
        if after > before:
            raise InputError(f"tokens: do not become more from block to block, got {list(tokens)}")
    return {first + n: reducer(tokens=k, **settings) for n, k in enumerate(tokens)}


def constant_share(patches: int, blocks: int, share: float) -> list[int]:
    """`K` of each block where each leaves the same share of what it reads, at least one token.

    >>> constant_share(64, 4, 0.5)
    [32, 16, 8, 4]
    """
    require_at_least(1, patches=patches, blocks=blocks)
    budget, found = Budget(fraction=share), []
    for _ in range(blocks):
        patches = int(budget.of(torch.tensor([patches])))
        found.append(patches)
    return found


class SoftExtract(nn.Module):
    """All tokens of a block, each times how much of its rank is retained; the search learns that, and then it goes.

    Ranks are those of what tokens are given in attention. Stands where a reducer would in `ReducibleViT.run`.

    Args:
        tokens: of a block, [CLS] not counted.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    rows = "all"

    def __init__(self, tokens: int) -> None:
        super().__init__()
        require_at_least(1, tokens=tokens)
        self.retention = nn.Parameter(torch.ones(tokens))

    def retained(self) -> Float[Tensor, "tokens"]:
        """By rank, from 0 to 1, the most significant first: they never rise."""
        return self.retention.clamp(0, 1).sort(descending=True).values

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"] | None = None,
        mask: Tensor | None = None,
        protect: int = 0,
        *,
        attention: Float[Tensor, "batch heads tokens"],
    ) -> Reduced:
        order = attention[..., protect:].sum(1).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=x.device).expand_as(order))
        factor = F.pad(self.retained()[rank], (protect, 0), value=1.0)
        own = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        known = torch.ones_like(x[..., 0]) if sizes is None else sizes
        return Reduced(x * factor.unsqueeze(-1), known, own, mask)


def searched_schedule(
    vit: ReducibleViT,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    *,
    strength: float,
    epochs: int = 3,
    learning_rate: float = 1e-4,
    retention_rate: float = 1e-2,
    batch: int = 128,
    seed: int = 0,
) -> list[int]:
    """`K` of each block by a search: retention of each rank is trained beside the network under an L1 norm, and `K_l` is the
    rounded sum of what block l retains.

    `cross-entropy + strength sum_l l |r_l|_1 / N`, later blocks weighing more, as what they drop could have gone before.

    Args:
        vit: a trained network; the search changes a copy of it.
        images: of one size.
        labels: their classes.
        strength: of the L1 norm; the more, the fewer tokens.
        epochs: passes over the images.
        learning_rate: of the network.
        retention_rate: of retention.
        batch: images of a step.
        seed: of the order of images.

    Returns:
        One number per block, never rising, at least 1: for `pooling_at`; fine-tune the network with these layers then.

    Source:
        Goyal et al. 2020, "PoWER-BERT: Accelerating BERT Inference via Progressive Word-vector Elimination", arXiv 2001.08950;
        Marin et al. 2021, arXiv 2110.03860, who search with it.
    """
    require_at_least(1, epochs=epochs, batch=batch)
    require_at_least(0, strength=strength)
    require_positive(learning_rate=learning_rate, retention_rate=retention_rate)
    vit = copy.deepcopy(vit).train()
    layers = nn.ModuleList(SoftExtract(vit.patches) for _ in vit.blocks).to(images.device)
    stepper = torch.optim.Adam(
        [{"params": vit.parameters(), "lr": learning_rate}, {"params": layers.parameters(), "lr": retention_rate}]
    )
    generator = torch.Generator().manual_seed(seed)
    at: dict[int, Any] = dict(enumerate(layers))
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            loss = F.cross_entropy(vit(images[chosen], at, proportional=False), labels[chosen])
            mass = sum((n + 1) * layer.retained().mean() for n, layer in enumerate(layers))  # type: ignore[operator]
            stepper.zero_grad()
            (loss + strength * mass).backward()
            stepper.step()
            for layer in layers:
                layer.retention.data.clamp_(0, 1)  # type: ignore[operator]
    found, most = [], vit.patches
    for layer in layers:
        most = min(most, max(1, round(float(layer.retained().sum()))))  # type: ignore[operator]
        found.append(most)
    return found
