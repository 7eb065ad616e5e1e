"""What each published system consists of, and what of it stands here: `parts/SLUG.toml`, one table per part.

A part is met by something that can be looked up, or is missing, or is answered: it cannot or should not be met, and why.
Whether a system is complete follows from that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from cenote.catalog.names import read, unique
from cenote.core.errors import InputError

Kind = Literal["method", "model", "training", "inference", "data", "metric", "variant", "edge", "study", "knockout"]
State = Literal["present", "missing", "answered"]


@dataclass(frozen=True)
class Part:
    """One thing that a published system consists of.

    Attributes:
        name: within the system.
        kind: `method` (an operator or formula), `model` (the whole published model), `training`, `inference`, `data`, `metric`,
            `variant`, `edge` (an edge case with its right answer), `study` (an arm of the claim's check), `knockout` (the arm
            without the mechanism that the claim is about).
        what: it is.
        met_by: where it stands: dotted paths, `tests/FILE.py::test_name`, `study: ARM`, `docs/PAGE.md`, `golden: CASE`.
        missing: what is not there yet.
        answered: why it cannot or should not be there.
    """

    name: str
    kind: Kind
    what: str
    met_by: tuple[str, ...] = ()
    missing: str | None = None
    answered: str | None = None

    def __post_init__(self) -> None:
        said = [bool(self.met_by) and self.missing is None, self.missing is not None, self.answered is not None]
        if sum(said) != 1 or self.kind not in get_args(Kind):
            raise InputError(
                f"catalog: part {self.name!r} is met, or missing, or answered with a reason, and of a kind"
            )

    @property
    def state(self) -> State:
        """`missing` also where half of it stands: `met_by` then names that half."""
        return "missing" if self.missing is not None else "answered" if self.answered is not None else "present"


@cache
def parts(slug: str) -> tuple[Part, ...]:
    """The parts of a system; none where nobody has written them down yet.

    >>> {p.state for p in parts("simpool")} <= {"present", "missing", "answered"}
    True
    """
    if not resources.files("cenote.catalog").joinpath("parts", f"{slug}.toml").is_file():
        return ()
    found = tuple(_part(raw) for raw in read(f"parts/{slug}.toml")["part"])
    unique(f"part of {slug}", ((p.name, p.kind) for p in found))
    return found


def _part(raw: dict[str, Any]) -> Part:
    return Part(**{**raw, "met_by": tuple(raw.get("met_by", ()))})
