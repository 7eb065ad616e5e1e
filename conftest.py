from collections.abc import MutableMapping
from importlib.util import find_spec
from typing import Any

import pytest
from tests import checked

# before anything imports cenote
checked.install()

# the kernels of an optional dependency
collect_ignore = [] if find_spec("triton") else ["src/cenote/core/triton_kernels.py"]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: MutableMapping[str, Any]) -> None:
    """Names that every docstring example may use, so that examples stay short."""
    import torch

    import cenote
    import cenote.pool
    import cenote.testing

    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, cenote=cenote)
