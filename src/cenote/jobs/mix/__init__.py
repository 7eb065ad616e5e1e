"""Which keys a decoder need not read or keep: what that costs in facts, and what it saves."""

from cenote.jobs.mix.job import benched, compare_policies
from cenote.jobs.mix.result import PolicyFrontier, PolicyResult

__all__ = ["PolicyFrontier", "PolicyResult", "benched", "compare_policies"]
