"""What an audit of explanations found: plain data that the report, the command line and Python read alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cenote.compare.result import ArmResult
from cenote.compare.result import Comparison as Table
from cenote.compare.words import Words

JOB = "explain"


@dataclass(frozen=True, kw_only=True)
class ExplanationResult(ArmResult):
    """One explanation, over all items. What was not measured is `None`.

    Attributes:
        metric: faithfulness, see `cenote.jobs.explain.measure`.
        family: what it reads: attention, gradients, perturbation, ..., or control.
        comprehensiveness: mean fall of the probability without the top units; more is better.
        sufficiency: mean fall with nothing but the top units; less is better.
        deletion: how far the curve of deletion lies below that of random scores, by area; more is better.
        insertion: how far that of insertion lies above; more is better.
        infidelity: what scores fail to tell of the fall under random masks, 0 to 1; less is better.
        sparsity: Gini index of the scores.
        stability: rank correlation between seeds, of what draws.
        unchanged: rank correlation with what it says of the model with random weights.
        completeness_error: mean miss of the sum, of what promises one, in logits.
        ms: milliseconds per item.
        megabytes: peak of one item.
        pointing: of images with masks, how often the largest score is in the mask.
        mass_inside: which part of what speaks for the class is in it.
        iou: of the mask and as many patches with the largest scores.
        struck: whether it said the same of random weights: shown, never the winner.
    """

    family: str
    comprehensiveness: float
    sufficiency: float
    infidelity: float
    sparsity: float
    deletion: float = 0.0
    insertion: float = 0.0
    stability: float | None = None
    unchanged: float | None = None
    completeness_error: float | None = None
    ms: float | None = None
    megabytes: float | None = None
    pointing: float | None = None
    mass_inside: float | None = None
    iou: float | None = None
    struck: bool = False

    @property
    def cost(self) -> float | None:
        """The time."""
        return self.ms


@dataclass(frozen=True, kw_only=True, repr=False)
class Audit(Table[ExplanationResult]):
    """The whole verdict of `cenote explain`.

    Attributes:
        dataset: the model, the items, their units, and how many are told right where labels are known.
        orders: setting (size of units, fill) -> arm -> faithfulness; the first one decides.
        order: whether they agree, in words.
        attention: what this audit says of attention, in words; empty where that is not a question.
        agreement: mean rank correlation of each pair of explanations, in the order of `results`.
        disputed: items on which explanations disagree most, with their mean correlation.
        curves: arm -> mean probability along `points`, with so many units deleted, and inserted.
        points: shares of the units.
        gallery: items with the scores of all arms, for pictures.
        job: tells the file from those of other jobs.
    """

    result_type: ClassVar[type[Any]] = ExplanationResult

    dataset: dict[str, Any]
    orders: dict[str, dict[str, float]] = field(default_factory=dict)
    order: str = ""
    attention: str = ""
    agreement: tuple[tuple[float, ...], ...] = ()
    disputed: tuple[tuple[str, float], ...] = ()
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    points: tuple[float, ...] = ()
    gallery: dict[str, Any] = field(default_factory=dict)
    job: str = JOB

    @property
    def struck(self) -> tuple[str, ...]:
        """The explanations that said the same of random weights."""
        return tuple(r.method for r in self.results if r.struck)

    @property
    def localised(self) -> bool:
        """Whether masks told where explanations should point."""
        return any(r.pointing is not None for r in self.results)

    @property
    def tested(self) -> str:
        """On how many items, in words."""
        return f"{self.dataset['items']:,} {self.dataset['kind']}"

    @property
    def words(self) -> Words:
        """Faithfulness is a difference of probabilities."""
        return Words(
            arms="explanations",
            reference="{}, which was struck out,",
            remedy="what the items give away without the model",
        )
