"""An encoder and its images -> how few tokens from which block on will do, by how much, at what cost."""

from cenote.jobs.reduce.encoder import EncoderFrontier, EncoderResult, compare_encoder

__all__ = ["EncoderFrontier", "EncoderResult", "compare_encoder"]
