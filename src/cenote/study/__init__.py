"""One runnable check per published system: does its claim show here?"""

from cenote.study.harness import Arms, Check, Findings, Gate, Part, Size, Verdict, above, below, between, gate, study

__all__ = ["Arms", "Check", "Findings", "Gate", "Part", "Size", "Verdict", "above", "below", "between", "gate", "study"]
