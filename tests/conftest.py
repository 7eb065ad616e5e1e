from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SKIPPED = {"slow": "run with --slow", "real": "fetch the models with `make models`, then run with --real"}
THOROUGH = pytest.StashKey[int]()
"""How many tests were left out of the quick suite."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=SHARED / "golden", help="folder of golden cases")
    parser.addoption("--data-dir", type=Path, default=SHARED / "data", help="folder of real data sets")
    parser.addoption("--models", type=Path, default=ROOT / "models", help="folder of real models, from `make models`")
    parser.addoption("--thorough", action="store_true", help="also run the tests marked thorough")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--real", action="store_true", help="also run the tests marked real; a missing model is a failure")


# after -k and -m, so that only what these leave is counted
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "model_folder" in getattr(item, "fixturenames", ()) and item.get_closest_marker("real") is None:
            raise pytest.UsageError(f"{item.nodeid}: uses a real model; mark it with pytest.mark.real(why)")
        for name, how in SKIPPED.items():
            if (mark := item.get_closest_marker(name)) is not None and not config.getoption(f"--{name}"):
                (why,) = mark.args
                item.add_marker(pytest.mark.skip(reason=f"{name} ({why}); {how}"))
    if not config.getoption("--thorough"):
        thorough = [item for item in items if item.get_closest_marker("thorough") is not None]
        config.hook.pytest_deselected(items=thorough)
        config.stash[THOROUGH] = len(thorough)
        items[:] = [item for item in items if item.get_closest_marker("thorough") is None]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["thorough"] = session.config.stash.get(THOROUGH, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # every process of pytest-xdist collects all tests
    node.config.stash[THOROUGH] = getattr(node, "workeroutput", {}).get("thorough", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(THOROUGH, 0):
        terminalreporter.write_line(
            f"{left_out} thorough tests were left out; run them with `make test-thorough`, or everything with --thorough"
        )


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("--data-dir")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name the folder with --data-dir")
    return folder


class Pretrained(NamedTuple):
    """A transformers model in float32, for inference, and its tokenizer or processor; shared by all tests of a process."""

    model: Any
    processor: Any


@pytest.fixture(scope="session")
def model_folder(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The folder of a real model, by its name."""
    models: Path = request.config.getoption("--models")

    def folder(name: str) -> Path:
        if not (models / name).is_dir():
            pytest.fail(f"no {name} in {models}; fetch it with `make models`, or name the folder with --models")
        return models / name

    return folder


def _pretrained(folder: Path, model: str, processor: str) -> Pretrained:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    made = getattr(transformers, model).from_pretrained(folder, dtype=torch.float32).eval()
    return Pretrained(made, getattr(transformers, processor).from_pretrained(folder))


@pytest.fixture(scope="session")
def smollm2(model_folder: Callable[[str], Path]) -> Pretrained:
    return _pretrained(model_folder("smollm2-135m-instruct"), "AutoModelForCausalLM", "AutoTokenizer")


@pytest.fixture(scope="session")
def dinov2(model_folder: Callable[[str], Path]) -> Pretrained:
    return _pretrained(model_folder("dinov2-small"), "AutoModel", "AutoImageProcessor")


@pytest.fixture(scope="session")
def whisper(model_folder: Callable[[str], Path]) -> Pretrained:
    return _pretrained(model_folder("whisper-tiny.en"), "AutoModelForSpeechSeq2Seq", "AutoProcessor")


@pytest.fixture(scope="session")
def minilm(model_folder: Callable[[str], Path]) -> Pretrained:
    return _pretrained(model_folder("minilm-l6-v2"), "AutoModel", "AutoTokenizer")
