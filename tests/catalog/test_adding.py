"""A method is added to a copy of the package as docs/architecture.md says, and is found everywhere.

Its names are other than the page's: who follows the page word for word has a QueryPool already, and the test goes on passing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"QueryPool": "PoolOfThePage", "query-pool": "pool-of-the-page", "query_pool": "pool_of_the_page"}


def renamed(text: str) -> str:
    """The page's example under names that nobody took."""
    for old, new in NAMES.items():
        text = text.replace(old, new)
    return text


PAGE = renamed((ROOT / "docs" / "architecture.md").read_text("utf-8"))

USE = """
import sys
import cenote
from cenote.catalog import find, method

assert cenote.__file__.startswith(sys.argv[1]), cenote.__file__
pool = cenote.create("pool-of-the-page", dim=8)
assert type(pool) is cenote.pool.PoolOfThePage
assert "PoolOfThePage" in dir(cenote.pool)
found = method("pool-of-the-page")
assert found in cenote.methods(room="pool", kind="sets")
print(found.path, found.slug, *(s.slug for s in find("PoolOfThePage") if s.status == "partial"))
"""


def code_of_the_method() -> str:
    """The class that the page shows, without the lines that try it."""
    (block,) = re.findall(r"^```python\n(.*?class PoolOfThePage.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    code, _, tried = block.partition("\n\n\ncheck_pool(")
    assert tried
    return f"{code}\n"


def entry_of_the_method() -> str:
    (block,) = re.findall(
        r"^ +```toml\n(.*?)^ +```$", PAGE.partition("## How to add a method")[2], re.MULTILINE | re.DOTALL
    )
    return textwrap.dedent(block)


def run(copy: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package, and in it the file of the page's first step."""
    shutil.copytree(ROOT / "src" / "cenote", tmp_path / "cenote", ignore=shutil.ignore_patterns("__pycache__"))
    assert "`src/cenote/pool/attention/pool_of_the_page.py`" in PAGE
    (tmp_path / "cenote/pool/attention/pool_of_the_page.py").write_text(code_of_the_method(), "utf-8")
    return tmp_path


def test_a_pool_of_its_own(copy: Path) -> None:
    methods = copy / "cenote/catalog/methods.toml"
    methods.write_text(f"{methods.read_text('utf-8')}\n{entry_of_the_method()}", "utf-8")
    assert run(copy, "-c", USE, str(copy)) == "cenote.pool.attention.pool_of_the_page.PoolOfThePage None"
    assert run(copy, str(ROOT / "scripts/build_stubs.py")) == "names of the rooms: 6 stubs, 1 changed"
    stub = (copy / "cenote/pool/__init__.pyi").read_text("utf-8")
    assert "\nfrom cenote.pool.attention.pool_of_the_page import PoolOfThePage as PoolOfThePage\n" in stub


def test_a_pool_of_a_published_system(copy: Path) -> None:
    entry = entry_of_the_method()
    (path,) = re.findall(r'^class = "(.*)"$', entry, re.MULTILINE)
    assert 'says `class = "PoolOfThePage"`' in re.sub(r"\s+", " ", PAGE)
    system = (
        '[[system]]\nrow = 120\nslug = "page-queries"\ntitle = "T"\nyear = 2026\npaper = "P"\nroom = "pool/attention"\n'
    )
    for file, more in (
        ("systems.toml", f'{system}classes = ["{path}"]\n'),
        ("methods.toml", entry.replace(path, "PoolOfThePage")),
    ):
        data = copy / "cenote/catalog" / file
        data.write_text(f"{data.read_text('utf-8')}\n{more}", "utf-8")
    assert run(copy, "-c", USE, str(copy)) == f"{path} page-queries page-queries"
