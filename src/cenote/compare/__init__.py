"""Arms measured on the same units: cells that resume, paired statistics, the Pareto set, the verdict in words.

See `README.md` beside this file.
"""

from cenote.compare.arms import Arm, OnShare
from cenote.compare.cells import Cell
from cenote.compare.engine import Engine, Measured, measure
from cenote.compare.folds import Folds
from cenote.compare.inference import Measure
from cenote.compare.judge import judge
from cenote.compare.provenance import provenance
from cenote.compare.result import ArmResult, Comparison, PairTest
from cenote.compare.sources import source_digest
from cenote.compare.units import Units
from cenote.compare.words import Words

__all__ = [
    "Arm",
    "ArmResult",
    "Cell",
    "Comparison",
    "Engine",
    "Folds",
    "Measure",
    "Measured",
    "OnShare",
    "PairTest",
    "Units",
    "Words",
    "judge",
    "measure",
    "provenance",
    "source_digest",
]
