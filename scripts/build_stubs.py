"""Write src/cenote/ROOM/__init__.pyi: for type checkers and editors, the names that each room shows by the catalog.

python scripts/build_stubs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import cenote
from cenote.catalog import ROOMS, public

PACKAGE = Path(cenote.__file__).parent
MARK = "# written by scripts/build_stubs.py from the catalog; do not edit"
WIDTH = 120


def stub(room: str) -> str:
    lines = [MARK, ""]
    for name, path in sorted(public(room).items(), key=lambda item: item[1]):
        module = path.rpartition(".")[0]
        line = f"from {module} import {name} as {name}"
        lines.append(line if len(line) <= WIDTH else f"from {module} import (\n    {name} as {name},\n)")
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    stubs = {PACKAGE / room / "__init__.pyi": stub(room) for room in ROOMS}
    stale = [path for path, text in stubs.items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        names = ", ".join(path.relative_to(PACKAGE.parent).as_posix() for path in stale)
        sys.exit(f"the names of the rooms are out of date, run make pages: {names}" if stale else 0)
    for path in stale:
        path.write_text(stubs[path], "utf-8")
    print(f"names of the rooms: {len(stubs)} stubs, {len(stale)} changed")


if __name__ == "__main__":
    main()
