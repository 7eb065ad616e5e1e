"""Labelled token features -> which pooling wins, by how much, at what cost."""

from cenote.compare import PairTest
from cenote.jobs.probe.beside import Beside, beside
from cenote.jobs.probe.embedding import Embedded, embed
from cenote.jobs.probe.job import compare
from cenote.jobs.probe.module import Probe, build_probe
from cenote.jobs.probe.predicting import Prediction, predict
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.result import Comparison, MethodResult
from cenote.jobs.probe.saved import SavedProbe, load
from cenote.jobs.probe.unseen import Reading

__all__ = [
    "Beside",
    "Comparison",
    "Embedded",
    "MethodResult",
    "PairTest",
    "Prediction",
    "Probe",
    "Reading",
    "Recipe",
    "SavedProbe",
    "beside",
    "build_probe",
    "compare",
    "embed",
    "load",
    "predict",
]
