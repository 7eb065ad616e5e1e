from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.sets import Bags
from cenote.core.tokenwise import ROWS_AT_ONCE
from cenote.pool.bags.midam.optimizer import MIDAM
from cenote.pool.bags.midam.scorers import BagScorer


@runtime_checkable
class Bag(Protocol):
    """Instances that can be counted and chosen by their numbers: a tensor, a numpy array on disk, ..."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Any: ...


class Sample(NamedTuple):
    """A few instances of some bags, and which slots are real (`None`: all)."""

    x: Float[Tensor, "bags instances *features"]
    mask: Bool[Tensor, "bags instances"] | None


class TwoClassBatches:
    """Endless batches of bag numbers with both classes in each and no bag twice.

    Each class is passed over in an order of its own, drawn anew after every pass.

    Args:
        y: labels 0 and 1.
        positives, negatives: bags of each class in a batch; of a smaller class, all.
        generator: of the order.

    Raises:
        InputError: where there is one class only.

    Example:
        >>> batches = TwoClassBatches(torch.tensor([1, 0, 0, 0, 1]), 1, 2)
        >>> index = next(iter(batches))
        >>> len(index), int(torch.tensor([1, 0, 0, 0, 1])[index].sum())
        (3, 1)
    """

    def __init__(
        self, y: Tensor, positives: int = 8, negatives: int = 8, generator: torch.Generator | None = None
    ) -> None:
        y = y.flatten()
        require_at_least(1, positives=positives, negatives=negatives)
        self.members = [(y == c).nonzero().squeeze(1) for c in (1, 0)]
        if not all(len(m) for m in self.members) or sum(map(len, self.members)) < len(y):
            raise InputError(f"y: expected labels 0 and 1, both of them there; got {y.unique().tolist()[:10]}")
        self.counts = [min(n, len(m)) for n, m in zip((positives, negatives), self.members, strict=True)]
        self.generator = generator
        self.left = [m[:0] for m in self.members]

    def __iter__(self) -> Iterator[Int[Tensor, "batch"]]:
        while True:
            yield self.draw()

    def draw(self) -> Int[Tensor, "batch"]:
        """The next batch."""
        parts = []
        for c, (members, count) in enumerate(zip(self.members, self.counts, strict=True)):
            if len(self.left[c]) < count:
                # a pass is cut short rather than have a bag twice in a batch
                self.left[c] = members[torch.randperm(len(members), generator=self.generator)]
            parts.append(self.left[c][:count])
            self.left[c] = self.left[c][count:]
        return torch.cat(parts)


def sample_rows(rows: int, count: int, generator: torch.Generator | None = None) -> list[int]:
    """`min(rows, count)` different numbers below `rows`, uniformly, in time and memory of `count` (Floyd's algorithm).

    >>> sorted(sample_rows(3, 5))
    [0, 1, 2]
    >>> len(set(sample_rows(10**9, 100)))
    100
    """
    if count >= rows:
        return list(range(rows))
    chosen: dict[int, None] = {}
    for last in range(rows - count, rows):
        drawn = int(torch.randint(last + 1, (), generator=generator))
        chosen[last if drawn in chosen else drawn] = None
    return list(chosen)


def sample_instances(
    bags: Sequence[Bag] | Bags, index: Int[Tensor, "batch"], count: int, generator: torch.Generator | None = None
) -> Sample:
    """`min(|X|, count)` instances of each bag, uniformly without replacement; only these are read.

    Args:
        bags: `Bags`, a list of tensors, of arrays on disk, or of anything that gives rows by their numbers.
        index: which bags.
        count: instances per bag.
        generator: of the draw.
    """
    drawn = [_rows(bags[i], i, count, generator) for i in index.tolist()]
    longest = max(len(d) for d in drawn)
    if all(len(d) == longest for d in drawn):
        return Sample(torch.stack(drawn), None)
    x = drawn[0].new_zeros(len(drawn), longest, *drawn[0].shape[1:])
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for i, d in enumerate(drawn):
        x[i, : len(d)], mask[i, : len(d)] = d, True
    return Sample(x, mask)


class MIDAMTrainer:
    """Trains a bag scorer on a few instances per bag and step, for the AUC of the exact pooled scores.

    Args:
        model: the scorer; its mode and temperature must be those of the optimiser's loss.
        optimizer: holds the loss.
        bags: see `sample_instances`; in the order of the loss's estimates.
        y: labels 0 and 1 of the bags.
        instances: sampled per bag and step.
        positives, negatives: bags per step.
        seed: of batches and instances.

    Raises:
        InputError: where the numbers of bags, labels and estimates differ, or the scorer's mode or temperature is not the
            loss's.

    Example:
        >>> from cenote.pool import MIDAM, MIDAMSmoothedMax, MIDAMSmoothedMaxLoss
        >>> bags = [torch.randn(n, 3) for n in (5, 9, 4, 7)]
        >>> model, loss = MIDAMSmoothedMax(torch.nn.Linear(3, 1)), MIDAMSmoothedMaxLoss(bags=4)
        >>> trainer = MIDAMTrainer(model, MIDAM(model.parameters(), loss), bags, torch.tensor([1, 0, 1, 0]))
        >>> len(trainer.fit(3))
        3

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.
    """

    def __init__(
        self,
        model: BagScorer,
        optimizer: MIDAM,
        bags: Sequence[Bag] | Bags,
        y: Tensor,
        instances: int = 4,
        positives: int = 8,
        negatives: int = 8,
        seed: int = 0,
    ) -> None:
        if not len(bags) == len(y) == optimizer.loss.bags:
            raise InputError(f"bags: {len(bags)} of them, {len(y)} labels, {optimizer.loss.bags} estimates in the loss")
        require_at_least(1, instances=instances)
        optimizer.loss.require_scorer(model)
        self.model = model
        self.optimizer = optimizer
        self.loss = optimizer.loss
        self.bags = bags
        self.y = y.flatten()
        self.instances = instances
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = TwoClassBatches(self.y, positives, negatives, self.generator)

    def step(self) -> float:
        """One step; the value of the surrogate before it."""
        index = self.batches.draw()
        x, mask = sample_instances(self.bags, index, self.instances, self.generator)
        self.model.train()
        loss = self.loss(self.model.sampled(x, mask), self.y[index], index)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def fit(self, steps: int) -> list[float]:
        """So many steps; the value of the surrogate at each."""
        return [self.step() for _ in range(steps)]

    @torch.no_grad()
    def scores(self, bags: Sequence[Bag] | Bags, rows_at_once: int = ROWS_AT_ONCE) -> Float[Tensor, "bags"]:
        """Exact scores of whole bags; of each, at most so many rows are in memory."""
        self.model.eval()
        out = []
        for number, bag in enumerate(bags):
            if not len(bag):
                raise InputError(f"bags: bag {number} has no instance; leave it out")
            parts, counts = [], []
            for start in range(0, len(bag), rows_at_once):
                rows = _tensor(bag[start : start + rows_at_once])
                parts.append(self.model.sampled(rows.unsqueeze(0)))
                counts.append(len(rows))
            out.append(self.model.joined(parts, counts))
        return torch.cat(out)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had not stopped; `torch.save` and `weights_only` loading work."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "left": [part.clone() for part in self.batches.left],
            "kind": self._kind(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            InputError: where the state is that of another mode, temperature or number of bags.
        """
        saved, own = state.get("kind", self._kind()), self._kind()
        if saved != own:
            raise InputError(f"state: was saved of {saved}, this trainer has {own}; build it as the saved one was")
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.batches.left = [part.clone() for part in state["left"]]

    def _kind(self) -> dict[str, Any]:
        return {"loss": type(self.loss).__name__, "tau": getattr(self.loss, "tau", None), "bags": self.loss.bags}


def _rows(bag: Bag, number: int, count: int, generator: torch.Generator | None) -> Tensor:
    if not len(bag):
        raise InputError(f"bags: bag {number} has no instance; leave it out")
    return _tensor(bag[sample_rows(len(bag), count, generator)])


def _tensor(rows: Any) -> Tensor:
    x = torch.as_tensor(rows)
    return x if x.is_floating_point() else x.float()
