"""A classifier and its inputs -> which explanation of it is faithful, by how much, at what cost."""

from cenote.jobs.explain.job import audit
from cenote.jobs.explain.pictures import Pictures, digits
from cenote.jobs.explain.result import Audit, ExplanationResult
from cenote.jobs.explain.subject import Subject, Vectors
from cenote.jobs.explain.texts import Texts

__all__ = ["Audit", "ExplanationResult", "Pictures", "Subject", "Texts", "Vectors", "audit", "digits"]
