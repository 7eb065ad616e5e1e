from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cenote
from tests.golden.cases import (
    ADAPTERS,
    FOLDER_HELP,
    LOOSE,
    case_names,
    load_adapters,
    load_case,
    outputs_and_gradients,
)

load_adapters()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--golden")
    names = case_names(folder) if folder.is_dir() else []
    metafunc.parametrize(
        ("slug", "index"),
        [(slug, index) for slug, _, index in names] or [("", -1)],
        ids=[f"{slug}-{stem}" for slug, stem, _ in names] or ["none"],
    )


def test_golden(slug: str, index: int, request: pytest.FixtureRequest) -> None:
    folder: Path = request.config.getoption("--golden")
    if index < 0:
        pytest.skip(f"no golden cases at {folder}; {FOLDER_HELP}")
    case = load_case(folder, slug, index)
    if (slug, case.cls) not in ADAPTERS:
        system = cenote.find(slug)[0]
        if system.status == "planned":
            pytest.skip(f"{slug} is planned for the room {system.room!r}, where it is not built yet: {case.cls}")
        pytest.fail(f"missing adapter: {slug} {case.cls}")
    outputs = outputs_and_gradients(case)
    assert set(case.expected) <= set(outputs)
    for name, expected in case.expected.items():
        got = outputs[name]
        tolerance = LOOSE[slug, case.cls].get(name, 1e-9 if expected.dtype == torch.float64 else 1e-5)
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        torch.testing.assert_close(
            got, expected, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
