"""Whether a model is as it was found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class AsFound:
    """A model's state, to be compared with a later one.

    Args:
        model: in the state that it should have later.
        run: calls it plainly: what the model's own forward changes is its own affair.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self.model = model
        # the first call may make what later ones keep
        with torch.no_grad():
            run()
            first = fingerprint(model)
            run()
            second = fingerprint(model)
        self.before = {what: value for what, value in first.items() if second.get(what) == value}
        self.known = first.keys() | second.keys()

    def changed(self) -> str | None:
        """What is not as it was, in words."""
        after = fingerprint(self.model)
        for what, value in self.before.items():
            if after.get(what) != value:
                return f"{what} is {str(after.get(what))[:100]}, expected {str(value)[:100]} as before"
        more = sorted(after.keys() - self.known)
        return f"{more[0]} is new" if more else None


class _Same:
    """An object that equals itself alone; held, so that no other takes its place in memory."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)

    def __repr__(self) -> str:
        return repr(self.of)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that an edit could leave behind, by name."""
    found: dict[str, Any] = {"the function mode stack": torch._C._len_torch_function_stack()}
    for name in vars(nn.modules.module):
        if name.startswith("_global_") and "hook" in name:
            found[name] = list(getattr(nn.modules.module, name) or ())
    configs: dict[int, Any] = {}
    for path, module in model.named_modules():
        own, where = vars(module), path or "the model"
        for name, value in own.items():
            if not (isinstance(value, dict) and name.startswith("_")):
                plain = isinstance(value, bool | int | float | str)
                found[f"{name} of {where}"] = value if plain else _Same(value)
        found[f"hooks of {where}"] = {k: list(v) for k, v in own.items() if "hook" in k and isinstance(v, dict)}
        found[f"modules of {where}"] = {k: _Same(v) for k, v in module._modules.items()}
        config = own.get("config")
        if config is not None and id(config) not in configs:
            configs[id(config)] = config
            found[f"config of {where}"] = str(vars(config)), getattr(config, "_attn_implementation", None)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = _Same(x), x._version, x.requires_grad
    for file, name in (
        ("modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ):
        registry = getattr(sys.modules.get(f"transformers.{file}"), name, None)
        if registry is not None:
            kind = type(registry)
            found[f"what {name} holds"] = {key: _Same(registry[key]) for key in registry}
            found[f"the way of {name}"] = _Same(kind.__getitem__), _Same(getattr(kind, "get_interface", None))
            found[f"attributes of {name}"] = {k: _Same(v) for k, v in vars(registry).items()}
    return found
