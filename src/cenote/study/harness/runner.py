"""Find, run and keep studies."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cenote.catalog import System, systems
from cenote.compare.sources import source_digest
from cenote.core import InputError, files
from cenote.study.harness.pages import page
from cenote.study.harness.verdict import Size, Verdict

INCHES = (8.0, 3.2)


def studies() -> dict[str, System]:
    """The systems that have a study, by slug, in the order of their rows."""
    return {s.slug: s for s in systems() if s.study is not None}


def study_of(slug: str) -> Callable[[int, Size], Verdict]:
    """The study's `run`.

    Raises:
        InputError: naming the nearest slugs where there is none.
    """
    known = studies()
    if slug not in known:
        there = f"there are: {', '.join(known)}"
        if any(s.slug == slug for s in systems()):
            raise InputError(f"SLUG: {slug!r} has no study yet; {there}")
        near = difflib.get_close_matches(slug, [s.slug for s in systems()], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else there
        raise InputError(f"SLUG: {slug!r} is no system; {hint}")
    return importlib.import_module(str(known[slug].study)).run


def is_current(verdict: Verdict) -> bool:
    """Whether the code that measured it is the code that is here now."""
    system = studies().get(verdict.slug)
    if system is None or "source" not in verdict.provenance:
        return False
    # a study that cannot be imported any more has changed
    try:
        module = importlib.import_module(str(system.study))
    except Exception:
        return False
    return verdict.provenance["source"] == source_digest(module)


def write(verdict: Verdict, out: Path, earlier: bool = False) -> Verdict:
    """Keep a verdict in `out` as picture, page and JSON, the JSON last: where it stands, the study is finished.

    `earlier`: its code has changed since it was measured, and its page says so.
    """
    name = f"{verdict.slug}.svg"
    if not isinstance(verdict.figure, str):
        files.write_whole(out / name, _svg(verdict))
    stored = dataclasses.replace(verdict, figure=name)
    files.write_whole(out / f"{verdict.slug}.md", page(stored, earlier))
    files.write_whole(out / f"{verdict.slug}.json", stored.to_json())
    return stored


def read(out: Path) -> dict[str, Verdict]:
    """The verdicts kept in `out`, by slug, in the order of their rows."""
    kept = {}
    for system in systems():
        file = out / f"{system.slug}.json"
        if file.is_file():
            try:
                kept[system.slug] = Verdict.from_json(file.read_text("utf-8"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{file}: is not a result of this version ({error}); delete it and run again"
                ) from error
    return kept


@dataclass(frozen=True)
class Walk:
    """What became of each study: run now, kept from before, or failed with a message.

    Attributes:
        earlier: whose results were measured by earlier code and still stand there.
    """

    ran: tuple[str, ...]
    kept: tuple[str, ...]
    failed: dict[str, str]
    earlier: tuple[str, ...] = ()


def run_all(
    out: Path,
    size: Size,
    seed: int = 0,
    *,
    rows: Iterable[int] | None = None,
    fresh: bool = False,
    on_study: Callable[[str, str], object] = lambda *_: None,
) -> Walk:
    """Run every study whose result of this size and seed, measured by the code that is here now, is not yet in `out`.

    The pages of other results are marked where they were measured by earlier code.

    Args:
        out: folder of results.
        size, seed: of every study.
        rows: only the systems of these rows.
        fresh: run again also what is finished.
        on_study: called with a slug and "running", "kept", a verdict or "failed".

    Raises:
        InputError: where no study belongs to `rows`.
    """
    wanted = None if rows is None else set(rows)
    chosen = {slug: s for slug, s in studies().items() if wanted is None or s.row in wanted}
    if not chosen:
        have = ", ".join(str(s.row) for s in studies().values())
        raise InputError(f"rows: no study belongs to {sorted(wanted or ())}; rows with a study: {have}")
    finished = {} if fresh else read(out)
    ran, kept, failed = [], [], {}
    for slug in chosen:
        done = finished.get(slug)
        if done is not None and (done.size, done.seeds[0]) == (size, seed) and is_current(done):
            # pages and scoreboard follow from the JSON, whatever version wrote them
            write(done, out)
            kept.append(slug)
            on_study(slug, "kept")
            continue
        on_study(slug, "running")
        # one broken study must not cost the results of the others
        try:
            verdict = write(study_of(slug)(seed, size), out)
        except Exception as error:
            failed[slug] = f"{type(error).__name__}: {error}"
            on_study(slug, "failed")
            continue
        ran.append(slug)
        on_study(slug, verdict.said)
    earlier = {slug: verdict for slug, verdict in read(out).items() if not is_current(verdict)}
    for verdict in earlier.values():
        write(verdict, out, earlier=True)
    return Walk(tuple(ran), tuple(kept), failed, tuple(earlier))


def _svg(verdict: Verdict) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    assert not isinstance(verdict.figure, str)
    # without a date and with a fixed salt, the same result gives the same file
    with matplotlib.rc_context({"svg.hashsalt": verdict.slug, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        verdict.figure(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
