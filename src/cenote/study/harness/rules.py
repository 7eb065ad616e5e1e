"""What makes a study able to fail: knock-outs in the method's place, gates of training, and the verdict that follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cenote.core import InputError
from cenote.study.harness.checks import HOLDS, Check, Holds, decide

Ruling = (
    Holds
    | Literal["not decidable: the rule holds without the mechanism", "not decidable: not trained", "not registered"]
)

WITHOUT: Ruling = "not decidable: the rule holds without the mechanism"
UNTRAINED: Ruling = "not decidable: not trained"
UNREGISTERED: Ruling = "not registered"

STILL = 0.05


@dataclass(frozen=True)
class Part:
    """A part of a rule, written once: it must hold with the method, and not with a knock-out in the method's place.

    Attributes:
        checks: the name of an arm -> the checks, with this arm in the method's place; a check's text names the arm.
        method: the arm of the claim.
        knocked_out: arms that are the method without the mechanism of this part, and with all else.
        against: the other arms that the checks compare it with.
    """

    checks: Callable[[str], Sequence[Check]]
    method: str
    knocked_out: tuple[str, ...]
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnockedOut:
    """A part of the rule with a knock-out in the method's place.

    Attributes:
        arm: the knock-out.
        holds: whether the part holds there too, which it must not.
        checks: those of the part.
    """

    arm: str
    holds: Holds
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Gate:
    """Whether an arm was trained, so that its number says something about it.

    Attributes:
        arm: as the rule calls it.
        beats: its number against a trivial level; `None` for a knock-out, of which may be left no more than that.
        last_fifth: the share that the last fifth of training brought of all that it gained; `None` where nothing is trained.
        allowed: as much as it may be.
    """

    arm: str
    beats: Check | None
    last_fifth: float | None
    allowed: float

    @property
    def passed(self) -> bool:
        """Beats the trivial level, and has stopped improving."""
        above_level = self.beats is None or self.beats.holds == HOLDS
        return above_level and (self.last_fifth is None or self.last_fifth <= self.allowed)


def gate(
    arm: str,
    beats: Check | None,
    losses: Sequence[float] | Sequence[Sequence[float]] | None,
    allowed: float = STILL,
) -> Gate:
    """The gate of an arm.

    Args:
        arm: as the rule calls it.
        beats: its number against a trivial level (chance, the majority, the mean), by `above` or `below`; `None` for a
            knock-out only.
        losses: step by step, of all seeds together or one row per seed; `None` where nothing is trained.
        allowed: share of all that training gained that its last fifth may have brought.
    """
    return Gate(arm, beats, None if losses is None else last_fifth(losses), allowed)


def last_fifth(losses: Sequence[float] | Sequence[Sequence[float]]) -> float:
    """Share of the fall of a loss that fell in its last fifth; 0 where all of it is less than a twentieth of its beginning.

    Compared are the tenth before the last fifth and the last tenth, and the first twentieth stands for the beginning. A loss
    that hardly fell has nothing to stop: such an arm is judged by its level.

    >>> last_fifth([1.0] * 50 + [0.0] * 50), round(last_fifth([1 - n / 100 for n in range(100)]), 2)
    (0.0, 0.22)
    """
    curve = np.atleast_2d(np.asarray(losses, dtype=float)).mean(0)
    if not curve.size or not np.isfinite(curve).all():
        raise InputError(f"losses: expected finite numbers, one per step, got {losses!r}")
    tenth = max(1, len(curve) // 10)
    first, last = curve[: max(1, len(curve) // 20)].mean(), curve[-tenth:].mean()
    before = curve[-3 * tenth : -2 * tenth].mean() if len(curve) >= 3 * tenth else first
    gain = first - last
    if gain <= 0.05 * abs(first):
        return 0.0
    return float(max(0.0, (before - last) / gain))


def knock_out(part: Part) -> tuple[KnockedOut, ...]:
    """The part, with each of its knock-outs in the method's place."""
    found = []
    for arm in part.knocked_out:
        checks = tuple(part.checks(arm))
        found.append(KnockedOut(arm, decide(checks), checks))
    return tuple(found)


def ruled(
    checks: Sequence[Check],
    knocked_out: Sequence[KnockedOut] = (),
    gates: Sequence[Gate] = (),
    unregistered: Sequence[str] = (),
) -> Ruling:
    """The verdict: that of the checks, where the rule is the registered one, every arm was trained, and no knock-out passes."""
    if unregistered:
        return UNREGISTERED
    if not all(g.passed for g in gates):
        return UNTRAINED
    holds = decide(checks)
    return WITHOUT if holds == HOLDS and any(k.holds == HOLDS for k in knocked_out) else holds


def require_able_to_fail(parts: Sequence[Part], gates: Sequence[Gate]) -> None:
    """Raise `InputError` unless a knock-out belongs to some part, and a gate to every arm that a part compares."""
    if not any(p.knocked_out for p in parts):
        raise InputError("parts: a rule needs a knock-out, the method without the mechanism of its claim")
    named = {g.arm: g for g in gates}
    spared = {arm for p in parts for arm in p.knocked_out}
    for arm in dict.fromkeys(a for p in parts for a in (p.method, *p.against, *p.knocked_out)):
        if arm not in named:
            raise InputError(f"gates: the rule compares {arm!r}, which has no gate; those with one: {', '.join(named)}")
        if named[arm].beats is None and arm not in spared:
            raise InputError(f"gates: {arm!r} is no knock-out, so its gate needs a trivial level that it must beat")
