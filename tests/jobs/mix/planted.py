"""Comparisons whose cells are made up, judged and worded as real ones are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tests.jobs.mix import decoders

from cenote.compare.cells import Cell
from cenote.jobs.mix import PolicyFrontier, compare_policies, measure
from cenote.jobs.mix.arms import ROLES, Read
from cenote.mix import SinkWindow


class Last(SinkWindow):
    """Somebody's own policy: the last keys."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget, sinks=0)


class Made(NamedTuple):
    """What an arm is said to have measured: facts told of all, log-loss above that of all keys, speed beside the exact path."""

    told: Sequence[int]
    over: float = 0.0
    speed: float = 1.0
    forgets: bool = False


def first(told: int, of: int) -> list[int]:
    """So many facts, the first ones."""
    return [int(n < told) for n in range(of)]


def compared(
    made: Mapping[str, Made], policies: Sequence[str], budgets: Sequence[int], facts: int, **asked: Any
) -> PolicyFrontier:
    """`made` by the names of arms; what is not named tells nothing."""

    def run(arm: Read, *_: object) -> Cell:
        m = made.get(arm.name, Made([0] * facts, 0.3))
        tokens = len(arm.bench.stretches)
        noise = torch.randn(tokens, generator=torch.Generator().manual_seed(len(arm.name))).double() * 0.01
        keys = 50.0 if arm.budget is None else float(arm.budget)
        record = {
            "policy": arm.policy, "role": ROLES.get(arm.policy, "policy"), "budget": arm.budget, "forgets": m.forgets,
            "share": keys / 50, "keys": keys, "most": int(keys), "bytes": 4096, "log_loss": 2.0 + m.over,
            "fact_log_loss": 1.0, "depths": [0.5] * 4, "prefill_s": 0.1, "prefill_loaded_s": 0.1, "ms": 1.0 / m.speed,
            "loaded_ms": 1.1, "exact_ms": 1.0, "over_loaded": 1.1 * m.speed, "over_exact": m.speed,
            "least_over_exact": m.speed, "seconds": 1.0, "settings": {},
        }  # fmt: skip
        scores = torch.tensor(m.told, dtype=torch.double)[None]
        loss = 2.0 + m.over + (noise if m.over else 0.0 * noise)
        return Cell(arm.name, record, {"scores": scores, "loss": loss, "said": torch.zeros(tokens, dtype=torch.long)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Read, "run", run)
        patch.setattr(Read, "unfit", lambda _: None)
        patch.setattr(measure, "TOGETHER", 8)
        return compare_policies(
            decoders.model(max_position_embeddings=512), decoders.tokenizer(), decoders.texts(700), policies, budgets,
            facts=facts, length=250, **asked,
        )  # fmt: skip
