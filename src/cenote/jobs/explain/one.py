"""One explanation of one item, in numbers and in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cenote.core import InputError
from cenote.explain.base import Attribution
from cenote.jobs.explain.arms import explanations
from cenote.jobs.explain.measure import Bench
from cenote.jobs.explain.result import JOB, Audit
from cenote.jobs.explain.subject import Subject

USUAL = "occlusion"
"""Of what nobody has audited yet: it asks the model itself, and what it says needs no theory."""
NAMED = 3
SPEAKS_FROM = 0.2
"""Share of the largest score from which a unit that speaks against the class is named."""


@dataclass(frozen=True)
class Looked:
    """What one explanation says of one item.

    Attributes:
        method: its name.
        label: the explained class.
        probability: of it.
        words: the units.
        scores: of each, above 0 where it speaks for the class.
    """

    method: str
    label: str
    probability: float
    words: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def sentence(self) -> str:
        """In words.

        >>> Looked("occlusion", "good", 0.912, ("a", "lovely", "plot"), (0.0, 2.0, -1.0)).sentence[43:]
        "The word » lovely « is most important for the prediction. Against it: 'plot'."
        """
        found = Attribution(
            torch.tensor([self.scores]), torch.ones(1, len(self.scores), dtype=torch.bool), "words"
        ).named([self.words])
        said = f"{self.label!r} with probability {self.probability:.3f} ({self.method}). {found.sentence()}"
        least = SPEAKS_FROM * max(map(abs, self.scores), default=0.0)
        order = sorted(range(len(self.scores)), key=self.scores.__getitem__)
        against = [repr(self.words[i]) for i in order if self.scores[i] < 0 and -self.scores[i] >= least][:NAMED]
        return f"{said} Against it: {', '.join(against)}." if against else said


def look(subject: Subject, method: str = USUAL, item: int = 0) -> Looked:
    """Explain one item.

    Raises:
        InputError: where there is no such explanation, or it does not fit the model.
    """
    bench = Bench(subject)
    arms, skipped = explanations(bench, [method], {}, (0,), "")
    arm = arms[0]
    if arm.control or (why := arm.unfit()) is not None:
        raise InputError(f"{method}: {skipped.get(method) if arm.control else why}")
    scored = arm.scorers[0](subject, item, int(bench.target[item])).tokens
    size = bench.settings[0].size
    real = bench.real(size)[item]
    scores = bench.of_units(scored.expand(len(bench), -1), size)[item]
    label = subject.labels[int(bench.target[item])]
    return Looked(method, label, float(bench.whole[item]), tuple(subject.words(item)), tuple(scores[real].tolist()))


def recommended_by(out: Path) -> str:
    """The explanation that the audit in a folder recommends; the usual one where there is none.

    Raises:
        InputError: where the folder holds something else.
    """
    if not (Path(out) / "comparison.json").is_file():
        return USUAL
    try:
        audit = Audit.load(out)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"out: {out} holds no audit of explanations; name another folder, or --methods") from error
    return audit.recommended if audit.job == JOB and audit.recommended else USUAL
