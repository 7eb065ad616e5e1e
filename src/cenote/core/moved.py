"""Old addresses: where what programs import, and saved objects name, stands now. The only list of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

_ATTENTION, _BAGS, _GRAPH = "cenote.pool.attention", "cenote.pool.bags", "cenote.pool.graph"
_LAYERS = "cenote.pool.layers"
_SEQUENCE, _SPATIAL = "cenote.pool.sequence", "cenote.pool.spatial"
_PROBE, _EXTRACT, _HARNESS = "cenote.jobs.probe", "cenote.jobs.extract", "cenote.study.harness"

MODULES: dict[str, tuple[str, ...]] = {
    "cenote.bridges.low_rank": ("cenote.models.low_rank",),
    "cenote.features.layered": ("cenote.features.dataset",),
    "cenote.models.pooled": ("cenote.bridges.transformers", "cenote.pool.fitting"),
    "cenote.models.sentence_transformers": ("cenote.bridges.sentence_transformers",),
    f"{_ATTENTION}.attenuator": (f"{_ATTENTION}.adaptive_noise_pooling.attenuator",),
    f"{_ATTENTION}.attsets_faset": (f"{_ATTENTION}.attsets.faset",),
    f"{_ATTENTION}.knn_centroid": (f"{_ATTENTION}.adaptive_noise_pooling.knn_centroid",),
    f"{_ATTENTION}.set_transformer_clustering": (f"{_ATTENTION}.set_transformer.clustering",),
    f"{_BAGS}.midam_loss": (f"{_BAGS}.midam.loss",),
    f"{_BAGS}.midam_optimizer": (f"{_BAGS}.midam.optimizer",),
    f"{_BAGS}.midam_trainer": (f"{_BAGS}.midam.trainer",),
    f"{_GRAPH}.molecules": (f"{_GRAPH}.graph_parsing_networks.molecules",),
    f"{_GRAPH}.parsing": (f"{_GRAPH}.graph_parsing_networks.parsing",),
    f"{_SEQUENCE}.domain_adaptation": (f"{_SEQUENCE}.attentive_temporal_pooling.domain_adaptation",),
    f"{_SEQUENCE}.layer_aware_fronts": (f"{_SEQUENCE}.layer_aware_tdnn.fronts",),
    f"{_SEQUENCE}.letter_ngrams": (f"{_SEQUENCE}.attentive_mimicking.letter_ngrams",),
    f"{_SEQUENCE}.mimicking": (f"{_SEQUENCE}.attentive_mimicking.mimic",),
    f"{_SEQUENCE}.word_contexts": (f"{_SEQUENCE}.attentive_mimicking.word_contexts",),
    f"{_SEQUENCE}.word_vectors": (f"{_SEQUENCE}.attentive_mimicking.word_vectors",),
    f"{_SPATIAL}.afa_dla": (f"{_SPATIAL}.attentive_feature_aggregation.dla",),
    f"{_SPATIAL}.dense_crf": (f"{_SPATIAL}.deeplab.dense_crf",),
    f"{_SPATIAL}.edscw": (f"{_SPATIAL}.adapool.edscw",),
    f"{_SPATIAL}.ggem_windows": (f"{_SPATIAL}.ggem.windows",),
    f"{_SPATIAL}.gramian_blocks": (f"{_SPATIAL}.gramian_heads.blocks",),
    f"{_SPATIAL}.gramian_loss": (f"{_SPATIAL}.gramian_heads.loss",),
    f"{_SPATIAL}.permutohedral": (f"{_SPATIAL}.deeplab.permutohedral",),
    "cenote.probe": (_PROBE,),
    "cenote.probe.cells": ("cenote.compare.cells",),
    "cenote.probe.columns": (f"{_PROBE}.arms",),
    "cenote.probe.compare": (f"{_PROBE}.job", f"{_PROBE}.arms", f"{_PROBE}.measure", "cenote.compare.engine"),
    "cenote.probe.estimators": ("cenote.bridges.scikit_learn",),
    "cenote.probe.metrics": ("cenote.compare.metrics", f"{_PROBE}.measure"),
    "cenote.probe.results": (f"{_PROBE}.result", "cenote.compare.result"),
    "cenote.probe.statistics": ("cenote.compare.statistics", "cenote.compare.pareto"),
    "cenote.probe.trials": (f"{_PROBE}.arms", "cenote.compare.arms", "cenote.compare.processes"),
    "cenote.probe.verdict": ("cenote.compare.verdict",),
    **{f"cenote.probe.{n}": (f"{_PROBE}.{n}",) for n in ("cost", "looks", "module", "optimiser", "recipe", "saved")},
    **{f"cenote.probe.{n}": (f"{_PROBE}.{n}",) for n in ("together", "training")},
    "cenote.scale.engine": (f"{_EXTRACT}.engine",),
    "cenote.scale.extract": (f"{_EXTRACT}.job", f"{_EXTRACT}.measure", f"{_EXTRACT}.plan", f"{_EXTRACT}.result"),
    "cenote.scale.job": (f"{_EXTRACT}.spec",),
    "cenote.scale.libraries": ("cenote.core.libraries",),
    "cenote.scale.work": (f"{_EXTRACT}.work",),
    "cenote.study.retrieval": ("cenote.study.ggem.retrieval",),
    **{f"cenote.study.{n}": (f"{_HARNESS}.{n}",) for n in ("data", "global_cue", "graphs", "pages", "runner")},
    **{f"cenote.study.{n}": (f"{_HARNESS}.{n}",) for n in ("speech", "tiles", "training", "window_cnn")},
}
"""Modules that are no more -> where what stood in them stands: in the first of these that has the name."""

CONTENTS: dict[str, tuple[str, ...]] = {
    f"{_ATTENTION}.adaptive_noise_pooling": (f"{_ATTENTION}.adaptive_noise_pooling.pool",),
    f"{_ATTENTION}.attsets": (f"{_ATTENTION}.attsets.pool",),
    f"{_ATTENTION}.set_transformer": (f"{_ATTENTION}.set_transformer.model",),
    f"{_BAGS}.midam": (f"{_BAGS}.midam.scorers",),
    f"{_GRAPH}.graph_parsing_networks": (f"{_GRAPH}.graph_parsing_networks.model",),
    f"{_LAYERS}.multi_layer_trainable": (f"{_LAYERS}.multi_layer_trainable.pooling",),
    f"{_SEQUENCE}.attention_conditioning": (f"{_SEQUENCE}.attention_conditioning.attention",),
    f"{_SEQUENCE}.attentive_mimicking": (f"{_SEQUENCE}.attentive_mimicking.model",),
    f"{_SEQUENCE}.attentive_temporal_pooling": (f"{_SEQUENCE}.attentive_temporal_pooling.pool",),
    f"{_SEQUENCE}.biomedical_re_pooling": (f"{_SEQUENCE}.biomedical_re_pooling.pools",),
    f"{_SEQUENCE}.cuni_multimodal": (f"{_SEQUENCE}.cuni_multimodal.memories",),
    f"{_SEQUENCE}.layer_aware_tdnn": (f"{_SEQUENCE}.layer_aware_tdnn.model",),
    f"{_SEQUENCE}.drasp": (f"{_SEQUENCE}.drasp.pool",),
    f"{_SEQUENCE}.sentiment_attitudes": (f"{_SEQUENCE}.sentiment_attitudes.attention",),
    f"{_SPATIAL}.adapool": (f"{_SPATIAL}.adapool.pool",),
    f"{_SPATIAL}.attentive_feature_aggregation": (f"{_SPATIAL}.attentive_feature_aggregation.fusion",),
    f"{_SPATIAL}.deeplab": (f"{_SPATIAL}.deeplab.model",),
    f"{_SPATIAL}.ggem": (f"{_SPATIAL}.ggem.pool",),
    f"{_SPATIAL}.gramian_heads": (f"{_SPATIAL}.gramian_heads.model",),
    "cenote.scale": (_EXTRACT,),
}
"""Modules that are still there -> where stands what no longer stands in them; they say `__getattr__ = formerly(...)`."""

NAMES: dict[str, str] = {
    "cenote.models.Pooled": "cenote.bridges.transformers.PooledModel",
    "cenote.models.pooled.Pooled": "cenote.bridges.transformers.PooledModel",
    "cenote.probe.module.GraphProbe": f"{_PROBE}.module.Probe",
    "cenote.probe.module.LayerProbe": f"{_PROBE}.module.Probe",
}
"""What is called otherwise now."""


def address(module: str, name: str) -> str | None:
    """Where something stands that once stood in a module; `None` where that is not known.

    >>> address("cenote.probe.results", "PairTest")
    'cenote.compare.result.PairTest'
    """
    if known := NAMES.get(f"{module}.{name}"):
        return known
    places = MODULES.get(module) or CONTENTS.get(module, ())
    return next((f"{place}.{name}" for place in places if hasattr(import_module(place), name)), None)


def formerly(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module that is still there, of what once stood in it."""

    def __getattr__(name: str) -> Any:
        new = None if name.startswith("__") else address(module, name)
        if new is None:
            return _part(module, name)
        _warn(f"{module}.{name}", new)
        return _at(new)

    return __getattr__


class OldModule(ModuleType):
    """A module that is no more: hands out what stands elsewhere now.

    Example:
        >>> OldModule("cenote.probe.results").PairTest
        <class 'cenote.compare.result.PairTest'>
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, f"Stands in {', '.join(MODULES[name])} now.")

    def __getattr__(self, name: str) -> Any:
        new = None if name.startswith("__") and name != "__all__" else address(self.__name__, name)
        return _part(self.__name__, name) if new is None else _at(new)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function of its name: once `cenote.scale.extract` is imported, it hides `extract` of its package."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return sorted({name for place in MODULES[self.__name__] for name in dir(import_module(place))})


class OldModules:
    """Finds modules that are no more, for `sys.meta_path`; whoever imports one is told where it went.

    Args:
        modules: as `MODULES`.
    """

    def __init__(self, modules: Mapping[str, tuple[str, ...]] = MODULES) -> None:
        self.modules = modules

    def find_spec(
        self, name: str, _path: Iterable[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib` asks for it."""
        if name not in self.modules:
            return None
        return ModuleSpec(name, self, is_package=any(m.startswith(f"{name}.") for m in self.modules))  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A stand-in."""
        return OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run but what it stands for."""
        _warn(module.__name__, ", ".join(self.modules[module.__name__]))
        for place in self.modules[module.__name__]:
            import_module(place)


def _part(package: str, name: str) -> ModuleType:
    """An old module inside a package, which importing the package brought along."""
    if name.startswith("__") or f"{package}.{name}" not in MODULES:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return import_module(f"{package}.{name}")


def _at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _warn(old: str, new: str) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _on_the_way(frame):
        # warnings does not count importlib's inner frames either
        level += "importlib._bootstrap" not in frame.f_code.co_filename
        frame = frame.f_back
    warnings.warn(f"{old} stands in {new} now; import it from there", DeprecationWarning, stacklevel=level)


def _on_the_way(frame: FrameType) -> bool:
    """Whether it lies between the line that asks for an old name and the warning."""
    name = frame.f_globals.get("__name__", "")
    return name in (__name__, "cenote", "importlib") or "importlib._bootstrap" in frame.f_code.co_filename
