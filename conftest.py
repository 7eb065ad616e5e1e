import atexit
import gc
from collections.abc import Generator, MutableMapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests import checked

# before anything imports cenote
checked.install()

# the kernels of an optional dependency
collect_ignore = [] if find_spec("triton") else ["src/cenote/core/triton_kernels.py"]

SOURCE = Path(__file__).parent / "src"


def pytest_collect_file(file_path: Path) -> None:
    """Import a file of cenote by its name, before pytest does by its path.

    What a package's `__init__` imports would else be there twice where the file is collected alone, each class with a double.
    """
    if file_path.suffix == ".py" and file_path.stem != "__main__" and file_path.is_relative_to(SOURCE):
        names = file_path.relative_to(SOURCE).with_suffix("").parts
        import_module(".".join(names[:-1] if names[-1] == "__init__" else names))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What was imported to collect the tests stays until the end: nothing in it is garbage, and it is looked through only once.

    Otherwise it costs a quarter of the collection, and as much of every test that calls `gc.collect`.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
        # at exit all of it is garbage
        atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: MutableMapping[str, Any]) -> None:
    """Names that every docstring example may use, so that examples stay short."""
    import torch

    import cenote
    import cenote.pool
    import cenote.testing

    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, cenote=cenote)
