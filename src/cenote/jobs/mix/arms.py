"""What is compared: a decoder as it is, and with each policy at each budget."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from cenote.catalog import Method, create, method, methods
from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.jobs.mix import measure
from cenote.jobs.mix.measure import Bench, by_depth, paired, why_unfit
from cenote.mix.policies import Dense, KVPolicy

BASELINE = "dense"
WINDOW, RANDOM, ORACLE = "sink-window", "random-keys", "oracle-top-k"
ALWAYS = (WINDOW, RANDOM, ORACLE)
BUDGETS = (128, 512)
KIND = "kv-policy"
SETS = ("fast", "all")
Role = Literal["dense", "window", "random", "oracle", "policy"]
ROLES: dict[str, Role] = {BASELINE: "dense", WINDOW: "window", RANDOM: "random", ORACLE: "oracle"}


@dataclass(frozen=True, eq=False)
class Read(Arm):
    """A decoder whose key heads read, or keep, at most so many keys for each token behind the prompt.

    A cell holds whether each fact is told as `scores`, `[1, facts]`; `-log p` of each decoded token as `loss`, and the
    likeliest token in its place as `said`.

    Attributes:
        policy: name of the method; `"dense"`: none acts.
        budget: of keys; `None` where the method has none.
    """

    name: str
    summary: str = field()
    bench: Bench
    policy: str = BASELINE
    budget: int | None = None
    control: bool = False
    reference: bool = False

    def made(self) -> KVPolicy:
        """The policy, anew."""
        return Dense() if self.policy == BASELINE else _made(self.policy, self.budget)

    def key(self) -> Mapping[str, Any]:
        settings = {} if self.policy == BASELINE else method(self.policy).settings or {}
        return {
            "bench": self.bench.fingerprint(),
            "policy": self.policy,
            "budget": self.budget,
            "settings": settings,
        }

    def sources(self) -> tuple[type | ModuleType, ...]:
        return (type(self), measure, type(self.made()))

    def unfit(self) -> str | None:
        return None if self.policy == BASELINE else why_unfit(self.bench.model, self.made())

    def gains_by_processes(self) -> bool:
        """Each is timed beside the model as it is, and products use the threads that there are."""
        return False

    def run(self, on_share: OnShare = unheard) -> Cell:
        bench, policy, start = self.bench, self.made(), time.perf_counter()
        seen = bench.read(policy, lambda share: on_share(self.name, 0.8 * share))
        times = bench.speed(None if self.policy == BASELINE else policy)
        loaded, exact = paired(times.own, times.loaded), paired(times.own, times.exact)
        record = {
            "policy": self.policy,
            "role": ROLES.get(self.policy, "policy"),
            "budget": self.budget,
            "settings": {} if self.budget is None else {"budget": self.budget},
            "forgets": bool(policy.forgets),
            "prompts": "prefill" in policy.acts,
            "share": seen.share,
            "keys": seen.keys,
            "most": seen.most,
            "bytes": seen.bytes,
            "log_loss": float(seen.loss.mean()),
            "fact_log_loss": float(seen.fact_loss.mean()),
            "depths": list(by_depth(seen.told.tolist(), bench.depths)),
            "prefill_s": times.prefill,
            "prefill_loaded_s": times.prefill_loaded,
            "ms": 1000 * min(times.own),
            "loaded_ms": 1000 * min(times.loaded),
            "exact_ms": 1000 * min(times.exact),
            "over_loaded": loaded[0],
            "over_exact": exact[0],
            "least_over_exact": exact[1],
            "seconds": time.perf_counter() - start,
        }
        tensors = {"scores": seen.told.double()[None], "loss": seen.loss, "said": seen.said}
        return Cell(self.name, record, tensors)


def arms(bench: Bench, policies: str | Sequence[str], budgets: Sequence[int]) -> tuple[list[Read], dict[str, str]]:
    """The model as it is, controls, and policies, at all budgets; and of methods that cannot be tried, why.

    Raises:
        InputError: for a policy that there is not, or a budget that it cannot keep.
    """
    which, skipped = tried(policies, budgets, bench.length)
    found = [Read(BASELINE, "all keys", bench)]
    for name, budget in which:
        found.append(
            Read(
                _title(name, budget),
                method(name).summary,
                bench,
                name,
                budget,
                control=name in (WINDOW, RANDOM),
                reference=name == ORACLE,
            )
        )
    return found, skipped


def tried(
    policies: str | Sequence[str], budgets: Sequence[int], length: int
) -> tuple[list[tuple[str, int | None]], dict[str, str]]:
    """The methods and their budgets in contexts of so many tokens, and why others are not tried; no model is needed.

    Raises:
        InputError: as `arms`.
    """
    sizes = _sizes(budgets, length)
    names, skipped = named(policies)
    found: list[tuple[str, int | None]] = []
    for name in names:
        for budget in sizes if _has_budget(method(name)) else (None,):
            try:
                _made(name, budget)
            except InputError as error:
                if name in ALWAYS:
                    raise InputError(f"{_title(name, budget)}: {error}; take {_least(sizes, length)}") from error
                if policies not in SETS:
                    raise InputError(f"{_title(name, budget)}: {error}") from error
                skipped[_title(name, budget)] = str(error)
            else:
                found.append((name, budget))
    return found, skipped


def named(policies: str | Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The methods that are tried, controls first, and why others are not.

    Raises:
        InputError: for a name that is none of a policy, or of one that cannot be had by its name alone.
    """
    skipped: dict[str, str] = {}
    if policies in SETS:
        wanted = []
        for entry in methods(room="mix", kind=KIND, fast=True if policies == "fast" else None):
            if missing := _needs(entry):
                skipped[entry.name] = _calibrated(missing)
            else:
                wanted.append(entry.name)
    else:
        wanted = [n.strip() for n in policies.split(",")] if isinstance(policies, str) else list(policies)
        for name in wanted:
            entry = _policy(name)
            if missing := _needs(entry):
                raise InputError(f"methods: {name} {_calibrated(missing)}")
    return list(dict.fromkeys((*ALWAYS, *(method(name).name for name in wanted)))), skipped


def count(policies: str | Sequence[str], budgets: Sequence[int]) -> int:
    """How many arms there will be."""
    sizes = set(budgets)
    return 1 + sum(len(sizes) if _has_budget(method(name)) else 1 for name in named(policies)[0])


def _policy(name: str) -> Method:
    """A method of the catalog, or a class of one's own."""
    if name in ("", BASELINE):
        raise InputError(f"methods: {name or 'an empty name'} is no policy; {BASELINE} is always compared")
    try:
        entry = method(name)
    except InputError as error:
        known = ", ".join(m.name for m in methods(room="mix", kind=KIND))
        raise InputError(f"methods: there is no policy {name!r}; there are {known}") from error
    if entry.room != "mix" or entry.kind != KIND:
        raise InputError(f"methods: {name} does not say which keys a decoder reads or keeps; see cenote list")
    return entry


def _made(name: str, budget: int | None) -> KVPolicy:
    found: KVPolicy = create(name) if budget is None else create(name, budget=budget)
    return found


def _title(name: str, budget: int | None) -> str:
    return name if budget is None else f"{name} {budget}"


def _least(budgets: Sequence[int], length: int) -> str:
    """In words, from which budget on all controls find room."""
    for budget in range(min(budgets), length):
        try:
            for name in ALWAYS:
                _made(name, budget)
        except InputError:
            continue
        return f"{budget} or more, which every control has room in"
    return "a larger length and budget"


def _has_budget(entry: Method) -> bool:
    return "budget" in inspect.signature(entry.load()).parameters


def _needs(entry: Method) -> list[str]:
    """Arguments besides the budget that nobody but a model's calibration can give."""
    given = {"budget", *(entry.settings or {})}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, p in inspect.signature(entry.load()).parameters.items()
        if p.default is p.empty and p.kind not in kinds and name not in given
    ]


def _calibrated(missing: Sequence[str]) -> str:
    return f"needs {', '.join(missing)} of this model, which this job does not find; use it from Python"


def _sizes(budgets: Sequence[int], length: int) -> list[int]:
    if not budgets:
        raise InputError("budgets: expected numbers of keys, such as 128,512, got none")
    for budget in budgets:
        require_at_least(1, budget=budget)
        if budget >= length:
            raise InputError(
                f"budget: {budget} keys of a context of {length} tokens are all of them; give fewer, or a larger length"
            )
    return list(dict.fromkeys(budgets))
