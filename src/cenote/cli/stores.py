"""Stores by their addresses: `exact://FOLDER`, `lancedb://FOLDER`, `qdrant://FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.features.vectors import Meta

KINDS = ("exact", "lancedb", "qdrant")

Store = Annotated[
    str,
    typer.Option(
        help="exact://FOLDER (to some million vectors), lancedb://FOLDER (one machine) or qdrant://FOLDER; a folder alone is "
        "exact."
    ),
]


def opened(address: str, meta: Meta | None = None) -> Any:
    """The store of an address.

    Args:
        address: kind and folder.
        meta: what it is to hold; default: what it holds, and then it must be there.

    Raises:
        InputError: where there is no such kind, its library is not installed, or it holds something else.
    """
    from cenote.core.requirements import require_one_of

    kind, separator, folder = address.partition("://")
    if not separator:
        kind, folder = "exact", address
    require_one_of(KINDS, store=kind)
    if not folder:
        raise InputError(f"store: expected a folder behind {kind}://, got none")
    if kind == "lancedb":
        from cenote.bridges.lancedb import LanceStore

        return LanceStore(Path(folder).expanduser(), meta)
    if kind == "qdrant":
        from cenote.bridges.qdrant import QdrantStore

        return QdrantStore(Path(folder).expanduser(), meta)
    from cenote.features.vectors import ExactStore

    try:
        return ExactStore(Path(folder).expanduser(), meta)
    except OSError as error:
        raise InputError(f"store: cannot write to {folder}: {error.strerror}; name another folder") from None
