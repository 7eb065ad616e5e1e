"""Whether what lies somewhere is raw, or tokens already."""

from __future__ import annotations

from pathlib import Path

from cenote.features import arrow
from cenote.features.folder import token_files
from cenote.features.raw.files import SUFFIXES, files_below, media_files
from cenote.features.raw.tables import CSV, JSONL, LINES
from cenote.features.store import is_store


def is_raw(path: Path) -> bool:
    """Whether `open_raw` is to read it, rather than `read`: images, sounds or texts, and no tokens beside them.

    A text file counts as texts, though graphs may lie in one.
    """
    if not path.exists() or is_store(path):
        return False
    if shards := arrow.shards_of(path):
        return not arrow.holds_vectors(shards[0].path)
    if path.is_file():
        return path.suffix.lower() in LINES + CSV + JSONL
    if token_files(path):
        return False
    below = files_below(path)
    return any(media_files(below, kind) for kind in SUFFIXES) or any(
        file.parent == path and file.suffix.lower() in LINES + CSV + JSONL for file in below
    )
