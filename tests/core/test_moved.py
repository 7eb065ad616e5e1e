"""Old addresses: what earlier programs import, and what earlier code pickled."""

from __future__ import annotations

import importlib
import pickle
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cenote
from cenote.core.moved import CONTENTS, MODULES, NAMES

HERE = Path(__file__).parent
OLD = tomllib.loads((HERE / "old_names.toml").read_text("utf-8"))
GONE = {
    "cenote.probe.saved": "save_best: save_probe, which takes the method's name",
    "cenote.probe.statistics": "the bootstrap: Inference exchanges arms in whole groups, and has intervals by the jackknife",
    "cenote.features.graph_view": "a data set is asked for its edges: TokenDataset.with_edges",
    "cenote.features.layered": "a data set is asked for its layers: at_layer, layers_of, with_layers",
    "cenote.features.splits": "parts of Labelling",
    "cenote.features.store": "StoredDataset: a data set with a source of tokens",
    "cenote.features.store.dataset": "StoredDataset: a data set with a source of tokens",
    "cenote.models.hugging_face": "inner parts, in several files",
    "cenote.models.pooled": "inner parts, in cenote.pool.fitting",
    "cenote.pool.attention.attenuator": "AttenuatorLayer: a layer of the set transformer",
    "cenote.pool.attention.blocks": "inner parts, in several files",
    "cenote.pool.layers.maxpoolbert": "first_token: in the masks of core",
    "cenote.pool.sequence.sta_v2a.generator": "HIDDEN: an inner part",
    "cenote.pool.spatial.shared": "a base of window pools",
    "cenote.probe.compare": "OnMethod: OnShare of cenote.compare",
    "cenote.probe.module": "Stack and probe_of: inner parts of Probe",
    "cenote.probe.trials": "without_pictures: Trial.travelling",
    "cenote.study.data": "crop, photographs: in study/harness/photographs.py",
    "cenote.study.harness": "inner parts, in several files",
}
"""Modules of which something has no successor of that name, and what is instead."""


@pytest.fixture
def unloaded() -> Iterator[None]:
    """Old modules are imported anew, and say again where they went."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    # parts before their packages
    for name in sorted(MODULES, reverse=True):
        package, _, part = name.rpartition(".")
        if (old := sys.modules.pop(name, None)) is not None and vars(sys.modules[package]).get(part) is old:
            delattr(sys.modules[package], part)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("module", sorted(OLD))
def test_what_stood_there_is_still_found(module: str) -> None:
    missing = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            there: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            there = object()
        for name in OLD[module]:
            try:
                getattr(there, name)
            except AttributeError:
                missing.append(name)
    if missing:
        assert module in GONE, missing
    else:
        assert {w.category for w in told} == {DeprecationWarning}
        assert any(str(w.message).startswith(module) for w in told)


def test_the_list_holds_nothing_that_is_there_and_leads_nowhere_that_is_not() -> None:
    for old, places in {**MODULES, **CONTENTS}.items():
        file = Path(cenote.__file__).parents[1] / old.replace(".", "/")
        assert (file.is_dir() or file.with_suffix(".py").is_file()) == (old in CONTENTS), old
        for place in places:
            importlib.import_module(place)
    for path in NAMES.values():
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.filterwarnings("ignore:.*stands in:DeprecationWarning")
@pytest.mark.parametrize(
    ("statement", "new"),
    [
        ("from cenote.scale import extract", "cenote.jobs.extract.extract"),
        ("from cenote.scale import ModelSpec", "cenote.jobs.extract.ModelSpec"),
        ("from cenote.scale import Options", "cenote.jobs.extract.Options"),
        ("from cenote.models import Pooled", "cenote.bridges.transformers.PooledModel"),
        ("from cenote.pool.spatial.ggem import GeM", "cenote.pool.spatial.ggem.pool.GeM"),
        ("from cenote.pool.spatial.gramian_loss import DecorrelationLoss", "cenote.pool.spatial.gramian_heads.loss"),
        ("from cenote.pool.sequence.mimicking import train_mimic", "cenote.pool.sequence.attentive_mimicking.mimic"),
        ("from cenote.probe import Recipe, compare", "cenote.jobs.probe"),
        ("import cenote.probe.results", "cenote.jobs.probe.result, cenote.compare.result"),
        ("import cenote.probe.columns", "cenote.jobs.probe.arms"),
        ("import cenote.probe.compare", "cenote.jobs.probe.job"),
        ("from cenote.probe.estimators import ProbeClassifier", "cenote.bridges.scikit_learn"),
        ("from cenote.models.sentence_transformers import CenotePooling", "cenote.bridges.sentence_transformers"),
    ],
)
def test_an_old_import_is_told_the_new_address(statement: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=re.escape(new)):
        exec(statement, {})


def test_the_line_that_uses_an_old_name_is_named(tmp_path: Path) -> None:
    # checked annotations stand between a line and its warning, so it needs a process without them
    script = tmp_path / "old.py"
    script.write_text("import cenote\n\nfrom cenote.pool.spatial.ggem import GeM\n\ncenote.probe\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    told = [line for line in done.stderr.splitlines() if "DeprecationWarning" in line]
    assert [line.removeprefix(f"{script}:").partition(":")[0] for line in told] == ["3", "5"]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.filterwarnings("ignore:.*stands in:DeprecationWarning")
def test_a_function_is_not_hidden_by_the_old_module_of_its_name() -> None:
    for package, name, new in (("cenote.scale", "extract", "cenote.jobs.extract"), ("cenote.probe", "compare", None)):
        old = importlib.import_module(f"{package}.{name}")
        function = getattr(importlib.import_module(new or "cenote.jobs.probe"), name)
        assert getattr(old, name) is function
        with pytest.raises(TypeError, match="missing"):
            getattr(importlib.import_module(package), name)()


@pytest.mark.usefixtures("unloaded")
@pytest.mark.filterwarnings("ignore:.*stands in:DeprecationWarning")
def test_parts_of_an_old_package_come_with_it() -> None:
    from cenote.jobs.probe.result import MethodResult

    assert cenote.probe.results.MethodResult is MethodResult
    assert "MethodResult" in dir(cenote.probe.results)
    with pytest.raises(AttributeError, match="no attribute 'never'"):
        cenote.probe.never  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'never'"):
        cenote.scale.never  # noqa: B018


def test_a_name_that_never_was_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"cenote\.prob"):
        importlib.import_module("cenote.prob")


def pickled() -> list[str]:
    with zipfile.ZipFile(HERE / "old_pickles.zip") as archive:
        return archive.namelist()


@pytest.mark.filterwarnings("ignore:.*stands in:DeprecationWarning")
@pytest.mark.parametrize("name", pickled())
def test_what_earlier_code_pickled_gives_what_it_gave(name: str) -> None:
    with zipfile.ZipFile(HERE / "old_pickles.zip") as archive:
        old, x, y = pickle.loads(archive.read(name))
    if isinstance(old, torch.nn.Module):
        found = old(*x).detach()
        # training, copies and what it prints use attributes that calls do not
        pickle.loads(pickle.dumps(old)).train()
        assert repr(old)
    else:
        found = (old.predict_proba if hasattr(old, "predict_proba") else old.predict)(*x)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
