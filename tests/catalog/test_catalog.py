from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest

import cenote
from cenote.catalog import Method, System, entries, load, names
from cenote.catalog.entries import Status
from cenote.catalog.names import places
from cenote.core import InputError

ROOMS = {
    "pool/attention",
    "pool/sequence",
    "pool/layers",
    "pool/spatial",
    "pool/graph",
    "pool/bags",
    "reduce",
    "mix",
    "explain",
    "steer",
    "select",
    "study",
}
SYSTEMS = cenote.systems()
METHODS = cenote.methods()
PATHS = sorted({p for s in SYSTEMS for p in s.classes} | {m.path for m in METHODS})
HELPERS = sorted({*places().values()} - {*PATHS})


def by_slug(s: System) -> str:
    return s.slug


def by_name(m: Method) -> str:
    return m.name


def test_rows_are_1_to_119_in_order() -> None:
    assert [s.row for s in SYSTEMS] == list(range(1, 120))


def test_slugs_and_titles_are_unique() -> None:
    assert len({s.slug for s in SYSTEMS}) == len({s.title for s in SYSTEMS}) == 119


@pytest.mark.parametrize("system", SYSTEMS, ids=by_slug)
def test_system_is_well_formed(system: System) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system.slug)
    assert system.room in ROOMS
    assert 2010 <= system.year <= 2026
    assert system.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", system.code)
    assert system.licence is None or system.code is not None
    assert len(set(system.classes)) == len(system.classes)


@pytest.mark.parametrize("system", SYSTEMS, ids=by_slug)
def test_arxiv_ids_are_older_than_the_publication(system: System) -> None:
    if "arXiv" not in system.paper:
        assert re.search(r"[A-Za-z]", system.paper)
        return
    found = re.fullmatch(r"arXiv (\d\d)(\d\d)\.\d{4,5}", system.paper)
    assert found, system.paper
    assert 1 <= int(found[2]) <= 12
    assert 2000 + int(found[1]) <= system.year


def test_arxiv_ids_are_unique() -> None:
    ids = [s.paper for s in SYSTEMS if s.paper.startswith("arXiv")]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_catalog_names_imports_and_is_documented(path: str) -> None:
    thing = load(path)
    text = inspect.getdoc(thing) or ""
    assert text, f"{path} has no docstring"
    takes = [
        p
        for p in inspect.signature(thing).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"
    ]
    if takes and thing.__init__ is not object.__init__:
        assert "Args:" in text or "Attributes:" in text, f"{path}: the docstring does not say what its arguments are"
        for p in takes:
            assert re.search(rf"\b{re.escape(p.name)}\b", text), f"{path}: the docstring does not mention {p.name}"


@pytest.mark.parametrize("path", HELPERS)
def test_what_is_public_besides_has_a_docstring(path: str) -> None:
    assert inspect.getdoc(load(path)), f"{path} has no docstring"


@pytest.mark.parametrize("system", SYSTEMS, ids=by_slug)
def test_a_published_method_names_its_source(system: System) -> None:
    for path in system.classes:
        thing = load(path)
        module = inspect.getdoc(importlib.import_module(thing.__module__)) or ""
        text = f"{inspect.getdoc(thing)}\n{module}"
        assert "Source:" in text or "Note:" in text, f"{path}: neither the class nor its module names the paper"


@pytest.mark.parametrize("system", SYSTEMS, ids=by_slug)
def test_the_first_class_lives_in_the_room_of_its_system(system: System) -> None:
    for path in system.classes[:1]:
        assert path.startswith(f"cenote.{system.room.split('/')[0]}."), path


@pytest.mark.parametrize("system", SYSTEMS, ids=by_slug)
def test_status_is_derived(system: System) -> None:
    has_study = importlib.util.find_spec(f"cenote.study.{system.slug.replace('-', '_')}") is not None
    expected: Status = "planned"
    if system.classes:
        whole = bool(system.parts) and all(p.state != "missing" for p in system.parts)
        expected = "complete" if has_study and whole else "partial"
    assert system.status == expected


def test_a_class_that_does_not_exist_makes_a_system_planned() -> None:
    import dataclasses

    simpool = cenote.find("simpool")[0]
    for missing in ("cenote.pool.attention.simpool.NoSuchClass", "cenote.pool.no_such_module.SimPool"):
        assert dataclasses.replace(simpool, classes=(missing,)).status == "planned"


def test_method_names_are_unique() -> None:
    import tomllib
    from importlib import resources

    raw = tomllib.loads(resources.files("cenote.catalog").joinpath("methods.toml").read_text("utf-8"))["method"]
    names = [m["name"] for m in raw]
    assert len(set(names)) == len(names)
    assert [m.name for m in METHODS] == names


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_method_is_well_formed(method: Method) -> None:
    assert method.room in {r.split("/")[0] for r in ROOMS}
    assert method.path.startswith(f"cenote.{method.room}.")
    assert method.summary
    assert not method.summary.endswith(".")
    if method.slug is not None:
        assert method.slug in {s.slug for s in SYSTEMS}
    taken = inspect.signature(method.load()).parameters
    open_ended = any(p.kind == p.VAR_KEYWORD for p in taken.values())
    assert open_ended or set(method.settings or {}) <= set(taken)


def test_methods_are_filtered() -> None:
    assert {m.name for m in cenote.methods(room="pool", kind="sets", fast=True)} >= {"mean", "max", "cls-mean"}
    assert all(
        m.room == "pool" and m.kind == "sets" and m.fast for m in cenote.methods(room="pool", kind="sets", fast=True)
    )
    assert len(cenote.methods(room="pool")) <= len(METHODS)


def test_find_takes_a_slug_or_words() -> None:
    assert [s.row for s in cenote.find("set-transformer")] == [28]
    assert "colbert-token-pooling" in {s.slug for s in cenote.find("Token Pooling")}
    assert {s.slug for s in cenote.find("steer hallucination")} <= {s.slug for s in SYSTEMS if s.room == "steer"}
    assert cenote.find("no such thing at all") == []


def test_create_overrides_the_settings_of_the_catalog() -> None:
    assert cenote.create("simpool", dim=8).gamma is None
    assert cenote.create("simpool", dim=8, gamma=2.0).gamma == 2.0


def test_a_wrong_name_is_told_its_neighbours() -> None:
    with pytest.raises(InputError, match="no method is called 'simpol'; did you mean simpool"):
        cenote.create("simpol", dim=8)
    with pytest.raises(InputError, match="`cenote list` prints all names"):
        cenote.create("qqqqqqqq", dim=8)


@pytest.mark.parametrize(
    ("name", "leads_to"),
    [
        ("ABMIL", "the names that build it, or parts of it, are abmil, abmil-plain"),
        ("deeplab", "are deeplab-aspp, dense-crf"),
        ("attention-conditioning", "`from cenote.pool import AttentionalConcat, AttentionalGate, AttentionalAffine"),
        ("SlotCon", "no name builds it, but there is `from cenote.pool import SlotCon`"),
        ("Pool", "`from cenote.pool import Pool`"),
    ],
)
def test_a_slug_and_a_class_that_no_name_builds_lead_to_what_there_is(name: str, leads_to: str) -> None:
    with pytest.raises(InputError, match=re.escape(leads_to)):
        cenote.method(name)


def test_a_planned_system_is_said_to_be_planned() -> None:
    planned = next(s.slug for s in SYSTEMS if not s.classes)
    with pytest.raises(InputError, match="a published system that is planned"):
        cenote.method(planned)


def test_every_slug_and_every_class_builds_or_leads_somewhere() -> None:
    for name in [*(s.slug for s in SYSTEMS), *places()]:
        builders = [m.name for m in METHODS if name in (m.name, m.slug, m.path.rpartition(".")[2])]
        if name in builders or len(builders) == 1:
            assert cenote.method(name).name == (name if name in builders else builders[0])
            continue
        with pytest.raises(
            InputError, match=r"the names that build it|there is `from cenote\.|that is planned"
        ) as told:
            cenote.method(name)
        assert all(builder in str(told.value) for builder in builders)


def test_a_class_that_one_name_builds_stands_for_it() -> None:
    assert type(cenote.create("SimPool", dim=8)) is type(cenote.create("simpool", dim=8))


@pytest.mark.parametrize(
    ("file", "key", "told"),
    [
        (
            "systems.toml",
            "classes",
            "the name SimPool stands twice, cenote.pool.attention.simpool.SimPool and elsewhere.SimPool",
        ),
        ("systems.toml", "also", "the name SimPool stands twice"),
        ("methods.toml", "class", "the name SimPool stands twice"),
    ],
)
def test_two_classes_of_one_name_are_an_error(file: str, key: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: copy.deepcopy(names.read(name)) for name in ("systems.toml", "methods.toml")}
    more: dict[str, object] = {"row": 120, "slug": "queries"}
    more[key] = "elsewhere.SimPool" if key == "class" else ["elsewhere.SimPool"]
    known[file][file.removesuffix("s.toml")].append(more)
    monkeypatch.setattr(names, "read", known.get)
    names.places.cache_clear()
    with pytest.raises(InputError, match=told):
        places()
    monkeypatch.undo()
    names.places.cache_clear()
    # one that stands in two systems is the same class
    assert places()["SimPool"] == "cenote.pool.attention.simpool.SimPool"


@pytest.mark.parametrize(
    ("file", "key", "what"), [("systems.toml", "slug", "slug"), ("methods.toml", "name", "method")]
)
def test_two_entries_of_one_name_are_an_error(file: str, key: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: copy.deepcopy(names.read(name)) for name in ("systems.toml", "methods.toml")}
    rows = known[file][file.removesuffix("s.toml")]
    rows.append({**rows[1], key: rows[0][key]})
    monkeypatch.setattr(entries, "read", known.get)
    with pytest.raises(InputError, match=f"the {what} {rows[0][key]} stands twice"):
        entries.systems.__wrapped__() if key == "slug" else entries._methods.__wrapped__()


IMPORT = """
import sys
import torch
before = set(sys.modules)
import cenote
print(" ".join(sorted(set(sys.modules) - before)))
print(" ".join(sorted({m.split(".")[0] for m in sys.modules})))
"""


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    added, libraries = (set(line.split()) for line in done.stdout.splitlines())
    heavy = {
        "sklearn",
        "scipy",
        "matplotlib",
        "pyarrow",
        "typer",
        "rich",
        "pandas",
        "h5py",
        "transformers",
        "ray",
        "datasets",
    }
    assert not heavy & libraries
    # of torch itself, its compiler and its exporter take seconds
    assert not {"torch._dynamo", "torch._inductor", "torch.export"} & added
    assert len(added) < 100, f"import cenote adds {len(added)} modules to torch"
