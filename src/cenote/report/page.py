"""The page: everything that a comparison found, in one file that opens anywhere."""

from __future__ import annotations

import shlex
from pathlib import Path

from jinja2 import UndefinedError

import cenote.core.files as files
from cenote.core import InputError
from cenote.jobs.explain import choices, heads
from cenote.jobs.explain.result import JOB as EXPLAIN
from cenote.jobs.explain.result import Audit
from cenote.jobs.mix.result import JOB as MIX
from cenote.jobs.mix.result import PolicyFrontier
from cenote.jobs.probe.result import Comparison
from cenote.jobs.reduce.encoder import JOB as ENCODER
from cenote.jobs.reduce.encoder import EncoderFrontier
from cenote.jobs.reduce.result import JOB as REDUCE
from cenote.jobs.reduce.result import Frontier
from cenote.report import formats
from cenote.report.assets import environment, flat, shell
from cenote.report.attention import Attention
from cenote.report.audit import render_audit
from cenote.report.curves import HEIGHT, WIDTH, curves
from cenote.report.decoder import write_choices, write_heads
from cenote.report.formats import Units
from cenote.report.frontier import render_frontier
from cenote.report.layers import layer_map
from cenote.report.leaderboard import leaderboard
from cenote.report.looks import BAR_HEIGHT, FULL_COLOUR, samples
from cenote.report.matrix import matrix
from cenote.report.pareto import pareto_plot
from cenote.report.policies import render_policies
from cenote.report.table import render_table

PROBE = "probe"
KINDS: dict[str, type[Comparison] | type[Audit] | type[Frontier] | type[EncoderFrontier] | type[PolicyFrontier]] = {
    PROBE: Comparison,
    EXPLAIN: Audit,
    REDUCE: Frontier,
    ENCODER: EncoderFrontier,
    MIX: PolicyFrontier,
}
COMMANDS = {ENCODER: REDUCE}
"""That write what is not called as they are."""
MOST_BYTES = 3_000_000
WIDE, NARROW = (920, 430), (360, 400)


def write(out: Path) -> Path:
    """Build `report.html` from what `cenote probe`, `explain`, `reduce` or `mix` left in a folder.

    Args:
        out: folder with `comparison.json`; `attention.json` and `attention.safetensors` are drawn where they are present.

    Returns:
        The page.

    Raises:
        InputError: there is no comparison in the folder, or a file is damaged.
    """
    out = Path(out)
    found = out / "comparison.json"
    if not found.is_file() and (out / heads.FILE).is_file():
        return write_heads(heads.Heads.load(out), out)
    if not found.is_file() and (out / choices.FILE).is_file():
        return write_choices(choices.Choices.load(out), out)
    if not found.is_file():
        raise InputError(
            f"out: no comparison.json in {out}; name the folder that `cenote probe --out`, `cenote explain --out`, "
            f"`cenote reduce --out` or `cenote mix --out` wrote"
        )
    job = _job(found)
    try:
        comparison = KINDS[job].load(out)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise _damaged(found, error, job) from error
    attention = Attention.load(out) if isinstance(comparison, Comparison) else None
    try:
        page = _rendered(comparison, attention, out)
    except InputError:
        raise
    except (UndefinedError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise _damaged(found, error, job) from error
    path = out / "report.html"
    files.write_whole(path, page)
    return path


def _job(path: Path) -> str:
    """Which command wrote it."""
    try:
        raw = files.read_json(path)
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from error
    job = raw.get("job") if isinstance(raw, dict) else None
    return job if isinstance(job, str) and job in KINDS else PROBE


def _rendered(
    comparison: Comparison | Audit | Frontier | EncoderFrontier | PolicyFrontier, attention: Attention | None, out: Path
) -> str:
    if isinstance(comparison, Audit):
        return render_audit(comparison)
    if isinstance(comparison, PolicyFrontier):
        return render_policies(comparison)
    if isinstance(comparison, EncoderFrontier):
        d = comparison.dataset
        return render_table(comparison, f"{d['name']}: fewer tokens in {d['model']}, {d['images']:,} images")
    return render_frontier(comparison) if isinstance(comparison, Frontier) else render(comparison, attention, out)


def _damaged(path: Path, error: Exception, job: str = "probe") -> InputError:
    command = COMMANDS.get(job, job)
    return InputError(
        f"out: {path} cannot be read ({type(error).__name__}: {error}); run `cenote {command} --out {path.parent}` again, "
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
    units = Units.of(c)
    templates = environment(units)
    templates.filters.update(commas=formats.commas, short=formats.short, size=formats.size, quoted=shlex.quote)
    drawn = () if attention is None else samples(c, attention, count)
    return templates.get_template("page.html.j2").render(
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
        provenance=flat(c.provenance),
        **shell(),
    )
