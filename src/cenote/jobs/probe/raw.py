"""Raw items and a model -> which pooling wins on its tokens; what cannot be compared is told before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cenote.compare import Engine, OnShare
from cenote.compare.arms import unheard
from cenote.compare.inference import SeedEffects
from cenote.compare.statistics import Significance
from cenote.features import Labelling, TokenDataset
from cenote.features.raw import RawItems
from cenote.features.reading import read_labelled, require_labels
from cenote.jobs.extract import Engine as Extractor
from cenote.jobs.extract import Extracted, ModelSpec, Options, extract
from cenote.jobs.extract.result import OnProgress
from cenote.jobs.probe.arms import Layers, chosen_methods
from cenote.jobs.probe.folds import asked
from cenote.jobs.probe.job import compare
from cenote.jobs.probe.measure import judged_by
from cenote.jobs.probe.own import Choice
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.result import Comparison
from cenote.models import Backbone, Layout
from cenote.models.base import layer_numbers

FEATURES = "features"
"""The store, in the folder of results."""


def tokens_of_raw(
    items: RawItems,
    model: ModelSpec,
    store: str | Path,
    labelling: Labelling | None = None,
    *,
    name: str | None = None,
    options: Options | None = None,
    layers: Layers = None,
    metric: str | None = None,
    significance: str = "permutation",
    folds: int | None = None,
    repeats: int = 1,
    extractor: Extractor | None = None,
    backbone: Backbone | None = None,
    on_progress: OnProgress = lambda _: None,
    on_message: Callable[[str], None] = lambda _: None,
    on_extracted: Callable[[Extracted], None] = lambda _: None,
) -> TokenDataset:
    """Labelled token features of raw items, extracted into a store where they do not lie there yet.

    Args:
        items: see `cenote.features.raw.open_raw`.
        model: which model.
        store: folder; the same call again goes on.
        labelling: how the items are labelled and split; default: as the columns' names say.
        name: of the data; default: the store's.
        options: how to extract; its `layers` are set here.
        layers: at which the comparison will try token pools; given, all layers are kept.
        metric: of the comparison.
        significance: of the comparison.
        folds: of the comparison.
        repeats: of the comparison.
        extractor: who computes; default: this process.
        backbone: the model, if it is loaded already.
        on_progress: called after every batch.
        on_message: called with what a person should know.
        on_extracted: called with what was done, before the store is read.

    Raises:
        InputError: before the model runs, where labels, groups or split cannot be used, the metric or the source of p-values
            does not fit the task, or the model has no such layer; and as `cenote.jobs.extract.extract` would.
    """
    labelling = labelling or Labelling()
    kept = None if layers is None else "all"
    judged_by(require_labels(items, labelling, asked(folds, repeats, significance)), metric, significance)

    def on_model(layout: Layout) -> None:
        layer_numbers(layers, range(layout.blocks + 1))

    done = extract(
        items,
        replace(model, kind=items.kind),
        store,
        replace(options or Options(), layers=kept),
        engine=extractor,
        backbone=backbone,
        on_progress=on_progress,
        on_message=on_message,
        on_model=on_model,
    )
    on_extracted(done)
    data = read_labelled(store, labelling, layers=kept)
    return data if name is None else replace(data, name=name)


def compare_raw(
    items: RawItems,
    model: ModelSpec,
    methods: str | Sequence[Choice] = "fast",
    *,
    out: str | Path,
    labelling: Labelling | None = None,
    name: str | None = None,
    options: Options | None = None,
    seeds: int | Sequence[int] = 3,
    metric: str | None = None,
    significance: Significance = "permutation",
    seed_effects: SeedEffects = "fixed",
    folds: int | None = None,
    repeats: int = 1,
    recipe: Recipe | None = None,
    layers: Layers = None,
    references: bool = True,
    workers: int | None = None,
    extractor: Extractor | None = None,
    engine: Engine | None = None,
    backbone: Backbone | None = None,
    on_progress: OnProgress = lambda _: None,
    on_method: OnShare = unheard,
) -> Comparison:
    """Find out which pooling wins on the tokens that a model makes of raw items.

    Args:
        items: see `cenote.features.raw.open_raw`.
        model: which model.
        methods: see `cenote.jobs.probe.compare`, as for `seeds`, `metric`, `significance`, `seed_effects`, `folds`,
            `repeats`, `recipe`, `layers`, `references`, `workers`, `engine` and `on_method`.
        out: folder for results, the tokens in `features` among them; the same folder again resumes.
        labelling: see `tokens_of_raw`, as for `name`, `options`, `extractor`, `backbone` and `on_progress`.

    Raises:
        InputError: for anything that cannot be used, before the model runs where that can be told.

    Example:
        `compare_raw(open_raw("photos"), ModelSpec("facebook/dinov2-small"), out="cenote-out").sentence`
    """
    chosen_methods(methods)
    data = tokens_of_raw(
        items,
        model,
        Path(out) / FEATURES,
        labelling,
        name=name,
        options=options,
        layers=layers,
        metric=metric,
        significance=significance,
        folds=folds,
        repeats=repeats,
        extractor=extractor,
        backbone=backbone,
        on_progress=on_progress,
    )
    return compare(
        data,
        methods,
        seeds=seeds,
        out=out,
        metric=metric,
        significance=significance,
        seed_effects=seed_effects,
        folds=folds,
        repeats=repeats,
        recipe=recipe,
        layers=layers,
        references=references,
        workers=workers,
        engine=engine,
        on_method=on_method,
    )
