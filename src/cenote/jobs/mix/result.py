"""What came out of comparing policies on a decoder: plain data that the report, the command line and Python read alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from cenote.compare.result import ArmResult
from cenote.compare.smaller import Smaller, lowest
from cenote.compare.words import Words, counted

JOB = "mix"
LOSS = 0.02
FASTER = 1.05
"""Times the exact path, from which something is called faster, if each try says so."""


@dataclass(frozen=True, kw_only=True)
class PolicyResult(ArmResult):
    """A decoder with one policy at one budget.

    Attributes:
        metric: share of the facts that were told.
        policy: name of the method.
        role: `"dense"`, `"window"`, `"random"`, `"oracle"`, or `"policy"`.
        budget: of keys, where there is one.
        forgets: whether keys are taken out of the cache, for ever; else memory is kept, and fewer keys are read.
        prompts: whether it acts on the prompt too.
        share: of the keys that reading all would have read, those that were, counted in the store.
        keys: that one key head read for one token, on average.
        most: at most.
        bytes: of a text's cache at its end, with room for more.
        log_loss: mean of `-log p` of the tokens in the last halves of texts.
        over_dense: how much more than with all keys, and the 95 % interval of that.
        over_window: how much more than sink + window of as many keys, see `window_of`; empty where there is none.
        agreement: share of these tokens where the likeliest is that of all keys.
        fact_log_loss: mean of `-log p` of a fact's number.
        depths: share of facts told, by parts of the context from its beginning.
        prefill_s: seconds of a prompt; `prefill_loaded_s` as the model was loaded, run in turn.
        ms: of one token behind it; `loaded_ms` as loaded, `exact_ms` by the exact path, run in turn.
        over_loaded, over_exact: how many times quicker than those, the median of the tries.
        least_over_exact: the least.
    """

    policy: str
    role: str
    budget: int | None = None
    forgets: bool = False
    prompts: bool = False
    share: float = 1.0
    keys: float
    most: int = 0
    bytes: int
    log_loss: float
    over_dense: tuple[float, ...] = (0.0, 0.0, 0.0)
    over_window: tuple[float, ...] = ()
    agreement: float = 1.0
    fact_log_loss: float
    depths: tuple[float, ...] = ()
    prefill_s: float
    prefill_loaded_s: float
    ms: float
    loaded_ms: float
    exact_ms: float
    over_loaded: float
    over_exact: float
    least_over_exact: float

    @property
    def cost(self) -> float | None:
        """Keys that one key head reads for one token."""
        return self.keys

    @property
    def perplexity(self) -> float:
        """Of the tokens in the last halves of texts."""
        return math.exp(min(self.log_loss, 700.0))

    @property
    def faster(self) -> bool:
        """Whether it is quicker than the exact path, each try taken for itself."""
        return self.role in ("policy", "window") and self.over_exact >= FASTER and self.least_over_exact > 1


@dataclass(frozen=True, kw_only=True, repr=False)
class PolicyFrontier(Smaller[PolicyResult]):
    """The whole verdict of `cenote mix` of a decoder: what fewer keys cost in facts, and what they save.

    Attributes:
        dataset: model, facts and texts, in numbers.
        loss: how much of the facts may be lost.
        detectable: a difference that this many facts show four times out of five.
        job: tells the file from those of other jobs.
    """

    result_type: ClassVar[type[Any]] = PolicyResult

    dataset: dict[str, Any]
    loss: float = LOSS
    detectable: float = float("nan")
    job: str = JOB

    @property
    def candidates(self) -> tuple[PolicyResult, ...]:
        """What may be recommended: policies, and the window, which is one; those that read fewest keys first."""
        found = [r for r in self.results if r.role in ("policy", "window")]
        return tuple(sorted(found, key=lambda r: (r.keys, -r.metric)))

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row per arm, best first: what a data frame is made of."""
        return [
            {
                **self.beside_baseline(r),
                "memory": self.memory(r),
                "share": r.share,
                "keys": r.keys,
                "bytes": r.bytes,
                "perplexity": r.perplexity,
                "over_dense": r.over_dense,
                "agreement": r.agreement,
                "prefill_s": r.prefill_s,
                "ms": r.ms,
                "over_loaded": r.over_loaded,
                "over_exact": r.over_exact,
            }
            for r in self.results
        ]

    def best(self, loss: float | None = None, forgets: bool | None = None) -> str | None:
        """The arm that reads fewest keys of which the data say that it loses no more.

        The lower end of its difference's interval says so. `None` where there is none; random keys and the oracle are never it.

        Args:
            loss: share of the facts; default: that of the comparison.
            forgets: among policies that do, or that keep all memory, alone.
        """
        allowed = self.loss if loss is None else loss
        lower = {t.first: lowest(t, self.dataset["facts"]) for t in self.against_baseline}
        fit = [r for r in self.candidates if forgets is None or r.forgets == forgets]
        return next((r.method for r in fit if lower[r.method] >= -allowed), None)

    def window_of(self, result: PolicyResult) -> PolicyResult | None:
        """Sink + window of as many keys; of a policy without a budget, or that reads more somewhere, the largest that reads no
        more on average."""
        if result.role == "dense":
            return None
        windows = [r for r in self.results if r.role == "window" and r.method != result.method]
        if result.budget is not None and result.most <= result.budget:
            return next((r for r in windows if r.budget == result.budget), None)
        fit = [r for r in windows if r.keys <= result.keys]
        return max(fit, key=lambda r: r.keys, default=None)

    def told(self, result: PolicyResult) -> int:
        """How many facts it told."""
        return round(result.metric * self.dataset["facts"])

    def memory(self, result: PolicyResult) -> str:
        """What becomes of keys that are not read."""
        return "forgets" if result.forgets else "keeps all"

    @property
    def standard_error(self) -> float:
        """Of the share of facts that an arm tells, at most: where it tells half of them."""
        return math.sqrt(0.25 / self.dataset["facts"])

    @property
    def tested(self) -> str:
        """On what, in words."""
        d = self.dataset
        return f"{counted(d['facts'], 'fact')} in {counted(d['contexts'], 'context')} of {d['length']:,} tokens"

    @property
    def words(self) -> Words:
        """Shares of facts are told in per cent."""
        return Words(arms="policies", percent=True, cost="keys")
