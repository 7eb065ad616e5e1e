"""Raw images, sounds and texts on disk, as they are before any model has seen them."""

from cenote.features.raw.items import Audio, Item, Kind, RawItems, Read, UnreadableError, digest_of
from cenote.features.raw.open import open_raw
from cenote.features.raw.tables import bytes_at, text_at

__all__ = [
    "Audio",
    "Item",
    "Kind",
    "RawItems",
    "Read",
    "UnreadableError",
    "bytes_at",
    "digest_of",
    "open_raw",
    "text_at",
]
