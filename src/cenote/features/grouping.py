"""Columns that tell which items belong together, where nobody said so."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from cenote.features.table import Column, is_missing

GROUP_WORDS = frozenset({
    "patient", "subject", "participant", "person", "speaker", "singer", "author", "user", "donor", "animal",
    "slide", "case", "specimen", "biopsy", "session", "recording", "document", "video", "study",
})  # fmt: skip

FEWEST_GROUPS = 3
"""A split into train, val and test needs so many; what has fewer values is rather a property."""

REPEATING = 0.05
"""Share of the items that repeat a value: below it, groups hardly change a split or an interval."""


def ungrouped(columns: Mapping[str, Column], others: Collection[str]) -> tuple[str, ...]:
    """Cautions of columns that look like a patient, speaker, slide or case by their name, and by their values' repeats.

    Args:
        columns: all.
        others: names of those that are known to be something else.

    Example:
        >>> ungrouped({"id": "abcdef", "PatientID": "ppqqrr"}, {"id"})[0].split(":")[0]
        "column 'PatientID' holds 3 values for 6 items and looks like what they come from"
    """
    found = []
    for name, cells in columns.items():
        values = [str(cell) for cell in cells if not is_missing(cell)]
        distinct = len(set(values))
        repeats = distinct >= FEWEST_GROUPS and len(values) - distinct >= REPEATING * len(values)
        if name not in others and repeats and _names_a_group(name):
            found.append(
                f"column {name!r} holds {distinct:,} values for {len(values):,} items and looks like what they come from: "
                f"one {name} may train and test, and its items pass for independent; give --group {name}"
            )
    return tuple(found)


def _names_a_group(name: str) -> bool:
    """
    >>> [_names_a_group(n) for n in ("patient_id", "SpeakerId", "slides", "casette")]
    [True, True, True, False]
    """
    words = (w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
    return any(w in GROUP_WORDS or w.removesuffix("id").removesuffix("s") in GROUP_WORDS for w in words)
