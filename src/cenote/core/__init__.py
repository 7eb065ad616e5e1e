"""Ground floor: sets of tokens, masked and segmented maths, attention arithmetic."""

from cenote.core.attention import Latents, Projection, cross_attention
from cenote.core.errors import InputError
from cenote.core.powermean import power_mean
from cenote.core.sets import Bags, PaddedTokens, Tokens, as_tokens
from cenote.core.vector_math import settle

settle()

__all__ = [
    "Bags",
    "InputError",
    "Latents",
    "PaddedTokens",
    "Projection",
    "Tokens",
    "as_tokens",
    "cross_attention",
    "power_mean",
]
