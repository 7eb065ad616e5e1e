"""Audit explanations: which of them is faithful, for this model on these items."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.compare.arms import OnShare, unheard
from cenote.compare.engine import CELLS, Measured, prepared
from cenote.compare.engine import measure as measure_arms
from cenote.compare.inference import Measure
from cenote.compare.judge import judge
from cenote.compare.provenance import provenance
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.core import InputError
from cenote.core.redrawn import STILL_ALIKE
from cenote.core.requirements import require_at_least
from cenote.explain import metrics
from cenote.explain.base import Explainer
from cenote.jobs.explain.arms import BASELINE, explanations
from cenote.jobs.explain.items import named, pictures
from cenote.jobs.explain.measure import METRIC, POINTS, Bench
from cenote.jobs.explain.pictures import Pictures
from cenote.jobs.explain.result import JOB, Audit
from cenote.jobs.explain.subject import Subject
from cenote.jobs.explain.texts import Texts
from cenote.jobs.explain.verdict import worded
from cenote.models.classifier import Classifier, ImageClassifier, TextClassifier, load_classifier

DISPUTED = 3


def audit(
    model: str | Path | Subject | Classifier,
    inputs: Sequence[Any] | None = None,
    methods: str | Sequence[str] = "fast",
    *,
    explainers: Mapping[str, Explainer] | None = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    target: str | None = None,
    seeds: int | Sequence[int] = 2,
    out: str | Path | None = None,
    name: str | None = None,
    significance: Significance = "permutation",
    on_method: OnShare = unheard,
) -> Audit:
    """Find out which explanation of a model's classes is faithful.

    Args:
        model: folder or hub name of a classifier of transformers, or one from `cenote.models.classifier.load_classifier`; or a
            `Subject`, which holds its items.
        inputs: texts, or images (`PIL.Image`); none with a `Subject`.
        methods: `"fast"`, `"all"`, or names; empty where only `explainers` are asked.
        explainers: your own, by name.
        names: of the items.
        labels: the true class of each item, by name: tells how often the model is right.
        target: the class that is explained, by name; default: the one that the model chooses, item by item.
        seeds: how many (0, 1, ...), or which, of explanations that draw.
        out: folder for finished cells and `comparison.json`; given the same folder again, finished cells are not recomputed.
            `None`: nothing is written.
        name: of the items together; default: that of the model.
        significance: see `cenote.jobs.probe.compare`.
        on_method: progress: called with a method's name and the share of its work that is done.

    Returns:
        The `Audit`. After Ctrl-C, if random scores had been measured, that of the finished ones, with `complete=False`.

    Raises:
        InputError: for anything that cannot be used, before long work starts.

    Example:
        >>> from cenote.jobs.explain import audit, digits
        >>> found = audit(digits(items=12), methods=["attention-rollout", "last-layer-attention"])
        >>> found.baseline, len(found.controls)
        ('random', 4)
    """
    seed_numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    require_at_least(1, seeds=len(seed_numbers))
    subject, told = subject_of(model, inputs, names)
    bench = Bench(subject, _target(subject, target))
    if labels is not None and len(labels) != len(bench):
        raise InputError(f"labels: expected one for each of {len(bench)} items, got {len(labels)}")
    true = None if labels is None else named(labels, subject.labels)
    fingerprint = subject.fingerprint()
    arms, skipped = explanations(bench, methods, explainers or {}, seed_numbers, fingerprint)
    unfit = {arm.name: arm.unfit() for arm in arms if not arm.control}
    if all(why is not None for why in unfit.values()):
        told_why = [f"{of}: {why}" for of, why in (skipped | unfit).items()]
        raise InputError(f"methods: no explanation is left{f' ({told_why[0]})' if told_why else ''}")
    with prepared(None if out is None else Path(out), JOB) as folder:
        cells = None if folder is None else folder / CELLS
        measured = measure_arms(arms, BASELINE, folder=cells, workers=1, on_share=on_method)
        measured = _with_struck(dataclasses.replace(measured, skipped={**skipped, **measured.skipped}))
        found = judge(
            Audit,
            measured,
            Units(subject.names),
            Measure(METRIC),
            baseline=BASELINE,
            significance=significance,
            provenance=provenance(
                "cenote.jobs.explain.audit",
                seeds=list(seed_numbers),
                model_and_items_sha256=fingerprint,
                decided_by=str(bench.settings[0]),
            ),
            dataset=_facts(bench, name or told, true),
        )
        settings = [str(s) for s in bench.settings]
        found = worded(_compared(found, measured, bench), settings)
        if folder is not None:
            found.save(folder)
    return found


def subject_of(
    model: str | Path | Subject | Classifier, inputs: Sequence[Any] | None, names: Sequence[str] | None = None
) -> tuple[Subject, str]:
    """What is audited, and what to call it.

    Raises:
        InputError: where that cannot be told.
    """
    if isinstance(model, Subject):
        if inputs is not None:
            raise InputError("inputs: a Subject holds its items; leave inputs out")
        return model, model.kind
    if inputs is None or not len(inputs):
        raise InputError("inputs: expected texts or images, got none")
    loaded = model if isinstance(model, Classifier) else load_classifier(str(model))
    if loaded.kind == "text":
        return Texts(TextClassifier(loaded), inputs, names), loaded.name
    images = ImageClassifier(loaded)
    return pictures(loaded, images, [images.encode(image) for image in inputs], names), loaded.name


def _target(subject: Subject, target: str | None) -> Tensor | None:
    if target is None:
        return None
    return torch.full((len(subject.names),), subject.labels.index(named([target], subject.labels, "target")[0]))


def _with_struck(measured: Measured) -> Measured:
    """What said the same of random weights stands aside."""

    def struck(name: str) -> bool:
        alike = measured.cells[name].record.get("unchanged")
        return alike is not None and alike > STILL_ALIKE

    arms = tuple(dataclasses.replace(a, reference=True) if struck(a.name) else a for a in measured.arms)  # type: ignore[type-var]
    return dataclasses.replace(measured, arms=arms)


def _facts(bench: Bench, name: str, labels: Sequence[str] | None) -> dict[str, Any]:
    subject = bench.subject
    right = None
    if labels is not None:
        right = sum(subject.labels[c] == own for c, own in zip(bench.chosen.tolist(), labels, strict=True)) / len(bench)
    return {
        "name": name,
        "kind": subject.kind,
        "items": len(bench),
        "classes": list(subject.labels),
        "model": type(subject.model).__name__,
        "units": {size: float(bench.real(size).sum(1).double().median()) for size in subject.sizes},
        "fills": list(subject.fills),
        "accuracy": right,
        "groups": None,
        "probability": float(bench.whole.mean()),
    }


def _compared(audit: Audit, measured: Measured, bench: Bench) -> Audit:
    """With all that needs the cells of several arms."""
    names = [r.method for r in audit.results]
    cells = {name: measured.cells[name].tensors for name in names}
    size = bench.settings[0].size
    real = bench.real(size)
    units = {name: bench.of_units(cells[name]["tokens"][0], size) for name in names}
    orders = {str(s): {name: float(cells[name][f"in.{s}"].mean()) for name in names} for s in bench.settings}
    curves = {
        name: {kind: [round(v, 6) for v in cells[name][kind].mean(0).tolist()] for kind in ("deletion", "insertion")}
        for name in names
    }
    below = {name: metrics.area(cells[name]["deletion"], POINTS) for name in names}
    above = {name: metrics.area(cells[name]["insertion"], POINTS) for name in names}
    results = tuple(
        dataclasses.replace(
            r,
            deletion=float((below[BASELINE] - below[r.method]).mean()),
            insertion=float((above[r.method] - above[BASELINE]).mean()),
            struck=r.reference,
        )
        for r in audit.results
    )
    aside = {r.method for r in audit.results if r.control}
    of_items = {
        (a, b): metrics.agreement(units[a], units[b], real) for i, a in enumerate(names) for b in names[i + 1 :]
    }

    def together(a: str, b: str) -> float:
        if a == b:
            return 1.0
        return round(float(of_items[(a, b) if (a, b) in of_items else (b, a)].mean()), 6)

    pairs = [v for (a, b), v in of_items.items() if not {a, b} & aside]
    disputed: tuple[tuple[str, float], ...] = ()
    if pairs:
        alike = torch.stack(pairs).mean(0)
        disputed = tuple(
            (bench.subject.names[i], round(float(alike[i]), 6)) for i in alike.argsort(stable=True)[:DISPUTED].tolist()
        )
    return dataclasses.replace(
        audit,
        results=results,
        orders=orders,
        curves=curves,
        points=POINTS,
        agreement=tuple(tuple(together(a, b) for b in names) for a in names),
        disputed=disputed,
        gallery=_gallery(bench, units, cells[audit.winner]["scores"].mean(0)),
        pareto=tuple(p for p in audit.pareto if p not in aside),
    )


def _gallery(
    bench: Bench, units: Mapping[str, Float[Tensor, "items units"]], faithful: Float[Tensor, "items"]
) -> dict[str, Any]:
    """The items on which the winner did best, in the middle and worst, and a few between, with everybody's scores."""
    subject, real = bench.subject, bench.real(bench.settings[0].size)
    order = faithful.argsort(descending=True, stable=True).tolist()
    last = len(order) - 1
    places = {0: "best", last: "worst", last // 2: "median", last // 4: "upper quarter", 3 * last // 4: "lower quarter"}
    shown = []
    for place in sorted(places):
        item = order[place]
        picture = subject.picture(item)
        shown.append(
            {
                "name": subject.names[item],
                "place": places[place],
                "target": subject.labels[int(bench.target[item])],
                "probability": round(float(bench.whole[item]), 6),
                "faithfulness": round(float(faithful[item]), 6),
                "words": subject.words(item),
                "picture": None if picture is None else base64.b64encode(picture).decode(),
                "scores": {name: [round(v, 5) for v in _scaled(s[item][real[item]])] for name, s in units.items()},
            }
        )
    return {"items": shown, "grid": list(subject.grid) if isinstance(subject, Pictures) else None}


def _scaled(scores: Float[Tensor, "units"]) -> list[float]:
    """The largest absolute score is 1."""
    return (scores / scores.abs().max().clamp(min=1e-12)).tolist()
