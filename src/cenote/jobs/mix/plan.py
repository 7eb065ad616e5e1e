"""What a comparison of policies would take, from a timed sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cenote.jobs.mix.arms import BASELINE, Read
from cenote.jobs.mix.measure import BURST, TRIES, Bench

SAMPLE = 4
"""Tokens that are decoded by each policy."""
WAYS = 3
"""That a token is timed in: by a policy, as loaded, by the exact path."""


@dataclass(frozen=True)
class PlannedArm:
    """One arm, and the seconds that it would take."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What would be compared.

    Attributes:
        arms: those that would be measured.
        skipped: methods that would not, and why.
        seconds: that all would take on this machine.
        facts, contexts, texts, length: what on.
    """

    arms: tuple[PlannedArm, ...]
    skipped: dict[str, str]
    seconds: float
    facts: int
    contexts: int
    texts: int
    length: int


def planned(bench: Bench, arms: Sequence[Read], skipped: dict[str, str]) -> Plan:
    """Each policy at its largest budget behind half a text, and what follows for all arms."""
    timed: dict[str, tuple[float, float]] = {}
    unfit = {arm.name: reason for arm in arms if (reason := arm.unfit()) is not None}
    arms = [arm for arm in arms if arm.name not in unfit]
    for arm in sorted(arms, key=lambda a: -(a.budget or 0)):
        if arm.policy not in timed:
            timed[arm.policy] = _timed(bench, arm)
    loaded = timed[BASELINE]
    decoded = len(bench.stretches)
    asked = sum(made.asked.prompt.shape[1] for made in bench.contexts)
    found = []
    for arm in arms:
        prefill, step = timed[arm.policy]
        reading = 2 * prefill * len(bench.contexts) + prefill * len(bench.passages)
        # questions of one context are a batch, and cost more than one token each
        telling = step * (decoded + 2 * asked)
        timing = WAYS * (2 * loaded[0] + TRIES * (BURST + 1) * step)
        found.append(PlannedArm(arm.name, reading + telling + timing))
    return Plan(
        tuple(found), {**skipped, **unfit}, sum(arm.seconds for arm in found), len(bench.facts), len(bench.contexts),
        len(bench.passages), bench.length,
    )  # fmt: skip


@torch.inference_mode()
def _timed(bench: Bench, arm: Read) -> tuple[float, float]:
    """Seconds of the first half of a text, and of a token behind it."""
    passage = bench.passages[0].to(bench.device)
    half = passage.shape[1] // 2
    with arm.made().on(bench.model):
        start = time.perf_counter()
        cache = bench.prefilled(passage[:, :half])
        prefill = time.perf_counter() - start
        bench.step(cache, passage[:, half])
        start = time.perf_counter()
        for at in range(1, SAMPLE + 1):
            bench.step(cache, passage[:, half + at])
        step = (time.perf_counter() - start) / SAMPLE
    return prefill, step
