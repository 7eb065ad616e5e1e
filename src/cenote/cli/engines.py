"""Where a job is computed, by the name that a person types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.compare import Engine
    from cenote.jobs.extract import Engine as Extractor

ENGINES = ("local", "ray")


def known_engine(name: str) -> str:
    """The same name.

    Raises:
        InputError: where there is no such engine.
    """
    if name not in ENGINES:
        raise InputError(f"engine: expected {' or '.join(ENGINES)}, got {name!r}")
    return name


def extractor(name: str, address: str) -> Extractor | None:
    """Where tokens are computed; `None`: in this process."""
    if known_engine(name) == "local":
        return None
    from cenote.scale import RayEngine

    return RayEngine(address)


def sweep(name: str, address: str) -> Engine | None:
    """Where arms are trained; `None`: here."""
    if known_engine(name) == "local":
        return None
    from cenote.scale import RaySweep

    return RaySweep(address)
