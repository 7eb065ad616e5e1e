"""Training on log loss, and what is measured of a click model.

Source: Song et al. (2019), arXiv 1810.11921.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats
from torch import Tensor, nn

from cenote.compare.metrics import accuracy, auroc, negative_log_loss
from cenote.core import InputError
from cenote.core.requirements import require_one_of, require_positive
from cenote.mix.autoint.interacting import averaged
from cenote.mix.autoint.model import AutoInt
from cenote.mix.fitting import Fitted, fit

AT_ONCE = 4096
Keep = Literal["auc", "log_loss"]


class Rows(NamedTuple):
    """Rows of a table as numbers.

    Attributes:
        features: their numbers, `[rows, fields]` or `[rows, fields, several]`.
        value: of each.
        present: of several values which are there; None for all.
    """

    features: Int[Tensor, "rows fields *several"]
    value: Float[Tensor, "rows fields *several"]
    present: Bool[Tensor, "rows fields *several"] | None = None

    def select(self, chosen: Int[Tensor, "chosen"] | slice) -> Self:
        """Those of these numbers."""
        present = None if self.present is None else self.present[chosen]
        return type(self)(self.features[chosen], self.value[chosen], present)


def train_autoint(
    model: nn.Module,
    rows: Rows,
    target: Int[Tensor, "rows"],
    validation: tuple[Rows, Int[Tensor, "_held"]] | None = None,
    *,
    epochs: int = 3,
    batch: int = 1024,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    patience: int | None = None,
    keep: Keep = "auc",
    random_state: int = 0,
) -> Fitted:
    """Train by log loss with Adam; a deep branch is trained along. The defaults are the published ones.

    Args:
        model: an `AutoInt`, or a rival; trained in place and left in eval mode.
        rows, target: to train on; classes from 0.
        validation: rows and classes, by which the best epoch is kept.
        epochs, batch, lr, weight_decay: of Adam. The MovieLens configuration also drops 0.4 of the attention weights and 0.1 of
            the embeddings: `AutoInt(dropout=0.4, embedding_dropout=0.1)`.
        patience: epochs without a better score behind which it ends.
        keep: the epoch with the best AUC (accuracy, of several classes), or that with the best log loss: of ranks that are
            right early, probabilities may still be wrong.
        random_state: of order and dropout.

    Raises:
        InputError: where a class is the same for all, or targets do not fit.

    Example:
        >>> from cenote.mix import TableEncoder
        >>> table = {"colour": ["red", "blue", "red", "blue"], "size": [1.0, 2.0, 3.0, None]}
        >>> encoder = TableEncoder().fit(table)
        >>> model = AutoInt(encoder.features, len(encoder.names))
        >>> rows = encoder.transform(table)
        >>> len(train_autoint(model, rows, torch.tensor([0, 1, 1, 0])).losses)
        3
    """
    require_positive(lr=lr)
    require_one_of(get_args(Keep), keep=keep)
    _check(rows, target, "target")
    if target.unique().numel() < 2:
        raise InputError(f"target: is {int(target[0])} for all {len(target)} rows; there is nothing to learn")

    def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
        return log_loss(model(*rows.select(chosen)), target[chosen])

    score = None
    if validation is not None:
        held, truth = validation
        _check(held, truth, "validation")
        if truth.unique().numel() < 2:
            raise InputError("validation: holds one class; AUC needs two")

        def score() -> float:
            measured = measure(logits_of(model, held), truth)
            if keep == "log_loss":
                return -measured.log_loss
            return measured.accuracy if measured.auc is None else measured.auc

    stepper = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    return fit(
        model,
        len(target),
        loss,
        [stepper],
        epochs=epochs,
        batch=batch,
        score=score,
        patience=patience,
        random_state=random_state,
    )


def log_loss(logits: Float[Tensor, "batch outputs"], target: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
    """Of one logit that of two classes, else that of as many as there are logits."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype))
    return F.cross_entropy(logits, target)


@torch.no_grad()
def logits_of(model: nn.Module, rows: Rows) -> Float[Tensor, "rows outputs"]:
    """Logits of all rows, some at a time."""
    parts = torch.arange(len(rows.features)).split(AT_ONCE)
    return torch.cat([model(*rows.select(part)) for part in parts])


class Measured(NamedTuple):
    """`auc` of two classes, None of more; `log_loss` and `accuracy` of any."""

    auc: float | None
    log_loss: float
    accuracy: float


def measure(logits: Float[Tensor, "rows outputs"], target: Int[Tensor, "rows"]) -> Measured:
    """AUC and log loss of logits.

    >>> measure(torch.tensor([[-9.0], [9.0]]), torch.tensor([0, 1])).auc
    1.0
    """
    scores, truth = logits.double().numpy(), target.numpy()
    one = np.ones((1, len(truth)))
    both = np.concatenate([np.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores
    auc = float(auroc(scores, truth, one)[0]) if scores.shape[1] == 1 else None
    return Measured(auc, -float(negative_log_loss(scores, truth, one)[0]), float(accuracy(both, truth, one)[0]))


class OverSeeds(NamedTuple):
    """`mean` of a number over seeds, and its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Of a metric of several trainings, by the t distribution.

    >>> over_seeds([0.7, 0.8, 0.9])
    OverSeeds(mean=0.8, low=0.5515..., high=1.0484...)
    """
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2 or not np.isfinite(found).all():
        raise InputError(f"values: expected numbers of two seeds or more, got {list(values)}")
    reach = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5)
    mean = round(float(found.mean()), 12)
    return OverSeeds(mean, mean - reach, mean + reach)


@torch.no_grad()
def interaction_maps(model: AutoInt, rows: Rows) -> Float[Tensor, "layers fields fields"]:
    """What each field takes of each, mean over rows and heads, of each layer: the picture of the paper's case study."""
    if not len(model.blocks):
        raise InputError("model: has no interacting layer, and so no map")
    total: list[Tensor] | None = None
    for part in torch.arange(len(rows.features)).split(AT_ONCE):
        own = [averaged(w) * len(part) for w in model.explain(*rows.select(part)).weights]
        total = own if total is None else [a + b for a, b in zip(total, own, strict=True)]
    if total is None:
        raise InputError("rows: give at least one")
    return torch.stack(total) / len(rows.features)


class Partners(NamedTuple):
    """Mean attention of fields on their true partners, and on fields that do not matter."""

    partners: float
    others: float


def partner_mass(
    maps: Float[Tensor, "fields fields"] | Float[ndarray, "fields fields"], crossed: list[tuple[int, int]]
) -> Partners:
    """How much fields that are crossed in truth look at each other, against how much they look at those that matter not.

    Args:
        maps: what each field takes of each.
        crossed: pairs of fields.

    >>> partner_mass(np.array([[0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]]), [(0, 1)])
    Partners(partners=0.7, others=0.15...)
    """
    found = np.asarray(maps, dtype=np.float64)
    both = [*crossed, *((b, a) for a, b in crossed)]
    inside = {field for pair in crossed for field in pair}
    others = [found[a, b] for a in sorted(inside) for b in range(len(found)) if b not in inside]
    if not crossed or not others:
        raise InputError("crossed: expected pairs of fields, and fields beside them that do not matter")
    return Partners(float(np.mean([found[pair] for pair in both])), float(np.mean(others)))


def _check(rows: Rows, target: Tensor, name: str) -> None:
    if len(target) != len(rows.features):
        raise InputError(f"{name}: expected {len(rows.features)} classes as rows, got {len(target)}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise InputError(f"{name}: expected classes as whole numbers, got {target.dtype}; use target.long()")
