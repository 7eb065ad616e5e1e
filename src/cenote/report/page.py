"""The page: everything that a comparison found, in one file that opens anywhere."""

from __future__ import annotations

import base64
import hashlib
import shlex
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

import cenote.core.files as files
from cenote.core import InputError
from cenote.jobs.probe.result import Comparison
from cenote.report import formats
from cenote.report.attention import Attention
from cenote.report.curves import HEIGHT, WIDTH, curves
from cenote.report.formats import Units
from cenote.report.layers import layer_map
from cenote.report.leaderboard import leaderboard
from cenote.report.looks import BAR_HEIGHT, FULL_COLOUR, samples
from cenote.report.matrix import matrix
from cenote.report.pareto import pareto_plot

MOST_BYTES = 3_000_000
WIDE, NARROW = (920, 430), (360, 400)


def write(out: Path) -> Path:
    """Build `report.html` from what `cenote probe` left in a folder.

    Args:
        out: folder with `comparison.json`; `attention.json` and `attention.safetensors` are drawn where they are present.

    Returns:
        The page.

    Raises:
        InputError: there is no comparison in the folder, or a file is damaged.
    """
    out = Path(out)
    found = out / "comparison.json"
    if not found.is_file():
        raise InputError(f"out: no comparison.json in {out}; name the folder that `cenote probe --out` wrote")
    try:
        comparison = Comparison.load(out)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise _damaged(found, error) from error
    attention = Attention.load(out)
    try:
        page = render(comparison, attention, out)
    except InputError:
        raise
    except (UndefinedError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise _damaged(found, error) from error
    path = out / "report.html"
    files.write_whole(path, page)
    return path


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"out: {path} cannot be read ({type(error).__name__}: {error}); run `cenote probe --out {path.parent}` again, "
        f"finished methods are not recomputed"
    )


def render(comparison: Comparison, attention: Attention | None = None, out: Path | None = None) -> str:
    """The page as text: below 3 MB, with no reference to anything outside itself.

    Args:
        comparison: from `cenote.jobs.probe.compare`.
        attention: what the probes looked at. Where the page would grow too large, fewer of its items are drawn.
        out: folder in which the probes were saved, for the lines that load them.

    Example:
        >>> from cenote.features import digits
        >>> comparison = cenote.jobs.probe.compare(digits(), ["mean", "max"], seeds=1)
        >>> cenote.report.render(comparison).splitlines()[0]
        '<!doctype html>'
    """
    count = 0 if attention is None else len(attention.items)
    page = _page(comparison, attention, count, out)
    while len(page.encode("utf-8", "backslashreplace")) > MOST_BYTES and count:
        count //= 2
        page = _page(comparison, attention, count, out)
    return page


def _page(c: Comparison, attention: Attention | None, count: int, out: Path | None) -> str:
    environment = Environment(
        loader=PackageLoader("cenote.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    units = Units.of(c)
    environment.filters.update(
        p=formats.p_value,
        significant=formats.significant,
        commas=formats.commas,
        short=formats.short,
        size=formats.size,
        duration=formats.duration,
        quoted=shlex.quote,
        moment=formats.moment,
        value=units.value,
        difference=units.difference,
        between=units.between,
    )
    script = _asset("behaviour.js")
    drawn = () if attention is None else samples(c, attention, count)
    return environment.get_template("page.html.j2").render(
        c=c,
        units=units,
        saved=None if out is None or not (out / "recommended").is_dir() else str(out / "recommended"),
        board=leaderboard(c),
        plots=[p for p in (pareto_plot(c, units, *WIDE), pareto_plot(c, units, *NARROW)) if p],
        layers=layer_map(c),
        matrix=matrix(c),
        curves=curves(c),
        panel={"width": WIDTH, "height": HEIGHT},
        samples=drawn,
        grid=None if attention is None else attention.grid,
        samples_left_out=0 if attention is None else len(attention.items) - len(drawn),
        bar_height=BAR_HEIGHT,
        full_colour=FULL_COLOUR,
        localisation=sorted(c.localisation.items(), key=lambda pair: -pair[1]),
        provenance=_flat(c.provenance),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        style=Markup(_asset("style.css")),
        dark=Markup(_asset("dark.css")),
    )


def _asset(name: str) -> str:
    return (package_files("cenote.report") / "templates" / name).read_text("utf-8")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines.

    >>> _flat({"seeds": [0, 1], "recipe": {"epochs": 40}})
    [('seeds', '0, 1'), ('recipe: epochs', '40')]
    """
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += _flat(value, f"{words}: ")
        else:
            lines.append((words, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return lines
