"""Versions of the libraries that decide the numbers, and that all machines of a job must share."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from cenote.core.errors import InputError
from cenote.core.version import __version__

DECIDING = ("transformers", "timm", "pillow", "scipy")


def versions(*also: str) -> dict[str, str]:
    """Of torch, of what reads and prepares the items, and of others that decide here, where it is installed."""
    import torch

    found = {"torch": str(torch.__version__)}
    for name in (*DECIDING, *also):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def everything() -> dict[str, str]:
    """Those, Python and cenote: what one machine tells another."""
    import numpy

    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "cenote": __version__,
        "python": python,
        "numpy": numpy.__version__,
        **versions("torchvision", "tokenizers", "soundfile"),
    }


def require(expected: Mapping[str, str]) -> None:
    """That this machine has what the one has where the job was started.

    Raises:
        InputError: naming this machine and each library that differs.

    Example:
        >>> require(everything())
        >>> require({**everything(), "torch": "1.0"})
        Traceback (most recent call last):
        ...
        cenote.core.errors.InputError: engine: ... has torch ..., and the machine that started the job has 1.0; ...
    """
    here = everything()
    differences = [
        f"{name} {here.get(name, 'not at all')}, and the machine that started the job has {expected.get(name, 'none')}"
        for name in sorted({*here, *expected})
        if here.get(name) != expected.get(name)
    ]
    if differences:
        raise InputError(
            f"engine: {platform.node()} has {'; it has '.join(differences)}; the numbers could differ: install the same "
            f"versions on every machine"
        )
