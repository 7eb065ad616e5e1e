"""Labelled token features -> which pooling wins, by how much, at what cost."""

from cenote.probe.compare import compare
from cenote.probe.module import Probe, build_probe
from cenote.probe.recipe import Recipe
from cenote.probe.results import Comparison, MethodResult, PairTest
from cenote.probe.saved import SavedProbe, load

__all__ = [
    "Comparison",
    "MethodResult",
    "PairTest",
    "Probe",
    "Recipe",
    "SavedProbe",
    "build_probe",
    "compare",
    "load",
]
