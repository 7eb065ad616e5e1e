"""Make the embedded collection of `cenote reduce`: manual pages of NumPy and SciPy, from their docstrings.

A query is the first sentence of a function's page, its document is the rest. The page itself answers with gain 2, pages
that its authors list under "See Also" with gain 1. What comes out depends on the versions that are installed, which the file
names; it is made once and committed.

    python -m scripts.build_manuals
"""

from __future__ import annotations

import gzip
import importlib
import inspect
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy
import scipy

FILE = Path(__file__).resolve().parents[1] / "src" / "cenote" / "features" / "data" / "manuals.json.gz"
MODULES = (
    "scipy.stats",
    "scipy.signal",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.interpolate",
    "scipy.ndimage",
    "scipy.spatial.distance",
    "scipy.integrate",
    "scipy.special",
    "scipy.sparse.linalg",
    "numpy",
    "numpy.linalg",
    "numpy.fft",
)
WORDS = (40, 110)
"""Of a document, at least and at most."""
DOCUMENTS, QUERIES = 320, 200


def main() -> None:
    pages = {f"{module}.{name}": doc for module in MODULES for name, doc in _documented(module)}
    short = defaultdict(list)
    for name in pages:
        short[name.rpartition(".")[2]].append(name)
    parts = {name: _parts(doc) for name, doc in pages.items()}
    usable = {n: p for n, p in parts.items() if len(p[1].split()) >= WORDS[0] and 4 <= len(p[0].split()) <= 25}
    linked = {
        name: sorted({other for see in found[2] for other in _named(see, name, short) if other in usable} - {name})
        for name, found in usable.items()
    }
    # families of pages that refer to each other, not one page of each
    order = sorted(usable, key=lambda n: (-len(linked[n]), n))
    chosen: list[str] = []
    for name in order:
        for one in (name, *linked[name]):
            if one not in chosen and len(chosen) < DOCUMENTS:
                chosen.append(one)
    documents = {n: " ".join(usable[n][1].split()[: WORDS[1]]) for n in sorted(chosen)}
    asked = sorted((n for n in documents if set(linked[n]) & documents.keys()), key=lambda n: hash_of(n))[:QUERIES]
    content = {
        "about": f"docstrings of NumPy {numpy.__version__} and SciPy {scipy.__version__}, BSD-3-Clause",
        "documents": documents,
        "queries": {n: usable[n][0] for n in sorted(asked)},
        "qrels": {n: {n: 2} | {o: 1 for o in linked[n] if o in documents} for n in sorted(asked)},
    }
    FILE.write_bytes(gzip.compress(json.dumps(content, indent=0, sort_keys=True).encode(), 9, mtime=0))
    answers = sum(len(of) for of in content["qrels"].values())
    print(f"{len(documents)} documents, {len(asked)} queries, {answers} answers, {FILE.stat().st_size:,} bytes")


def hash_of(name: str) -> str:
    """An order that hangs on nothing but names."""
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()


def _documented(module: str) -> list[tuple[str, str]]:
    found = importlib.import_module(module)
    names = sorted(name for name in found.__all__ if not name.startswith("_"))
    return [(n, inspect.cleandoc(doc)) for n in names if (doc := getattr(getattr(found, n), "__doc__", None))]


def _parts(doc: str) -> tuple[str, str, list[str]]:
    """The first sentence, what follows with the notes, and the names under "See Also"."""
    pieces = re.split(r"\n([A-Z][A-Za-z ]+)\n-{3,}\n", f"\n{doc}")
    paragraphs = pieces[0].strip().split("\n\n")
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    # a signature stands before the first sentence of what is written in C
    if re.match(r"^[\w.]+\(.*\)", paragraphs[0].replace("\n", " ")):
        paragraphs = paragraphs[1:]
    if not paragraphs:
        return "", "", []
    body = "\n\n".join([*paragraphs[1:], sections.get("Notes", "")])
    body = re.sub(r"\*\*Array API Standard Support\*\*.*", "", body, flags=re.DOTALL)
    body = re.sub(r"The documentation is written assuming array arguments.*?\n\n", "", body, flags=re.DOTALL)
    body = re.sub(r"\.\. (versionadded|versionchanged|deprecated|math|plot)::[^\n]*", " ", body)
    body = re.sub(r":\w+:`~?([^`]*)`", r"\1", body).replace("``", "").replace("`", "")
    names = [
        name.strip("`:,. ").removeprefix("func:`")
        for line in sections.get("See Also", "").split("\n")
        if line and not line.startswith(" ")
        for name in line.split(" : ")[0].split(",")
    ]
    return " ".join(paragraphs[0].split()).replace("`", ""), " ".join(body.split()), names


def _named(see: str, by: str, short: dict[str, list[str]]) -> list[str]:
    """The pages that a name under "See Also" means: of its own module, else of any."""
    found = short.get(see.rpartition(".")[2], [])
    own = [name for name in found if name.rpartition(".")[0] == by.rpartition(".")[0]]
    return own or found


if __name__ == "__main__":
    main()
