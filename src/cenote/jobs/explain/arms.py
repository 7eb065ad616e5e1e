"""What is compared: explanations of the catalog, your own, and the controls that must lose."""

from __future__ import annotations

import importlib.metadata
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.catalog import create, method, methods
from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.core import InputError
from cenote.explain import metrics
from cenote.explain.base import Explainer
from cenote.jobs.explain.cost import peak_bytes
from cenote.jobs.explain.measure import (
    METRIC,
    RANDOMISED_ITEMS,
    REDRAWS,
    Bench,
    measured,
    stability,
    unchanged,
)
from cenote.jobs.explain.subject import Subject

BASELINE = "random"
CONTROL = "control"
SHARE_OF_EXPLAINING = 0.6
SEEDS_OF_RANDOM = 3
STAND_INS = ("input-gradients",)
"""Of the fast ones, those that say the same as another that needs captum: taken where that is not installed."""

LOCALISATION = {"pointing": metrics.pointing, "mass_inside": metrics.mass_inside, "iou": metrics.matched_iou}
"""What masks tell, by the name in the record."""


class Scored(NamedTuple):
    """Scores of one item's tokens, and by how much they fail to sum to what they should, where they promise that."""

    tokens: Float[Tensor, "tokens"]
    completeness_error: float | None = None


@runtime_checkable
class Scorer(Protocol):
    """From a subject and one of its items to scores."""

    def __call__(self, subject: Subject, item: int, target: int) -> Scored:
        """Of one item."""

    def key(self) -> Mapping[str, Any]:
        """What tells it from others; goes into JSON."""

    def sources(self) -> tuple[type | ModuleType, ...]:
        """Classes whose code decides its scores."""


@dataclass(frozen=True, eq=False)
class OfExplainer:
    """What an explainer says, in tokens of the subject."""

    explainer: Explainer

    def __call__(self, subject: Subject, item: int, target: int) -> Scored:
        device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
        wanted = torch.tensor([target], device=device)
        found = self.explainer.explain(subject.model, subject.inputs(item), wanted)
        error = None if found.completeness_error is None else float(found.completeness_error[0])
        return Scored(subject.scores(item, found).detach().float().cpu(), error)

    def key(self) -> Mapping[str, Any]:
        return {name: repr(value) for name, value in sorted(vars(self.explainer).items()) if not name.startswith("_")}

    def sources(self) -> tuple[type | ModuleType, ...]:
        return (type(self.explainer),)


@dataclass(frozen=True, eq=False)
class AtRandom:
    """Random scores."""

    seed: int

    def __call__(self, subject: Subject, item: int, target: int) -> Scored:  # noqa: ARG002 - it knows neither
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + item)
        return Scored(torch.rand(subject.tokens, generator=generator))

    def key(self) -> Mapping[str, Any]:
        return {"seed": self.seed}

    def sources(self) -> tuple[type | ModuleType, ...]:
        return (type(self),)


@dataclass(frozen=True, eq=False)
class Hinted:
    """What can be said of a token without the model, or from its first layer alone."""

    name: str
    hints: Callable[[], Mapping[str, Tensor]]

    def __call__(self, subject: Subject, item: int, target: int) -> Scored:  # noqa: ARG002 - the same of every model
        return Scored(self.hints()[self.name][item].float())

    def key(self) -> Mapping[str, Any]:
        return {"hint": self.name}

    def sources(self) -> tuple[type | ModuleType, ...]:
        return (type(self),)


@dataclass(frozen=True, eq=False)
class Explanation(Arm):
    """One way to explain, on all items.

    A cell holds faithfulness as `scores`, `[seeds, items]`; `tokens`, the scores of all tokens `[seeds, items, tokens]`; per
    setting the faithfulness as `in.SETTING`, of others than the first with one seed; and, of the first setting, what the table
    tells, `[items]`.

    Attributes:
        name: of the method, or as given.
        summary: one line for people.
        family: `attention`, `gradients`, `perturbation`, `decomposition`, ... or `control`.
        scorers: one per seed; one alone where it draws nothing.
        bench: what it is measured on.
        fingerprint: of the subject.
        control: whether it must lose.
    """

    name: str
    summary: str = field()
    family: str
    scorers: tuple[Scorer, ...]
    bench: Bench
    fingerprint: str
    control: bool = False
    reference: bool = False
    _reason: list[str | None] = field(default_factory=list)

    def key(self) -> Mapping[str, Any]:
        return {
            "subject": self.fingerprint,
            "target": self.bench.target.tolist(),
            "outputs": self.bench.told(),
            "settings": [str(s) for s in self.bench.settings],
            "scorers": [dict(s.key()) for s in self.scorers],
            "captum": _version("captum"),
        }

    def sources(self) -> tuple[type | ModuleType, ...]:
        return (type(self), type(self.bench.subject), *(c for s in self.scorers[:1] for c in s.sources()))

    def unfit(self) -> str | None:
        """What it says of the shortest item, where it cannot explain that."""
        if not self._reason:
            self._reason.append(self._tried())
        return self._reason[0]

    def gains_by_processes(self) -> bool:
        """Models use the threads that there are."""
        return False

    def run(self, on_share: OnShare = unheard) -> Cell:
        bench, start = self.bench, time.perf_counter()
        first = bench.settings[0]
        per_seed, errors, explaining = self._explained(on_share)
        finite = per_seed.isfinite().all(2).all(0)
        per_seed = per_seed.masked_fill(~finite[None, :, None], 0.0)
        tensors: dict[str, Tensor] = {"tokens": per_seed}
        of_first: list[dict[str, Tensor]] = []
        for number, setting in enumerate(bench.settings):
            # other settings say whether the order stays; one seed tells
            found = [measured(bench, scores, setting) for scores in (per_seed[:1] if number else per_seed)]
            faithful = torch.stack([f[METRIC] for f in found])
            tensors[f"in.{setting}"] = faithful
            if not number:
                of_first = found
                tensors["scores"] = faithful.masked_fill(~finite, torch.nan)
            done = (number + 1) / len(bench.settings)
            on_share(self.name, SHARE_OF_EXPLAINING + (0.99 - SHARE_OF_EXPLAINING) * done)
        for name in ("comprehensiveness", "sufficiency", "deletion", "insertion"):
            tensors[name] = torch.stack([f[name] for f in of_first]).mean(0)
        real = bench.real(first.size)
        units = [bench.of_units(scores, first.size) for scores in per_seed]
        own = units[0]
        tensors["infidelity"] = metrics.infidelity(
            own, bench.random_masks & real[:, None] | ~real[:, None], bench.random_falls
        )
        tensors["sparsity"] = metrics.sparsity(own, real)
        record = {
            "family": self.family,
            "settings": {} if self.control else dict(self.scorers[0].key()),
            "ms": None if self.control else 1000 * explaining / (len(self.scorers) * len(bench)),
            "megabytes": None if self.control else self._megabytes(),
            "infidelity": float(tensors["infidelity"].mean()),
            "sparsity": float(tensors["sparsity"].mean()),
            "comprehensiveness": float(tensors["comprehensiveness"].mean()),
            "sufficiency": float(tensors["sufficiency"].mean()),
            "stability": stability(torch.stack(units), real),
            "unchanged": None if self.control else self._unchanged(per_seed[0]),
            "completeness_error": sum(errors) / len(errors) if errors else None,
        }
        if (inside := bench.subject.inside) is not None:
            for name, measure in LOCALISATION.items():
                record[name] = float(torch.stack([measure(u, inside, real) for u in units]).mean())
        record["seconds"] = time.perf_counter() - start
        return Cell(self.name, record, tensors)

    def _explained(self, on_share: OnShare) -> tuple[Float[Tensor, "seeds items tokens"], list[float], float]:
        """Scores, NaN of items that it could not explain; completeness errors; seconds."""
        bench, errors = self.bench, []
        found = torch.full((len(self.scorers), len(bench), bench.subject.tokens), torch.nan)
        start = time.perf_counter()
        for seed, scorer in enumerate(self.scorers):
            for item in range(len(bench)):
                try:
                    scored = scorer(bench.subject, item, int(bench.target[item]))
                except InputError:
                    continue
                found[seed, item] = scored.tokens
                if scored.completeness_error is not None:
                    errors.append(scored.completeness_error)
                done = (seed * len(bench) + item + 1) / (len(self.scorers) * len(bench))
                on_share(self.name, SHARE_OF_EXPLAINING * done)
        return found, errors, time.perf_counter() - start

    def _unchanged(self, scores: Float[Tensor, "items tokens"]) -> float | None:
        """The parameter randomisation test: rank correlation with what it says of the same model with random weights."""
        bench, before, after = self.bench, [], []
        inside = list(bench.subject.sizes.values())[-1] >= 0
        for other in bench.redrawn[:REDRAWS]:
            for item in range(min(RANDOMISED_ITEMS, len(bench))):
                try:
                    found = self.scorers[0](other, item, int(bench.target[item])).tokens
                except InputError:
                    continue
                before.append(scores[item, inside[item]])
                after.append(found[inside[item]])
        return unchanged(before, after)

    def _megabytes(self) -> float:
        """At the peak of explaining an item of middle length."""
        bench = self.bench
        lengths = bench.real(bench.settings[0].size).sum(1)
        item = int(lengths.argsort(stable=True)[len(lengths) // 2])
        return peak_bytes(lambda: self.scorers[0](bench.subject, item, int(bench.target[item]))) / 1e6

    def _tried(self) -> str | None:
        bench = self.bench
        item = int(bench.real(bench.settings[0].size).sum(1).argmin())
        try:
            self.scorers[0](bench.subject, item, int(bench.target[item]))
        except InputError as error:
            return str(error)
        except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, IndexError, KeyError) as error:
            # a library's own exception, or a model that an explainer was not written for
            return f"fails on this model ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        return None


def chosen(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Names of explanations: `"fast"`, `"all"`, or a list (commas in a text separate).

    Raises:
        InputError: naming what is no explanation of tokens that needs no training.

    >>> "attention-rollout" in chosen("fast"), chosen("occlusion, lime")
    (True, ('occlusion', 'lime'))
    """
    if wanted in ("fast", "all"):
        spare = _version("captum") is not None
        named = (m.name for m in methods(room="explain") if wanted == "all" or m.fast)
        return tuple(n for n in named if wanted == "all" or n not in STAND_INS or not spare)
    names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    if not names or "" in names:
        raise InputError("methods: the list has no name in it; try --methods fast")
    for name in names:
        if method(name).room != "explain":
            raise InputError(f"methods: {name} explains nothing, but lives in {method(name).room}")
    return tuple(dict.fromkeys(method(n).name for n in names))


def explanations(
    bench: Bench,
    wanted: str | Sequence[str],
    given: Mapping[str, Explainer],
    seeds: Sequence[int],
    fingerprint: str,
) -> tuple[list[Explanation], dict[str, str]]:
    """Arms, controls behind them, and of what could not be built why."""
    arms, skipped = [], {}
    for name in chosen(wanted) if wanted else ():
        entry = method(name)
        try:
            built = [create(name, **_fitting(entry.load(), bench.subject.settings, seed)) for seed in seeds]
        except InputError as error:
            skipped[name] = str(error)
            continue
        scorers = tuple(OfExplainer(e) for e in (built if built[0].draws else built[:1]))
        arms.append(Explanation(name, entry.summary, built[0].family, scorers, bench, fingerprint))
    for name, explainer in given.items():
        arms.append(Explanation(name, "yours", explainer.family, (OfExplainer(explainer),), bench, fingerprint))
    return [*arms, *controls(bench, fingerprint)], skipped


def controls(bench: Bench, fingerprint: str) -> list[Explanation]:
    """Those that must lose: random scores, and what the subject gives away without the model."""
    known: dict[str, Mapping[str, Tensor]] = {}

    def hints() -> Mapping[str, Tensor]:
        return known.setdefault("hints", bench.subject.hints())

    kinds: dict[str, tuple[Scorer, ...]] = {BASELINE: tuple(AtRandom(seed) for seed in range(SEEDS_OF_RANDOM))}
    kinds |= {name: (Hinted(name, hints),) for name in hints()}
    told = {BASELINE: "random scores"}
    return [
        Explanation(
            n, told.get(n, f"{n.replace('-', ' ')}, whatever the model does"), CONTROL, s, bench, fingerprint, True
        )
        for n, s in kinds.items()
    ]


def _fitting(kind: type[Any], settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The arguments among those that the subject has that a class takes."""
    takes = inspect.signature(kind).parameters
    return {n: v for n, v in {**settings, "random_state": seed}.items() if n in takes}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
