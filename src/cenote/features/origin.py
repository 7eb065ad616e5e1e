"""Which model made tokens, out of what, and how: what tokens must have in common to be of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

ASIDE = ("name", "revision", "precision")
"""Of a model, what does not tell its tokens from another's: a folder may be moved, and numbers be computed in fewer bits."""


@dataclass(frozen=True)
class Origin:
    """Where tokens come from.

    Attributes:
        kind: image, audio or text.
        model: `name` (for people), `revision`, `library`, `model_class`, `weights_sha256`, `config_sha256`, `precision`, and
            `code_sha256` where code of its own was run.
        preprocessing: the settings of the preprocessing.
        pooled: name of the pooling that was done while extracting; `None`: all tokens are there.
        dtype: how numbers are stored.
    """

    kind: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    pooled: str | None = None
    dtype: str = "float16"

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` made, after it was in a file.

        Raises:
            ValueError: where it is not that.
        """
        try:
            found = cls(**content)
        except TypeError as error:
            raise ValueError(f"origin: {error}") from None
        if not isinstance(found.model, dict) or not isinstance(found.preprocessing, dict):
            raise ValueError("origin: expected model and preprocessing as objects")
        if not isinstance(found.model.get("name"), str):
            raise ValueError("origin: the model has no name")
        return found

    @property
    def name(self) -> str:
        """Of the model, for people."""
        return str(self.model["name"])

    def differences(self, other: Origin, mine: str, its: str) -> list[str]:
        """In words, what makes the tokens of another origin other tokens.

        Example:
            >>> a = Origin("text", {"name": "a", "weights_sha256": "1" * 64}, {"max_length": 16})
            >>> b = Origin("text", {"name": "b", "weights_sha256": "2" * 64}, {"max_length": 16})
            >>> a.differences(b, "in the probe", "here")
            ["the model's weights: 111111111111... in the probe, 222222222222... here"]
        """
        return told_apart(self._deciding(), other._deciding(), mine, its)

    def _deciding(self) -> dict[str, Any]:
        model = {name: value for name, value in self.model.items() if name not in ASIDE}
        return {"kind": self.kind, "model": model, "preprocessing": self.preprocessing, "pooled": self.pooled}


def told_apart(first: Mapping[str, Any], second: Mapping[str, Any], where: str, there: str) -> list[str]:
    """In words, where two nested objects differ.

    >>> told_apart({"items": 3}, {"items": 4}, "in the store", "now")
    ['number of items: 3 in the store, 4 now']
    """
    mine, its = _flat(first), _flat(second)
    return [
        f"{_worded(name)}: {_short(mine.get(name))} {where}, {_short(its.get(name))} {there}"
        for name in sorted(mine.keys() | its.keys())
        if mine.get(name) != its.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            k: v for part, inner in value.items() for k, v in _flat(inner, f"{name}.{part}" if name else part).items()
        }
    return {name: list(value) if isinstance(value, tuple) else value}


def _worded(name: str) -> str:
    return {
        "model.weights_sha256": "the model's weights",
        "model.config_sha256": "the model's configuration",
        "model.code_sha256": "the model's own code",
        "model.revision": "the model's revision",
        "items": "number of items",
        "items_sha256": "the items",
    }.get(name, name)


def _short(value: Any) -> str:
    text = str(value)
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{text[:12]}..." if is_hash else text
