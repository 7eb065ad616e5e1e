"""How few vectors of a collection, or tokens of an encoder, will do: by how much, and at what cost."""

from cenote.jobs.reduce.encoder import EncoderFrontier, EncoderResult, compare_encoder
from cenote.jobs.reduce.job import Asked, compare, compare_corpus
from cenote.jobs.reduce.result import Frontier, IndexResult

__all__ = [
    "Asked",
    "EncoderFrontier",
    "EncoderResult",
    "Frontier",
    "IndexResult",
    "compare",
    "compare_corpus",
    "compare_encoder",
]
