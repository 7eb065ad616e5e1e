"""Words of the authors' configs, as they may be spelt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn


def class_word(word: str) -> str:
    """The class that is meant: `nn.GELU`, `GELU(exact)` and `GELU` are one.

    >>> class_word("torch.nn.SiLU()")
    'SiLU'
    """
    return word.split("(")[0].split(".")[-1].strip()


def activation_of(word: str) -> Callable[[], nn.Module]:
    """GELU by its tanh where it says so; any other is the class of `torch.nn` of that name.

    >>> activation_of("Tanh")()
    Tanh()
    """
    lower = word.lower()
    if "gelu" in lower:
        near = "tanh" in lower or ("approx" in lower and "none" not in lower)
        return partial(nn.GELU, approximate="tanh" if near else "none")
    name = class_word(lower)
    known = {n.lower(): n for n in dir(nn.modules.activation)} | {"swish": "SiLU", "identity": "Identity"}
    if name not in known:
        raise KeyError(f"no activation {word!r} in torch.nn")
    made: Callable[[], nn.Module] = getattr(nn, known[name])
    return made
