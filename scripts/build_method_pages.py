"""Write docs/methods: one page per published system that is built, one per further method that has a name, and the index.

python scripts/build_method_pages.py [--check]
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cenote
from cenote.catalog import Method, Part, System, load
from cenote.study import Verdict

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "methods"
STUDIES = DOCS / "studies"
MARK = "<!-- written by scripts/build_method_pages.py; do not edit -->"
RESULTS = DOCS.parent / "benchmarks" / "results"
BENCHMARKS = {"deeplab": "dense_crf"}
NOT_FREE = ("CC BY-NC", "Apple", "all rights", "academic")
ROOMS = {
    "pool/attention": "Pool: attention",
    "pool/sequence": "Pool: sequences",
    "pool/layers": "Pool: layers",
    "pool/spatial": "Pool: maps",
    "pool/graph": "Pool: graphs",
    "pool/bags": "Pool: bags",
    "reduce": "Reduce",
    "mix": "Mix",
    "explain": "Explain",
    "steer": "Steer",
    "select": "Select",
    "study": "Study only",
}


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    written = {f"{s.slug}.md": system_page(s) for s in cenote.systems() if has_page(s)}
    for m in unpublished():
        written[f"{m.name}.md"] = method_page(m)
    return written | {"index.md": index()}


def has_page(s: System) -> bool:
    return s.status != "planned" or s.study is not None


def unpublished() -> list[Method]:
    """Named methods that belong to none of the systems: the mean, the maximum, ABMIL, ..."""
    return [m for m in cenote.methods() if m.slug is None]


def system_page(s: System) -> str:
    lines = [MARK, "", f"# {s.title}", "", facts(s), ""]
    if s.classes:
        lines += [one_line(s.classes[0]), ""]
    lines += [f"**{word}.** {text}\n" for word, text in (("When", s.when), ("Cost", s.cost)) if text]
    lines += measured(s)
    if s.legal:
        lines += [f"**Note.** {s.legal} cenote's classes are written from the published equations.", ""]
    elif s.licence and any(word in s.licence for word in NOT_FREE):
        lines += [
            f"**Note.** The authors' code is under a licence that restricts its use ({s.licence}). cenote's classes are "
            "written from the published equations and contain none of it.",
            "",
        ]
    if names := [m for m in cenote.methods() if m.slug == s.slug]:
        lines += ["## By name", "", *(by_name(m) for m in names), ""]
    if s.classes:
        lines += ["## Classes", ""]
        under: dict[str, list[str]] = {}
        for path in s.classes:
            under.setdefault(documented(path), []).append(path.rpartition(".")[2])
        for path, names in under.items():
            lines += reference(path, names)
    lines += [*consists_of(s), "## Does the claim show here?", "", *study(s)]
    return finished(lines)


def measured(s: System) -> list[str]:
    """What a benchmark of its own found, where it has one."""
    kept = RESULTS / f"{BENCHMARKS.get(s.slug)}.json"
    if not kept.is_file():
        return []
    found = json.loads(kept.read_text("utf-8"))
    threads = found["machine"]["threads"]
    rows = [
        f"- {p['name']}: {float(p['ours_ms']['median']):,.0f} ms by {p['ours']}, "
        f"{float(p['theirs_ms']['median']):,.0f} ms by {p['theirs']}"
        for p in found["pairs"]
    ]
    where = f"{found['machine']['processor']}, {threads} thread{'s' if threads > 1 else ''}"
    return [f"**Measured.** `{found['command']}` on {where}:", "", *rows, ""]


def method_page(m: Method) -> str:
    lines = [MARK, "", f"# {m.name}", "", one_line(m.path), "", "## By name", "", by_name(m), "", "## Class", ""]
    return finished(lines + reference(documented(m.path), [m.path.rpartition(".")[2]]))


def facts(s: System) -> str:
    paper = s.paper
    if paper.startswith("arXiv "):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv ')})"
    code = "no code of the authors found"
    if s.code:
        licence = f" ({'no licence found' if s.licence == 'none found' else s.licence})" if s.licence else ""
        code = f"authors' code [{s.code}](https://github.com/{s.code}){licence}"
    return f"`{s.slug}`, row {s.row}, {s.year}, {paper}; {code}; room `{s.room}`."


def by_name(m: Method) -> str:
    settings = "".join(f", {k}={v!r}" for k, v in (m.settings or {}).items())
    cls = m.path.rpartition(".")[2]
    command = m.room if m.room in ("explain", "mix") else "probe"
    fast = f" Part of `cenote {command} --methods fast`." if m.fast else ""
    return f'- `cenote.create("{m.name}", ...)` builds `{cls}(...{settings})`: {m.summary}.{fast}'


def documented(path: str) -> str:
    """The path itself, or of a class without a docstring of its own that of the base whose docstring it has."""
    found = load(path)
    if not inspect.isclass(found):
        return path
    base = next(c for c in found.__mro__ if c.__doc__)
    return path if base is found else f"{base.__module__}.{base.__qualname__}"


def reference(path: str, names: list[str]) -> list[str]:
    """Where it is defined and its docstring, and under which names it is to be had where that is not its own."""
    where = inspect.getsourcefile(inspect.unwrap(load(path)))
    assert where is not None
    source = Path(where).resolve().relative_to(DOCS.parent).as_posix()
    own = path.rpartition(".")[2]
    had_as = f", to be had as {', '.join(f'`{n}`' for n in names)}" if names != [own] else ""
    return [f"`{source}`{had_as}", "", f"::: {path}", ""]


def consists_of(s: System) -> list[str]:
    """The map of its parts, the missing ones first."""
    if not s.parts:
        return []
    ordered = sorted(s.parts, key=lambda p: p.state != "missing")

    def where(p: Part) -> str:
        said = {"missing": p.missing, "answered": p.answered}.get(p.state)
        return "; ".join(filter(None, [", ".join(f"`{m}`" for m in p.met_by), said]))

    return [
        "## What it consists of",
        "",
        f"{s.standing[0].upper()}{s.standing[1:]}.",
        "",
        *table(("part", "kind", "state", "where, or why not"), [(p.name, p.kind, p.state, where(p)) for p in ordered]),
        "",
    ]


def study(s: System) -> list[str]:
    if s.study is None:
        return ["There is no study of it yet."]
    kept = STUDIES / f"{s.slug}.json"
    if not kept.is_file():
        return [f"`cenote study {s.slug}` checks it; no result is kept in this repository yet."]
    verdict = Verdict.from_json(kept.read_text("utf-8"))
    return [
        f"**Claim.** {verdict.claim}",
        "",
        f"**Verdict: {verdict.said}**, {len(verdict.seeds)} seeds, size {verdict.size}. "
        f"Numbers: [the study's page](../studies/{s.slug}.md). Again: `cenote study {s.slug}`.",
        "",
        f"![What was measured](../studies/{verdict.figure})",
    ]


def index() -> str:
    systems = cenote.systems()
    counts = Counter(s.status for s in systems)
    lines = [
        MARK,
        "",
        "# All methods",
        "",
        f"{len(systems)} published systems: {counts['complete']} complete, every part met or answered, "
        f"{counts['partial']} partial, {counts['planned']} planned. Numbers after a status: parts met or answered, of all. "
        "`cenote list` prints the same, `cenote show NAME` one of them.",
        "",
        "## Pools that everybody knows",
        "",
        *table(("name", "what it does"), [(f"[{m.name}]({m.name}.md)", m.summary) for m in unpublished()]),
    ]
    for room, heading in ROOMS.items():
        here = [s for s in systems if s.room == room]
        lines += ["", f"## {heading}", "", *table(("row", "system", "year", "title", "status"), map(row, here))]
    return finished(lines)


def row(s: System) -> tuple[str, ...]:
    link = f"[{s.slug}]({s.slug}.md)" if has_page(s) else s.slug
    done = f", {s.settled} of {len(s.parts)}" if s.parts else ""
    return str(s.row), link, str(s.year), s.title, f"{s.status}{done}"


def table(headings: Any, rows: Any) -> list[str]:
    def line(cells: Any) -> str:
        return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"

    return [line(headings), line(["---"] * len(headings)), *map(line, rows)]


def one_line(path: str) -> str:
    return (inspect.getdoc(load(path)) or "").split("\n\n")[0].replace("\n", " ")


def finished(lines: list[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    new = pages()
    old = {p.name: p.read_text("utf-8") for p in FOLDER.glob("*.md")}
    stale = sorted(n for n in new.keys() | old.keys() if new.get(n) != old.get(n))
    if "--check" in sys.argv:
        sys.exit(f"docs/methods is out of date, run make pages: {', '.join(stale)}" if stale else 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in new:
            (FOLDER / name).write_text(new[name], "utf-8")
        else:
            (FOLDER / name).unlink()
    print(f"docs/methods: {len(new)} pages, {len(stale)} changed")


if __name__ == "__main__":
    main()
