"""PyTorch Geometric, imported where it is used."""

from __future__ import annotations

import importlib
from typing import Any

from cenote.core.errors import InputError


def geometric(name: str = "nn") -> Any:
    """The module `torch_geometric.NAME`.

    Raises:
        InputError: where PyTorch Geometric is not installed.
    """
    try:
        return importlib.import_module(f"torch_geometric.{name}")
    except ImportError as error:
        raise InputError(
            f"torch_geometric: is needed for this pool and cannot be imported ({error}); "
            f'install it with pip install "cenote[graph]"'
        ) from error
