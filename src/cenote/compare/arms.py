"""What is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Self

from cenote.compare.cells import Cell

OnShare = Callable[[str, float], None]
"""Called with an arm's name and the share of its work that is done; 1.0 also where a finished cell was found."""


def unheard(_name: str, _share: float) -> None:
    """An `OnShare` for whom nobody listens."""


class Arm(ABC):
    """One row of the table, before it is measured. A job derives from it.

    Attributes:
        name: unique in a comparison.
        summary: one line for people.
        control: whether it must lose: a table in which it does not says nothing about the others.
        reference: whether it only shows what the usual alternative scores: never winner, baseline or recommended.
    """

    name: str
    summary: str = ""
    control: bool = False
    reference: bool = False

    @abstractmethod
    def key(self) -> Mapping[str, Any]:
        """Everything that decides the cell but code: data, settings, seeds. Goes into JSON."""

    @abstractmethod
    def run(self, on_share: OnShare = unheard) -> Cell:
        """The cell, wherever this is called; `tensors["scores"]` holds `[seeds, units, ...]`."""

    def sources(self) -> tuple[type | ModuleType, ...]:
        """Classes and modules whose source decides the cell, with all that they import."""
        return (type(self),)

    def unfit(self) -> str | None:
        """Why it cannot be measured on these units; `None` where it can."""
        return None

    def finish(self, cell: Cell) -> Cell:
        """The cell with what can only be measured when nothing else runs, such as a latency; itself where that is there."""
        return cell

    def reported(self, cell: Cell) -> Mapping[str, Any]:
        """Fields of the job's `ArmResult` besides those that follow from the scores."""
        return cell.record

    def work(self) -> int:
        """By which arms can be ordered, so that a long one does not start last."""
        return 0

    def gains_by_processes(self) -> bool:
        """Whether one thread computes it as fast as several, from data that may be copied."""
        return True

    def travelling(self) -> Self:
        """The same, without what need not go to another process or machine to measure it there."""
        return self
