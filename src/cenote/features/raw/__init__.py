"""Raw images, sounds and texts on disk, as they are before any model has seen them."""

from cenote.features.raw.items import Audio, Item, Kind, RawItems, Read, UnreadableError
from cenote.features.raw.open import open_raw
from cenote.features.raw.tables import bytes_at

__all__ = ["Audio", "Item", "Kind", "RawItems", "Read", "UnreadableError", "bytes_at", "open_raw"]
