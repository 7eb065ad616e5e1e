from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=SHARED / "golden", help="folder of golden cases")
    parser.addoption("--data-dir", type=Path, default=SHARED / "data", help="folder of real data sets")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if (slow := item.get_closest_marker("slow")) is not None:
            (why,) = slow.args
            item.add_marker(pytest.mark.skip(reason=f"slow ({why}); run with --slow"))


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("--data-dir")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name the folder with --data-dir")
    return folder
