"""What explanations are measured by, and on what: registered here, before any is looked at.

Explanations are ranked by **faithfulness**: ERASER's comprehensiveness minus its sufficiency, at 1, 5, 10, 20 and 50 % of an
item's units, of the probability of the explained class. It is a number per item, so that pairs can be tested. Units of the
first size and the first fill decide; the others say whether the order hangs on that choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.perturb import of_tokens, perturbed
from cenote.core.redrawn import rank_correlation
from cenote.explain import metrics
from cenote.explain.metrics import SHARES
from cenote.jobs.explain.subject import Subject

METRIC = "faithfulness"
POINTS = (0.0, *SHARES, 1.0)
"""Shares of the units at which curves of deletion and insertion are known."""
RANDOM_MASKS = 8
RANDOMISED_ITEMS = 10
REDRAWS = 2


@dataclass(frozen=True)
class Setting:
    """A size of units and what stands for those that are taken away."""

    size: str
    fill: str

    def __str__(self) -> str:
        return f"{self.size}, {self.fill}"


class Bench:
    """A subject, what of it is explained, and what all explanations of it are compared with.

    Args:
        subject: model and items.
        target: the explained class of each item; default: the one that the model chooses.

    Raises:
        InputError: where the model gives no finite numbers, or there are too few classes or parts.
    """

    def __init__(self, subject: Subject, target: Int[Tensor, "items"] | None = None) -> None:
        self.subject = subject
        sizes, fills = list(subject.sizes), subject.fills
        self.settings = (
            Setting(sizes[0], fills[0]),
            *(Setting(sizes[0], fill) for fill in fills[1:]),
            *(Setting(size, fills[0]) for size in sizes[1:]),
        )
        if len(subject.labels) < 2:
            raise InputError(
                f"model: has {len(subject.labels)} class, and an explanation is of a class among 2 or more"
            )
        logits = self._logits()
        self.chosen = logits.argmax(1)
        self.target = self.chosen if target is None else target
        if int(self.target.amax()) >= logits.shape[1] or int(self.target.amin()) < 0:
            raise InputError(
                f"target: expected classes from 0 to {logits.shape[1] - 1}, got {self.target.tolist()[:10]}"
            )
        self.whole = logits.softmax(1).gather(1, self.target[:, None])[:, 0]

    def __len__(self) -> int:
        return len(self.subject.names)

    def told(self) -> list[float]:
        """What tells a model without weights, a function, from another: its outputs; empty where weights do."""
        return [] if self.subject.model.state_dict() else [round(p, 5) for p in self.whole.tolist()]

    def real(self, size: str) -> Bool[Tensor, "items units"]:
        """Which units there are."""
        unit = self.subject.sizes[size]
        found = torch.zeros(len(unit), int(unit.amax()) + 2, dtype=torch.bool)
        return found.scatter(1, unit + 1, True)[:, 1:]

    def of_units(self, scores: Float[Tensor, "items tokens"], size: str) -> Float[Tensor, "items units"]:
        """Scores of tokens, summed over each unit."""
        unit = self.subject.sizes[size]
        found = scores.new_zeros(len(unit), int(unit.amax()) + 2)
        return found.scatter_add(1, unit + 1, scores)[:, 1:]

    def probability(self, keep: Bool[Tensor, "items masks units"], setting: Setting) -> Float[Tensor, "items masks"]:
        """Of the explained class, where only some units are kept."""
        unit = self.subject.sizes[setting.size]

        def run(items: Int[Tensor, "rows"], kept: Bool[Tensor, "rows units"]) -> Float[Tensor, "rows outputs"]:
            logits = self.subject.outputs(items, of_tokens(kept, unit[items]), setting.fill)
            return logits.softmax(1).gather(1, self.target[items, None])

        return perturbed(run, keep, self.real(setting.size))[..., 0]

    @cached_property
    def random_masks(self) -> Bool[Tensor, "items masks units"]:
        """What infidelity takes away: any share of the units, drawn once for all explanations."""
        generator = torch.Generator().manual_seed(0)
        real = self.real(self.settings[0].size)
        share = torch.rand(len(real), RANDOM_MASKS, 1, generator=generator)
        return torch.rand(len(real), RANDOM_MASKS, real.shape[1], generator=generator) >= share

    @cached_property
    def random_falls(self) -> Float[Tensor, "items masks"]:
        """Of the probability, under each of them."""
        return self.whole[:, None] - self.probability(self.random_masks, self.settings[0])

    @cached_property
    def redrawn(self) -> tuple[Subject, ...]:
        """The same subject with random weights; empty where the model has none."""
        has = any(p.dim() > 1 for p in self.subject.model.parameters())
        return tuple(self.subject.with_weights_redrawn(seed) for seed in range(REDRAWS)) if has else ()

    def _logits(self) -> Float[Tensor, "items classes"]:
        first = self.settings[0]
        real = self.real(first.size)
        for name, own in zip(self.subject.names, real.sum(1).tolist(), strict=True):
            if own < 2:
                raise InputError(f"{name}: has {own} of {first.size}, and 2 are needed to rank them; leave it out")
        unit = self.subject.sizes[first.size]

        def run(items: Int[Tensor, "rows"], kept: Bool[Tensor, "rows units"]) -> Float[Tensor, "rows outputs"]:
            return self.subject.outputs(items, of_tokens(kept, unit[items]), first.fill)

        logits = perturbed(run, real[:, None], real)[:, 0]
        bad = ~logits.isfinite().all(1)
        if bool(bad.any()):
            name = self.subject.names[int(bad.nonzero()[0])]
            raise InputError(
                f"model: gives NaN or infinite logits for {int(bad.sum())} of {len(bad)} items, {name} first"
            )
        if len(bad) > 1 and all(bool((c == c[0]).all()) for c in self.subject.content()):
            raise InputError(f"inputs: all {len(bad)} are the same; give items that differ")
        return logits


def measured(
    bench: Bench, scores: Float[Tensor, "items tokens"], setting: Setting
) -> dict[str, Float[Tensor, "items *points"]]:
    """Of one explanation of all items: faithfulness, what it is made of, and the curves of deletion and insertion."""
    real, own = bench.real(setting.size), bench.of_units(scores, setting.size)
    without, only = metrics.without_top(own, real), metrics.only_top(own, real)
    nothing = torch.zeros_like(real)[:, None]
    found = bench.probability(torch.cat([without, only, nothing], 1), setting)
    taken, kept, empty = found.split([len(SHARES), len(SHARES), 1], 1)
    whole = bench.whole
    comprehensiveness, sufficiency = metrics.comprehensiveness(whole, taken), metrics.sufficiency(whole, kept)
    return {
        METRIC: comprehensiveness - sufficiency,
        "comprehensiveness": comprehensiveness,
        "sufficiency": sufficiency,
        "deletion": torch.cat([whole[:, None], taken, empty], 1),
        "insertion": torch.cat([empty, kept, whole[:, None]], 1),
    }


def stability(per_seed: Float[Tensor, "seeds items units"], real: Bool[Tensor, "items units"]) -> float | None:
    """Mean rank correlation between seeds; `None` of a single one."""
    seeds = len(per_seed)
    if seeds < 2:
        return None
    pairs = [(a, b) for a in range(seeds) for b in range(a + 1, seeds)]
    return float(torch.stack([metrics.agreement(per_seed[a], per_seed[b], real) for a, b in pairs]).mean())


def unchanged(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Mean rank correlation of explanations of two models, item by item; what scores all units alike in both did not change.

    >>> same, other = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])
    >>> unchanged([same], [same]), unchanged([same], [other]), unchanged([torch.ones(3)], [torch.ones(3)])
    (1.0, -1.0, 1.0)
    """
    found = []
    for a, b in zip(before, after, strict=True):
        if len(a) > 2:
            alike = all(bool((s == s[0]).all()) for s in (a, b))
            found.append(1.0 if alike else rank_correlation(a, b))
    return sum(found) / len(found) if found else None
