"""How few tokens an encoder needs from which block on: reducers by factors and blocks, on your own images."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cenote.catalog import create, method, methods
from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.compare.engine import CELLS, prepared
from cenote.compare.engine import measure as measure_arms
from cenote.compare.inference import Measure
from cenote.compare.judge import judge
from cenote.compare.provenance import provenance
from cenote.compare.result import ArmResult
from cenote.compare.smaller import Smaller, lowest
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.compare.words import Words
from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.jobs.reduce import encoder_measure
from cenote.jobs.reduce.encoder_measure import Bench, Read, Timed
from cenote.models.live import Shorten
from cenote.models.live.shorten import READ

JOB = "reduce-images"
METRIC = "accuracy"
BASELINE = "unreduced"
ALWAYS = ("random-drop", "evenly-spaced")
CONTROLS = ("random-drop", "evenly-spaced")
FAST = ("top-attention", "diverse")
FACTORS = (2.0, 4.0)
LOSS = 0.02
SEEDS = 3
READS = ("cls", "mean")
DEFAULT_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class EncoderResult(ArmResult):
    """An encoder that goes on with fewer tokens. What was not measured is `None`.

    Attributes:
        metric: accuracy of probes that were trained on unreduced features.
        reducer: name of the method.
        factor: how many times fewer tokens were asked for.
        block: behind which they are fewer.
        agreement: share of the images that are answered as with all tokens.
        tokens: that each block reads, with the prefix.
        multiply_adds: of one image, in the blocks, from these numbers of tokens.
        images_per_s: on one thread.
        speedup: over all tokens, run in turn with it.
        reducer_ms: that the reducer itself took of one image.
    """

    reducer: str
    factor: float
    block: int | None
    agreement: float
    tokens: tuple[int, ...]
    multiply_adds: float
    images_per_s: float | None = None
    speedup: float | None = None
    reducer_ms: float | None = None

    @property
    def cost(self) -> float | None:
        """Multiply-adds of one image."""
        return self.multiply_adds


@dataclass(frozen=True, kw_only=True, repr=False)
class EncoderFrontier(Smaller[EncoderResult]):
    """The whole verdict of `cenote reduce` of an encoder: what fewer tokens cost in accuracy.

    Attributes:
        dataset: model and images, in numbers.
        loss: how much accuracy may be lost.
        job: tells the file from those of other jobs.
    """

    result_type: ClassVar[type[Any]] = EncoderResult

    dataset: dict[str, Any]
    loss: float = LOSS
    job: str = JOB

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row per arm, best first: what a data frame is made of."""
        return [
            {
                **self.beside_baseline(r),
                "agreement": r.agreement,
                "tokens": r.tokens[-1],
                "multiply_adds": r.multiply_adds,
                "images_per_s": r.images_per_s,
                "speedup": r.speedup,
                "reducer_ms": r.reducer_ms,
            }
            for r in self.results
        ]

    def smallest(self, loss: float | None = None) -> str | None:
        """The arm of fewest multiply-adds of which the data say that it loses no more: the lower end of its difference's
        interval. Of equally cheap ones the best. `None` where there is none; controls are never it.

        Args:
            loss: default: that of the comparison.
        """
        allowed = self.loss if loss is None else loss
        lower = {t.first: lowest(t, self.dataset["images"]) for t in self.against_baseline}
        return next((r.method for r in self.candidates if lower[r.method] >= -allowed), None)

    @property
    def tested(self) -> str:
        """On what, in words."""
        return f"{self.dataset['images']:,} images of {self.dataset['classes']} classes"

    @property
    def words(self) -> Words:
        """Accuracy is told in per cent."""
        return Words(arms="reductions", percent=True, cost="multiply-adds")


@dataclass(frozen=True, eq=False)
class Reduction(Arm):
    """An encoder with a reducer behind one of its blocks.

    A cell holds whether each image is answered rightly as `scores`, `[seeds, images]`, and as with all tokens as `agreement`.
    """

    name: str
    summary: str = field()
    bench: Bench
    reducer: str = BASELINE
    factor: float = 1.0
    block: int | None = None
    seeds: tuple[int | None, ...] = (None,)
    control: bool = False
    reference: bool = False

    def key(self) -> Mapping[str, Any]:
        return {
            "encoder": self.bench.fingerprint(),
            "reducer": self.reducer,
            "factor": self.factor,
            "block": self.block,
            "seeds": list(self.seeds),
        }

    def sources(self) -> tuple[type | ModuleType, ...]:
        own = () if self.block is None else (method(self.reducer).load(),)
        return (type(self), encoder_measure, *own)

    def gains_by_processes(self) -> bool:
        """Each is timed beside the unreduced model, and products use the threads that there are."""
        return False

    def cut(self, seed: int | None, timed: list[Timed] | None = None) -> Callable[[], Shorten]:
        """What makes the edit, anew for each batch."""
        assert self.block is not None
        more = {} if seed is None else {"seed": seed}
        reducer = create(self.reducer, factor=self.factor, **more)
        if timed is not None:
            reducer = Timed(reducer)
            timed.append(reducer)
        block, bench = self.block, self.bench
        rows = "first" if bench.read == "cls" else "all"
        return lambda: Shorten(reducer, block, protect=bench.prefix, stack=bench.stack, rows=rows, uneven=True)

    def run(self, on_share: OnShare = unheard) -> Cell:
        bench, start = self.bench, time.perf_counter()
        right, alike, record = [], [], dict[str, Any]()
        before = bench.answers(bench.whole.features)
        for number, seed in enumerate(self.seeds):
            timed: list[Timed] = []
            cut = None if self.block is None else self.cut(seed, timed)
            seen = bench.whole if cut is None else bench.seen(cut)
            answers = bench.answers(seen.features)
            right.append((answers == bench.labels).double())
            alike.append((answers == before).double())
            on_share(self.name, (number + 0.6) / len(self.seeds))
            if not number:
                record = self._record(seen.tokens, timed, cut)
        tensors = {"scores": torch.stack(right), "agreement": torch.stack(alike)}
        record |= {"agreement": float(tensors["agreement"].mean()), "seconds": time.perf_counter() - start}
        return Cell(self.name, record, tensors)

    def _record(
        self, tokens: Mapping[int, int], timed: Sequence[Timed], cut: Callable[[], Shorten] | None
    ) -> dict[str, Any]:
        fast, slow = (None, None) if cut is None else self.bench.speed(cut)
        return {
            "reducer": self.reducer,
            "factor": self.factor,
            "block": self.block,
            "settings": {"factor": self.factor, "block": self.block},
            "tokens": [tokens[block] for block in sorted(tokens)],
            "multiply_adds": self.bench.multiply_adds(tokens),
            "images_per_s": fast,
            "speedup": None if fast is None or slow is None else fast / slow,
            "reducer_ms": timed[0].milliseconds if timed else None,
        }


def compare_encoder(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[Any] | Tensor,
    methods: str | Sequence[str] = "fast",
    factors: Sequence[float] = FACTORS,
    *,
    blocks: Sequence[int] | None = None,
    read: Read = "cls",
    prefix: int = 1,
    state: int | None = None,
    stack: str | None = None,
    loss: float = LOSS,
    seeds: int = SEEDS,
    batch: int = 32,
    out: str | Path | None = None,
    name: str = "images",
    significance: Significance = "permutation",
    on_method: OnShare = unheard,
) -> EncoderFrontier:
    """Find out how few tokens an encoder needs, from which block on.

    Linear probes are trained on the unreduced features of four fifths of the images, and answer the others with fewer tokens:
    every image is tested once, by probes that have not seen it and that know nothing of reductions.

    Args:
        model: a vision transformer whose blocks `cenote.models.live` reaches, in eval mode; called with the images alone.
        images: as the model takes them, `[images, channels, height, width]`.
        labels: the class of each image.
        methods: `"fast"`, `"all"`, or names of reducers; random and evenly spaced tokens are always among them.
        factors: how many times fewer tokens, above 1.
        blocks: numbers of the blocks behind which tokens are fewer, from 0; default: behind a quarter and a half of them.
        read: the features: `"cls"`, the first token, or `"mean"`, of all others, by how many originals they stand for.
        prefix: leading tokens, as [CLS] and registers, that are never reduced.
        state: the hidden state that is read; default: what the last block writes.
        stack: path of the list of blocks, where a model has several.
        loss: how much accuracy may be lost.
        seeds: how many draws of what draws.
        batch: images at once.
        out: folder for finished cells and `comparison.json`; given the same folder again, finished cells are not recomputed.
        name: of the images.
        significance: see `cenote.jobs.probe.compare`.
        on_method: progress: called with an arm's name and the share of its work that is done.

    Returns:
        The `EncoderFrontier`: `.verdict` in words, `.table`, `.smallest(loss=.01)`.

    Raises:
        InputError: for anything that cannot be used, before long work starts.
    """
    if model.training:
        raise InputError("model: is in training mode, where answers are drawn; call model.eval()")
    require_one_of(READS, read=read)
    require_at_least(0, prefix=prefix, loss=loss)
    require_at_least(1, seeds=seeds, batch=batch)
    if read == "cls" and not prefix:
        raise InputError(
            "prefix: 0, and read='cls' reads the first token, which might be dropped; give 1, or read='mean'"
        )
    classes, numbers = _numbered(labels, len(images))
    bench = Bench.of(model, images, numbers, read, prefix, state, batch, stack)
    chosen = _blocks(blocks, bench.blocks)
    arms = _arms(bench, _names(methods), _factors(factors), chosen, seeds)
    with prepared(None if out is None else Path(out), JOB) as folder:
        measured = measure_arms(
            arms, BASELINE, folder=None if folder is None else folder / CELLS, workers=1, on_share=on_method
        )
        found = judge(
            EncoderFrontier,
            measured,
            Units(tuple(str(i) for i in range(len(images)))),
            Measure(METRIC),
            baseline=BASELINE,
            significance=significance,
            provenance=provenance(
                "cenote.jobs.reduce.compare_encoder", seeds=list(range(seeds)), encoder_sha256=bench.fingerprint()
            ),
            dataset={
                "name": name,
                "images": len(images),
                "classes": len(classes),
                "model": type(model).__name__,
                "blocks": bench.blocks,
                "tokens": bench.whole.tokens[0],
                "read": read,
                "state": bench.state,
                "protected": prefix,
            },
            loss=float(loss),
        )
        found = _recommended(found)
        if folder is not None:
            found.save(folder)
    return found


def counted(methods: str | Sequence[str], factors: Sequence[float] | None, blocks: int) -> int:
    """How many arms there will be besides the unreduced model."""
    return len(_names(methods)) * len(factors or FACTORS) * blocks


def _recommended(found: EncoderFrontier) -> EncoderFrontier:
    """With what to use: the cheapest arm that is known to lose no more than is allowed, and the sentence."""
    chosen = found.smallest()
    base = found[found.baseline]
    tests = {t.first: t for t in found.against_baseline}
    if found.no_verdict:
        return dataclasses.replace(
            found,
            recommended=found.baseline,
            reason=found.no_verdict,
            sentence=f"No verdict: {found.no_verdict}. Keep all tokens, or try it on more images.",
        )
    if chosen is None:
        reason = f"of no reduction can it be said that it loses at most {found.words.amount(found.loss)}"
        return dataclasses.replace(
            found, recommended=found.baseline, reason=reason, sentence=f"Keep all tokens: {reason}."
        )
    r, test = found[chosen], tests[chosen]
    reason = f"the fewest multiply-adds of which the data say that they lose at most {found.words.amount(found.loss)}"
    text = (
        f"{chosen} is enough: {found.words.amount(r.metric)} against {found.words.amount(base.metric)} "
        f"({found.words.difference(test.difference, test.interval)}), {r.multiply_adds / base.multiply_adds:.2f} of the "
        f"multiply-adds"
    )
    if r.speedup is not None:
        text += f", {r.speedup:.2f} times as many images per second"
    controls = [c for c in found.results if c.control and c.factor == r.factor and c.block == r.block]
    unbeaten = [
        c.method
        for c in controls
        for t in found.pairs
        if {t.first, t.second} == {c.method, chosen} and (t.p_adjusted > 0.05 or c.metric > r.metric)
    ]
    text += "."
    if unbeaten:
        text += f" It cannot be told from {' and '.join(unbeaten)}: how it chooses was not shown to matter here."
    return dataclasses.replace(found, recommended=chosen, reason=reason, sentence=text)


def _arms(
    bench: Bench, names: Sequence[str], factors: Sequence[float], blocks: Sequence[int], seeds: int
) -> list[Reduction]:
    found = [Reduction(BASELINE, "all tokens", bench)]
    for name in names:
        draws = "seed" in inspect.signature(method(name).load()).parameters
        for factor in factors:
            for block in blocks:
                found.append(
                    Reduction(
                        f"{name} x{factor:g} behind block {block}",
                        method(name).summary,
                        bench,
                        name,
                        factor,
                        block,
                        tuple(range(seeds)) if draws else (None,),
                        control=name in CONTROLS,
                    )
                )
    return found


def _names(wanted: str | Sequence[str]) -> list[str]:
    """Reducers that a running encoder can feed, and those that are always compared.

    Raises:
        InputError: naming one that asks for what nobody gives it, or whose tokens are no states.
    """
    if wanted == "fast":
        names = list(FAST)
    elif wanted == "all":
        names = [m.name for m in methods(room="reduce") if _why_not(m.name) is None]
    else:
        names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
        for name in names:
            why = _why_not(name)
            if why is not None:
                raise InputError(f"methods: {name} {why}")
    return list(dict.fromkeys((*names, *ALWAYS)))


def _why_not(name: str) -> str | None:
    entry = method(name)
    if entry.room != "reduce":
        return "is no reducer; see cenote list"
    if "tokens" not in entry.kind:
        return f"reduces {entry.kind}, not the tokens of an encoder"
    built = create(name, factor=2)
    if unfed := sorted(set(built.needs) - set(READ)):
        return f"asks for {unfed[0]}, which a running encoder has not"
    if built.keeps == "directions":
        return "makes vectors of norm 1, which blocks cannot read; see cenote list for its raw form"
    return None


def _factors(factors: Sequence[float]) -> list[float]:
    if not factors or not all(math.isfinite(f) and f > 1 for f in factors):
        told = ", ".join(f"{f:g}" for f in factors) or "none"
        raise InputError(f"factors: expected numbers above 1, such as 2,4, got {told}; 1 leaves all tokens")
    return list(dict.fromkeys(float(f) for f in factors))


def _blocks(wanted: Sequence[int] | None, count: int) -> list[int]:
    if count < 2:
        raise InputError(f"state: of {count} blocks none is left behind a cut; read a later state")
    if wanted is None:
        return sorted({max(count // 4 - 1, 0), max(count // 2 - 1, 0)})
    wrong = [b for b in wanted if not 0 <= b < count - 1]
    if wrong or not wanted:
        raise InputError(f"blocks: expected some of 0 to {count - 2}, behind which another is read, got {list(wanted)}")
    return list(dict.fromkeys(wanted))


def _numbered(labels: Sequence[Any] | Tensor, count: int) -> tuple[list[Any], Tensor]:
    given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(given) != count:
        raise InputError(f"labels: expected one for each of {count} images, got {len(given)}")
    classes = sorted(set(given), key=str)
    if len(classes) < 2:
        raise InputError(f"labels: expected at least two classes, got {len(classes)}")
    few = [c for c in classes if given.count(c) < 2]
    if few:
        raise InputError(f"labels: class {few[0]!r} has one image, and each is tested by a probe that has not seen it")
    place = {c: i for i, c in enumerate(classes)}
    return classes, torch.tensor([place[c] for c in given])
