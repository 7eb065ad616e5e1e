"""Raw images, sounds and texts on disk, as they are before any model has seen them."""

from cenote.features.raw.items import Audio, Item, Kind, RawItems, Read, UnreadableError
from cenote.features.raw.open import open_raw

__all__ = ["Audio", "Item", "Kind", "RawItems", "Read", "UnreadableError", "open_raw"]
