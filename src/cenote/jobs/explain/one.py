"""One explanation of one item, in numbers and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cenote.core import InputError
from cenote.jobs.explain.arms import explanations
from cenote.jobs.explain.measure import Bench
from cenote.jobs.explain.result import JOB, Audit
from cenote.jobs.explain.subject import Subject

USUAL = "occlusion"
"""Of what nobody has audited yet: it asks the model itself, and what it says needs no theory."""
NAMED = 3
SPEAKS_FROM = 0.2
"""Share of the largest score from which a unit is named."""


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

        >>> Looked("occlusion", "good", 0.912, ("a", "lovely", "plot"), (0.0, 2.0, -1.0)).sentence
        "'good' with probability 0.912: 'lovely' speaks most for it, 'plot' against it (occlusion)."
        """
        largest = max(map(abs, self.scores), default=0.0)
        if not largest:
            return f"{self.label!r} with probability {self.probability:.3f}: no word stands out ({self.method})."
        told: list[str] = []
        for sign, words in ((1.0, "most for it"), (-1.0, "against it")):
            order = sorted(range(len(self.scores)), key=lambda i: -sign * self.scores[i])
            named = [self.words[i] for i in order if sign * self.scores[i] >= SPEAKS_FROM * largest][:NAMED]
            if named:
                verb = "" if told else "speaks " if len(named) == 1 else "speak "
                told.append(f"{_listed(named)} {verb}{words}")
        return f"{self.label!r} with probability {self.probability:.3f}: {', '.join(told)} ({self.method})."


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


def _listed(words: Sequence[str]) -> str:
    quoted = [repr(w) for w in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
