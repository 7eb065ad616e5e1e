"""Every study runs at its smallest size and yields a complete verdict."""

import importlib
import json
import math
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import matplotlib.figure
import pytest
from tests.pools import thoroughly_but

import cenote
from cenote.study import harness
from cenote.study.harness import SIZES, UNDECIDED, Verdict, registry
from cenote.study.harness.runner import is_current, read, studies, study_of, write
from cenote.study.harness.verdict import seeds_by_size

# studies without a knock-out, gates and a registered rule: the list may only become shorter, and a new study is not put on it
NOT_YET = [
    "adaptive-noise-pooling",
    "graph-parsing-networks",
    "tree-cross-attention",
]

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_first_studies_are_there() -> None:
    rows = {s.row for s in studies().values()}
    assert {7, 9, 16, 17, 23, 28} <= rows
    assert all(s.study == f"cenote.study.{slug.replace('-', '_')}" for slug, s in studies().items())


# one for each kind of data and of training that studies share
QUICK = {"drasp", "maxpoolbert", "multi-layer-trainable", "softpool", "sparse-hierarchical-graph", "sta-v2a"}


@pytest.mark.parametrize("slug", thoroughly_but(QUICK, studies(), "trains every arm of a study"))
def test_study_runs_and_is_complete(slug: str, tmp_path: Path) -> None:
    verdict = study_of(slug)(0, "smoke")
    assert verdict.slug == slug
    assert verdict.size == "smoke"
    assert len(verdict.claim) > 40
    assert verdict.rule.startswith("Refuted if")
    assert verdict.holds == UNDECIDED
    assert len(verdict.seeds) == len(set(verdict.seeds)) >= 2
    assert verdict.seconds > 0
    assert verdict.interval[0] <= verdict.effect <= verdict.interval[1]
    assert is_current(verdict)
    assert any(c.in_rule for c in verdict.checks)
    for check in verdict.checks:
        assert check.interval[0] <= check.effect <= check.interval[1]
        assert all(map(math.isfinite, check.interval))
        assert check.expected != (None, None)
    assert len({c.what for c in verdict.checks}) == len(verdict.checks)
    for row in verdict.table:
        assert len(row["per seed"]) == len(verdict.seeds)
        assert row["mean"] == pytest.approx(sum(row["per seed"]) / len(row["per seed"]))
    assert (slug in NOT_YET) == (not verdict.knocked_out or not verdict.gates), slug
    if slug not in NOT_YET:
        _is_registered(verdict)
    figure = matplotlib.figure.Figure()
    assert callable(verdict.figure)
    verdict.figure(figure)
    assert figure.axes

    stored = write(verdict, tmp_path)
    assert read(tmp_path) == {slug: stored}
    assert (tmp_path / f"{slug}.svg").read_text().lstrip().startswith("<?xml")
    assert verdict.claim in (tmp_path / f"{slug}.md").read_text()


def _is_registered(v: Verdict) -> None:
    module = importlib.import_module(str(studies()[v.slug].study))
    now = registry.entry_of(module, v.claim, v.rule, seeds_by_size(module), v.checks, v.knocked_out, v.gates)
    assert registry.differences(v.slug, now) == (), f"python -m scripts.register_study {v.slug} --reason ..."


def test_the_list_of_studies_to_be_brought_under_the_rules_names_studies() -> None:
    assert set(NOT_YET) <= set(studies())
    assert len(NOT_YET) == len(set(NOT_YET))


def test_every_lock_file_is_of_a_study_and_reads_back() -> None:
    for file in registry.FOLDER.glob("*.toml"):
        assert file.stem in studies()
        entries = registry.history(file.stem)
        assert "\n".join(map(registry.to_toml, entries)) == file.read_text("utf-8")
        assert [e.date for e in entries] == sorted(e.date for e in entries)
        assert all(e.reason and e.claim and e.rule and e.bounds and e.seeds for e in entries)


@pytest.mark.parametrize("slug", ["simpool"])
def test_the_same_seed_gives_the_same_verdict(slug: str) -> None:
    run = study_of(slug)
    first, second = run(3, "smoke"), run(3, "smoke")
    assert first.checks == second.checks
    assert first.table == second.table
    assert run(4, "smoke").table != first.table


def test_kept_results_are_those_of_the_studies() -> None:
    """What docs/ shows says of each study what the study says of itself, and its page and scoreboard follow from the JSON."""
    from cenote.study.harness import claim_and_rule
    from cenote.study.harness.pages import page, scoreboard
    from cenote.study.harness.rules import ruled

    kept = read(DOCS / "studies")
    assert kept, "docs/studies is empty: run cenote study --all"
    for slug, verdict in kept.items():
        module = importlib.import_module(str(studies()[slug].study))
        assert (verdict.claim, verdict.rule) == claim_and_rule(module.__doc__ or ""), slug
        assert verdict.holds == ruled(verdict.checks, verdict.knocked_out, verdict.gates, verdict.unregistered), slug
        assert verdict.seeds == tuple(range(len(verdict.seeds))), slug
        assert verdict.size in SIZES[1:], slug
        # whether the code is still the same is a matter of the day that the page was written
        written = (DOCS / "studies" / f"{slug}.md").read_text("utf-8")
        assert written in ([page(verdict)] if "source" in verdict.provenance else []) + [page(verdict, earlier=True)], (
            slug
        )
        assert (DOCS / "studies" / str(verdict.figure)).is_file(), slug
    board = (DOCS / "scoreboard.md").read_text("utf-8")
    for line in scoreboard(kept, "studies").splitlines():
        if line.startswith("| "):
            assert line in board


def test_kept_results_are_plain_json() -> None:
    for file in (DOCS / "studies").glob("*.json"):
        raw = json.loads(file.read_text("utf-8"))
        assert raw["slug"] == file.stem
        assert Verdict.from_json(file.read_text("utf-8")).to_json() == file.read_text("utf-8")


def test_looking_for_studies_imports_none_of_them() -> None:
    program = (
        "import sys, cenote.study.harness.runner as r; r.studies();"
        "heavy = [m for m in sys.modules if m in ('matplotlib', 'sklearn', 'cenote.study.simpool')]; print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_result_is_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a study measures counts, though no import leads there: the room finds it in the catalog."""
    from cenote.compare import sources
    from cenote.pool import SimPool
    from cenote.study.harness import tiles

    module = importlib.import_module("cenote.study.simpool")
    before = sources.source_digest(module)
    assert before == sources.source_digest(module) != sources.source_digest(tiles)
    files: list[Path] = []
    read_file = sources._read
    monkeypatch.setattr(sources, "_read", lambda path: files.append(path) or read_file(path))
    sources._targets.cache_clear()
    sources.source_digest(module)
    read_names = {path.name for path in files}
    assert Path(sys.modules[SimPool.__module__].__file__ or "").name in read_names
    assert {"simpool.py", "tiles.py", "training.py", "verdict.py"} <= read_names
    # how results are shown measures nothing
    assert not {"pages.py", "runner.py"} & read_names


def test_nothing_in_the_harness_imports_in_a_circle() -> None:
    """A module of it that is imported first, alone, finds all that it needs in modules that are done."""
    folder = Path(harness.__file__).parent
    needs = {
        file.stem: set(re.findall(r"^from cenote\.study\.harness(?:\.(\w+))? import", file.read_text("utf-8"), re.M))
        for file in folder.glob("*.py")
        if file.stem != "__init__"
    }
    # the package passes on what its modules hold, so none of them goes through it
    assert all("" not in names for names in needs.values())
    assert list(TopologicalSorter(needs).static_order())


def test_status_follows_from_the_study() -> None:
    assert cenote.find("simpool")[0].study == "cenote.study.simpool"
