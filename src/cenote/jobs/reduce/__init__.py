"""A collection and its queries -> how few vectors per document will do, by how much, at what cost."""

from cenote.jobs.reduce.job import Asked, compare, compare_corpus
from cenote.jobs.reduce.result import Frontier, IndexResult

__all__ = ["Asked", "Frontier", "IndexResult", "compare", "compare_corpus"]
