"""With which policy and budget does a decoder still give its answers, and what is saved?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cenote.compare.arms import OnShare, unheard
from cenote.compare.engine import CELLS, Measured, prepared
from cenote.compare.engine import measure as measure_arms
from cenote.compare.inference import Inference, Measure
from cenote.compare.judge import judge
from cenote.compare.provenance import provenance
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.core.requirements import require_at_least, require_several
from cenote.jobs.mix.arms import BASELINE, BUDGETS, arms
from cenote.jobs.mix.measure import FACTS, METRIC, Bench
from cenote.jobs.mix.result import JOB, LOSS, PolicyFrontier
from cenote.jobs.mix.verdict import worded

LENGTH = 1000


def compare_policies(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    policies: str | Sequence[str] = "fast",
    budgets: Sequence[int] = BUDGETS,
    *,
    facts: int = FACTS,
    length: int = LENGTH,
    loss: float = LOSS,
    seed: int = 0,
    out: str | Path | None = None,
    name: str = "",
    significance: Significance = "permutation",
    on_method: OnShare = unheard,
) -> PolicyFrontier:
    """Find out with which policy, at which budget of keys, a decoder still tells what it was told, and what is saved.

    Facts are planted in contexts made of the texts, and asked for at their end; each text's last half is read token by token.
    Contexts are read as the model was loaded, unless a policy acts on prompts; behind them it acts on each token.

    Args:
        model: a causal decoder of transformers with its head, in eval mode.
        tokenizer: its own.
        texts: prose of the kind that the model reads.
        policies: `"fast"`, `"all"`, or names of methods; sink + window, random keys and the oracle are always among them.
        budgets: how many keys one key head reads, or keeps, at most.
        facts: how many are planted and asked for.
        length: tokens of a context, and of a text.
        loss: share of the facts that may be lost.
        seed: of the facts and their places.
        out: folder for finished cells and `comparison.json`; given the same folder again, finished cells are not recomputed.
        name: of the model.
        significance: see `cenote.jobs.probe.compare`.
        on_method: progress: called with an arm's name and the share of its work that is done.

    Returns:
        The `PolicyFrontier`: `.verdict` in words, `.table`, `.best(loss=.02)`. After Ctrl-C, if the model as it is had been
        measured, that of the finished arms, with `complete=False`.

    Raises:
        InputError: for anything that cannot be used, before long work starts.
    """
    require_at_least(0, loss=loss)
    bench = benched(model, tokenizer, texts, facts=facts, length=length, seed=seed)
    made, skipped = arms(bench, policies, budgets)
    with prepared(None if out is None else Path(out), JOB) as folder:
        measured = measure_arms(
            made, BASELINE, folder=None if folder is None else folder / CELLS, workers=1, on_share=on_method
        )
        measured = dataclasses.replace(measured, skipped={**skipped, **measured.skipped})
        found = judge(
            PolicyFrontier,
            measured,
            Units(bench.facts),
            Measure(METRIC, limits=(0.0, 1.0)),
            baseline=BASELINE,
            significance=significance,
            provenance=provenance("cenote.jobs.mix.compare_policies", seed=seed, bench_sha256=bench.fingerprint()),
            dataset={
                "name": name or type(model).__name__,
                "model": type(model).__name__,
                "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
                "device": bench.device.type,
                "facts": len(bench.facts),
                "contexts": len(bench.contexts),
                "length": length,
                "texts": len(bench.passages),
                "tokens": len(bench.stretches),
                "per_depth": bench.per_depth,
            },
            loss=float(loss),
        )
        found = worded(_beside(found, measured, bench))
        if folder is not None:
            found.save(folder)
    return found


def benched(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, facts: int = FACTS, length: int = LENGTH, seed: int = 0
) -> Bench:
    """What policies are measured on.

    Raises:
        InputError: see `compare_policies`.
    """
    require_several(texts=texts)
    return Bench.of(model, tokenizer, list(texts), facts, length, seed)


def _beside(found: PolicyFrontier, measured: Measured, bench: Bench) -> PolicyFrontier:
    """With log-loss beside that of all keys and of the window, and with how often the likeliest token is that of all keys."""
    names = [r.method for r in found.results]
    rows = {name: number for number, name in enumerate(names)}
    stretches = bench.stretches
    units = Units([str(n) for n in range(len(stretches))], stretches)
    losses = [measured.cells[name].tensors["loss"].double()[None].numpy() for name in names]
    inference = Inference(Measure("log-loss"), losses, units)
    said = measured.cells[BASELINE].tensors["said"]

    def difference(first: str, second: str) -> tuple[float, float, float]:
        ((value, interval, _),) = inference.differences([(rows[first], rows[second])])
        return value, *interval

    results = []
    for r in found.results:
        window = found.window_of(r)
        results.append(
            dataclasses.replace(
                r,
                over_dense=(0.0, 0.0, 0.0) if r.method == BASELINE else difference(r.method, BASELINE),
                over_window=() if window is None else difference(r.method, window.method),
                agreement=float((measured.cells[r.method].tensors["said"] == said).double().mean()),
            )
        )
    return dataclasses.replace(found, results=tuple(results))
