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
