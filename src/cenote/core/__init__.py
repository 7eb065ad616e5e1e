"""Ground floor: sets of tokens, masked and segmented maths, attention arithmetic."""

from typing import TYPE_CHECKING

from cenote.core.errors import InputError
from cenote.core.later import after_import, later
from cenote.core.vector_math import settle

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

after_import("torch", settle)

if TYPE_CHECKING:
    from cenote.core.attention import Latents, Projection, cross_attention
    from cenote.core.powermean import power_mean
    from cenote.core.sets import Bags, PaddedTokens, Tokens, as_tokens
else:
    # these need torch, without which the command line says what it can do
    _LATER = {
        "attention": ("Latents", "Projection", "cross_attention"),
        "powermean": ("power_mean",),
        "sets": ("Bags", "PaddedTokens", "Tokens", "as_tokens"),
    }
    _PLACES = {name: f"{__name__}.{file}.{name}" for file, names in _LATER.items() for name in names}
    __getattr__, _ = later(__name__, lambda: _PLACES)
