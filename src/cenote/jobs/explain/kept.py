"""Findings that are kept as one JSON file of a folder."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from cenote.core import InputError, files
from cenote.core.json_text import json_text


class Kept(ABC):
    """Base of dataclasses that are written with their digest and read back.

    Attributes:
        file: its name in the folder.
        what: it holds, for messages.
        again: the command that writes it.
    """

    file: ClassVar[str]
    what: ClassVar[str]
    again: ClassVar[str]

    @property
    @abstractmethod
    def sentence(self) -> str:
        """The finding in words."""

    @classmethod
    @abstractmethod
    def of_json(cls, raw: Any) -> Self:
        """From what the file holds; whatever is missing or of another type may raise what it likes."""

    def save(self, folder: Path) -> Path:
        """Write the file."""
        path = Path(folder) / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files.sealed({**dataclasses.asdict(self), "sentence": self.sentence})  # type: ignore[call-overload]
        files.write_whole(path, json_text(content, indent=1))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: naming the file, where it is none of these.
        """
        path = Path(folder) / cls.file
        try:
            return cls.of_json(files.opened(files.read_json(path), path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"out: {path} holds no {cls.what} ({error}); run {cls.again} again") from None
