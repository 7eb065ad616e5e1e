"""What every page stands on: templates with their filters, style, script, and settings as lines."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files as package_files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cenote.report import formats
from cenote.report.formats import Units


def environment(units: Units) -> Environment:
    """The templates, which write a metric in these units."""
    made = Environment(
        loader=PackageLoader("cenote.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        p=formats.p_value,
        significant=formats.significant,
        duration=formats.duration,
        moment=formats.moment,
        value=units.value,
        difference=units.difference,
        between=units.between,
    )
    return made


def shell() -> dict[str, Any]:
    """Style and script of a page, and the script's digest for its policy."""
    script = _asset("behaviour.js")
    return {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        "style": Markup(_asset("style.css")),
        "dark": Markup(_asset("dark.css")),
    }


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines.

    >>> flat({"seeds": [0, 1], "recipe": {"epochs": 40}})
    [('seeds', '0, 1'), ('recipe: epochs', '40')]
    """
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += flat(value, f"{words}: ")
        else:
            lines.append((words, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return lines


def _asset(name: str) -> str:
    return (package_files("cenote.report") / "templates" / name).read_text("utf-8")
