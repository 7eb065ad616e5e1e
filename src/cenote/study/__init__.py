"""One runnable check per published system: does its claim show here?"""

from cenote.study.harness import Arms, Check, Findings, Size, Verdict, above, below, between, study

__all__ = ["Arms", "Check", "Findings", "Size", "Verdict", "above", "below", "between", "study"]
