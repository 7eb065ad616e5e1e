"""Where every method of cenote sits on the survey's axes, and a search: which attention do I need.

Source: Chaudhari, Mithal, Polatkan and Ramanath, "An Attentive Survey of Attention Models" (2021), arXiv 1904.02874.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from cenote.catalog import methods
from cenote.core import InputError


@dataclass(frozen=True)
class Record:
    """One method on the axes; axes do not exclude each other.

    Attributes:
        name: of the method, as in the catalog.
        sequences: `"self"` (from the tokens themselves, or one learned query), `"distinctive"` (from another sequence), `"co"`
            (two weigh each other), `"none"`.
        abstraction: `"single"` level or `"multi"`.
        positions: `"soft"` (all of them), `"hard"` (one or some), `"local"` (around a place).
        representation: `"single"`, `"multi-head"`, `"multi-dimensional"` (a score for every channel).
        alignment: what scores are; `"none"` where nothing is scored.
        distribution: what makes weights of them.
        architecture: `"pooling"`, `"transformer"`, `"graph"`, `"any"`.
    """

    name: str
    sequences: str
    abstraction: str
    positions: str
    representation: str
    alignment: str
    distribution: str
    architecture: str


@cache
def records() -> Mapping[str, Record]:
    """Of every method by its name.

    >>> records()["attsets"].representation
    'multi-dimensional'
    """
    raw = tomllib.loads(resources.files(__package__).joinpath("registry.toml").read_text("utf-8"))
    found: dict[str, Record] = {}
    for group in raw["group"]:
        said = {**raw["default"], **{k: v for k, v in group.items() if k != "methods"}}
        for name in group["methods"]:
            if name in found:
                raise InputError(f"registry: {name} stands in two groups")
            found[name] = Record(name, **said)
    return found


def find_attention(**axes: str) -> tuple[Record, ...]:
    """The methods that are what is asked for, in the order of the catalog.

    Args:
        axes: values of the attributes of `Record`; a value is found within longer ones, so that `alignment="dot"` finds
            scaled dot products.

    Raises:
        InputError: for an axis that there is none of.

    >>> [r.name for r in find_attention(representation="multi-dimensional", alignment="additive")][:2]
    ['attentive-statistics', 'layer-aware-tdnn']
    """
    known = {f.name for f in dataclasses.fields(Record)}
    if unknown := sorted(set(axes) - known):
        raise InputError(f"{unknown[0]}: no axis; there are {', '.join(sorted(known - {'name'}))}")
    held = [records()[m.name] for m in methods() if m.name in records()]
    return tuple(r for r in held if all(value in getattr(r, axis) for axis, value in axes.items()))
