"""What goes through modules that are named by their path, seen or changed: layers of a CNN, the last linear layer.

Blocks and attention have edits of their own; this is for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from cenote.core import InputError

Change = Callable[[Tensor], Tensor]


class Passed(NamedTuple):
    """The first tensor that a module was given, and the first that it gave, in its last call."""

    given: Tensor
    gave: Tensor


@contextmanager
def passing(model: nn.Module, at: Mapping[str, Change | None]) -> Iterator[dict[str, Passed]]:
    """See what goes through some modules, and change what they give; graphs stay.

    Args:
        model: any module.
        at: path of a module -> what becomes of its output; `None` leaves it.

    Raises:
        InputError: for a path that is not there, with some that are.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with passing(model, {"1": torch.zeros_like}) as seen:
        ...     given = model(torch.randn(5, 3))
        >>> seen["1"].gave.shape, bool((given == model[2].bias).all())
        (torch.Size([5, 4]), True)
    """
    modules = dict(model.named_modules())
    for path in at:
        if path not in modules:
            there = ", ".join(repr(name) for name in list(modules)[1:13])
            raise InputError(f"at: the model has no module {path!r}; it has {there}, ...")
    seen: dict[str, Passed] = {}
    hooks = [
        modules[path].register_forward_hook(_hook(path, change, seen), with_kwargs=True) for path, change in at.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _hook(path: str, change: Change | None, seen: dict[str, Passed]) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], gave: Any) -> Any:
        given = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
        first = gave if isinstance(gave, Tensor) else gave[0]
        new = first if change is None else change(first)
        seen[path] = Passed(given, new)
        if change is None:
            return None
        return new if isinstance(gave, Tensor) else (new, *gave[1:])

    return hook
