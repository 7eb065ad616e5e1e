"""The probe that nobody trains: an item's nearest training items vote for its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.compare.metrics import METRICS
from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_at_least, require_one_of
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe.measure import metric_name
from cenote.jobs.probe.module import build_probe
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.training import vectors

NEIGHBOURS = (5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.07, 0.1, 0.2)


@dataclass(frozen=True)
class NeighbourProbe:
    """The training items that vote, and how.

    Attributes:
        features: of the training items, of length 1.
        labels: their classes.
        classes: how many there are.
        read: the vector of an item: `"cls"`, its first token, or `"mean"`, that of its patches.
        neighbours, temperature: as in `votes`, chosen on validation items.
        metric: what chose them.
        validation: its value there.
    """

    features: Float[Tensor, "train dim"]
    labels: Int[Tensor, "train"]
    classes: int
    read: Literal["cls", "mean"]
    neighbours: int
    temperature: float
    metric: str
    validation: float

    def predict(
        self, data: TokenDataset, items: Int[Tensor, "chosen"], at_once: int = 1024
    ) -> Float[Tensor, "chosen outputs"]:
        """Logits as a trained probe gives them: one for two classes, else the logarithm of each class's share of the vote."""
        x = _unit_features(data, items, self.read)
        near, who = nearest(x, self.features, self.neighbours, at_once)
        return _logits(votes(near, self.labels[who], self.classes, self.neighbours, self.temperature))


def neighbour_probe(
    data: TokenDataset,
    read: Literal["cls", "mean"] = "mean",
    neighbours: Sequence[int] = NEIGHBOURS,
    temperatures: Sequence[float] = TEMPERATURES,
    metric: str | None = None,
    at_once: int = 1024,
) -> NeighbourProbe:
    """Choose the number of neighbours and the temperature on the validation items; nothing is trained.

    Args:
        data: of classes, with items in train and val.
        read: what of an item is compared, see `NeighbourProbe`.
        neighbours: numbers to try; those above the number of training items count as that number.
        temperatures: to try.
        metric: that of the task by default.
        at_once: items that are compared with all training items in one piece, which bounds memory.

    Raises:
        InputError: where the data have no classes, or an argument makes no sense.

    Example:
        >>> from cenote.features import digits
        >>> probe = neighbour_probe(digits())
        >>> probe.neighbours in NEIGHBOURS, probe.predict(digits(), torch.tensor([0, 3])).shape
        (True, torch.Size([2, 10]))

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018; as a probe: Psomas
    et al., "Attention, Please!", 2025.
    """
    if data.task not in ("binary", "multiclass"):
        raise InputError(f"data: neighbours vote for classes, got a {data.task} task; train a probe with cenote.probe")
    require_one_of(("cls", "mean"), read=read)
    require_all_positive(neighbours=neighbours, temperatures=temperatures)
    require_at_least(1, at_once=at_once)
    name = metric_name(data.task, metric)
    train, val = data.indices("train"), data.indices("val")
    if not len(train) or not len(val):
        raise InputError("data: expected items in train and val; give a split with both")
    known, labels, classes = _unit_features(data, train, read), data.y[train], len(data.classes)
    counts = sorted({min(k, len(train)) for k in neighbours})
    near, who = nearest(_unit_features(data, val, read), known, counts[-1], at_once)
    y, ones = data.y[val].numpy(), torch.ones(1, len(val), dtype=torch.float64).numpy()
    tried = {
        (k, t): float(METRICS[name](_logits(votes(near, labels[who], classes, k, t)).numpy(), y, ones)[0])
        for k in counts
        for t in temperatures
    }
    k, t = max(tried, key=tried.__getitem__)
    return NeighbourProbe(known, labels, classes, read, k, t, name, tried[k, t])


def nearest(
    x: Float[Tensor, "items dim"], known: Float[Tensor, "train dim"], count: int, at_once: int = 1024
) -> tuple[Float[Tensor, "items count"], Int[Tensor, "items count"]]:
    """`(cosines, numbers)` of each item's nearest known ones, the nearest first; exact, in pieces; all vectors of length 1."""
    found = [(part @ known.T).topk(count, dim=1) for part in x.split(at_once)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def votes(
    cosines: Float[Tensor, "items count"],
    labels: Int[Tensor, "items count"],
    classes: int,
    neighbours: int,
    temperature: float,
) -> Float[Tensor, "items classes"]:
    """Each class's share of the vote: `sum_i exp(c_i / temperature) [y_i = class]` over the nearest, divided by its sum.

    >>> votes(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1, 0, 0]]), 2, neighbours=2, temperature=0.1).tolist()
    [[0.5, 0.5]]
    """
    weights = (cosines[:, :neighbours] / temperature).softmax(1)
    return weights.new_zeros(len(weights), classes).scatter_add(1, labels[:, :neighbours], weights)


def _logits(shares: Float[Tensor, "items classes"]) -> Float[Tensor, "items outputs"]:
    # a class without a vote stays finite
    logits = shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
    return logits[:, 1:] - logits[:, :1] if shares.shape[1] == 2 else logits


def _unit_features(
    data: TokenDataset, items: Int[Tensor, "chosen"], read: str, tokens_at_once: int = Recipe.tokens_at_once
) -> Float[Tensor, "chosen dim"]:
    return F.normalize(vectors(build_probe(read, data), data, items, tokens_at_once)[items], dim=1)
