"""Which heads read the subject and which the relation, and whether insufficient parts sum to the answer.

Source: Chughtai, Cooney and Nanda (2024), arXiv 2402.07321.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError

HeadKind = Literal["subject", "relation", "mixed"]
TOP, RATIO = 10, 10.0


class HeadClass(NamedTuple):
    """A head, what it reads for the answer, and how much each group of tokens gives through it."""

    layer: int
    head: int
    kind: HeadKind
    subject: float
    relation: float


def head_classes(
    subject: Float[Tensor, "prompts layers heads"],
    relation: Float[Tensor, "prompts layers heads"],
    whole: Float[Tensor, "prompts layers heads"] | None = None,
    *,
    top: int = TOP,
    ratio: float = RATIO,
) -> list[HeadClass]:
    """The heads that move the answer most, by what they read; averaged over the prompts of one relation.

    A head is of the subject where what it takes from the subject is more than `ratio` times what it takes from the relation,
    of the relation where it is the other way round, and mixed between; the thresholds are from memory of the paper.

    Args:
        subject, relation: parts of the answer's logit by source group, of `LogitParts.groups`.
        whole: parts of all sources, by which the top heads are chosen; the sum of the two groups by default.
        top: how many heads are classified.
        ratio: of magnitudes of mean parts.

    Example:
        >>> subject, relation = torch.tensor([[[3.0, 0.0, 1.0]]]), torch.tensor([[[0.1, 2.5, 1.0]]])
        >>> [found.kind for found in head_classes(subject, relation)]
        ['subject', 'relation', 'mixed']
    """
    if subject.shape != relation.shape or (whole is not None and whole.shape != subject.shape):
        raise InputError(f"subject, relation: of {tuple(subject.shape)} and {tuple(relation.shape)}; expected the same")
    if top < 1 or not ratio >= 1:
        raise InputError(f"top, ratio: expected at least 1, got {top} and {ratio}")
    by_subject, by_relation = subject.mean(0), relation.mean(0)
    strength = (subject + relation if whole is None else whole).mean(0).abs()
    heads = strength.shape[1]
    order = strength.flatten().argsort(descending=True, stable=True)[:top].tolist()
    found = []
    for layer, head in (divmod(i, heads) for i in order):
        s, r = float(by_subject[layer, head]), float(by_relation[layer, head])
        kind: HeadKind = "mixed"
        if abs(s) > ratio * abs(r):
            kind = "subject"
        elif abs(r) > ratio * abs(s):
            kind = "relation"
        found.append(HeadClass(layer, head, kind, s, r))
    return found


class Recall(NamedTuple):
    """How well a group of parts, summed, names the answer among candidates.

    Attributes:
        top1: share of prompts where the answer has the largest sum.
        rank: mean rank of the answer, from 1.
        over_relation: mean lead over the other attributes of the relation.
        over_subject: mean lead over the subject's attributes under other relations; NaN where there are none.
    """

    top1: float
    rank: float
    over_relation: float
    over_subject: float


def recall(
    logits: Float[Tensor, "prompts candidates"],
    answer: Int[Tensor, "prompts"],
    of_relation: Bool[Tensor, "prompts candidates"],
    of_subject: Bool[Tensor, "prompts candidates"],
) -> Recall:
    """Of one group's sums, or of the whole logits.

    Args:
        logits: of each candidate attribute.
        answer: the number of the right one.
        of_relation: candidates that are attributes of the relation (R).
        of_subject: candidates that are attributes of the subject (S).

    Example:
        >>> logits, yes = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> recall(logits, torch.tensor([0]), yes, yes)
        Recall(top1=1.0, rank=1.0, over_relation=1.5, over_subject=1.5)
    """
    at = answer[:, None]
    own = logits.gather(1, at)
    others = torch.ones_like(of_relation).scatter(1, at, False)
    # a tie is no success
    rank = 1 + ((logits >= own) & others).sum(1)

    def lead(span: Tensor) -> float:
        kept = span & others
        counts = kept.sum(1)
        leads = own[:, 0] - (logits * kept).sum(1) / counts.clamp(min=1)
        return float(leads[counts > 0].mean())

    return Recall(float((rank == 1).float().mean()), float(rank.float().mean()), lead(of_relation), lead(of_subject))


def constructive(groups: Mapping[str, Float[Tensor, "prompts candidates"]], answer: Int[Tensor, "prompts"]) -> float:
    """The share of prompts where the answer is the only candidate that every group boosts; of centred parts.

    >>> a, b = torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[1.0, -1.0, 1.0]])
    >>> constructive({"subject": a, "relation": b}, torch.tensor([0]))
    1.0
    """
    if len(groups) < 2:
        raise InputError(f"groups: expected at least two, got {', '.join(groups) or 'none'}")
    boosted = torch.stack([parts > 0 for parts in groups.values()]).all(0)
    alone = boosted.sum(1) == 1
    return float((alone & boosted.gather(1, answer[:, None])[:, 0]).float().mean())


class Boost(NamedTuple):
    """What feed-forward parts give the attributes of the relation.

    Attributes:
        lead: mean part on them less the mean on other candidates, of each layer.
        spread: standard deviation over them, relative to the lead's magnitude; small where all are raised alike.
    """

    lead: Float[Tensor, "layers"]
    spread: Float[Tensor, "layers"]


def boost(mlps: Float[Tensor, "prompts layers candidates"], of_relation: Bool[Tensor, "prompts candidates"]) -> Boost:
    """Whether feed-forward parts raise all attributes of a relation, and how evenly.

    Example:
        >>> found = boost(torch.tensor([[[2.0, 2.0, -1.0]]]), torch.tensor([[True, True, False]]))
        >>> found.lead.tolist(), found.spread.tolist()
        ([3.0], [0.0])
    """
    inside = of_relation[:, None].to(mlps)
    outside = 1 - inside
    if not bool(inside.sum(2).all()) or not bool(outside.sum(2).all()):
        raise InputError("of_relation: every prompt needs candidates inside of its relation and outside")
    mean = (mlps * inside).sum(2) / inside.sum(2)
    other = (mlps * outside).sum(2) / outside.sum(2)
    lead = (mean - other).mean(0)
    deviation = (((mlps - mean[..., None]) * inside).square().sum(2) / inside.sum(2)).sqrt().mean(0)
    return Boost(lead, deviation / lead.abs().clamp(min=torch.finfo(lead.dtype).tiny))
