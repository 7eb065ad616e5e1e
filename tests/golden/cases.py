"""Golden cases: what the authors' own code computed, and the adapters that build ours from the same config."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER_HELP = "name the folder with --golden DIR"


@dataclass(frozen=True)
class Case:
    """One golden case. Floating point `inputs` require gradients; `params` carry the authors' names."""

    slug: str
    cls: str
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    expected: dict[str, Tensor]
    folder: Path
    raw: dict[str, Any]


Adapter = Callable[[Case], dict[str, Tensor]]
ADAPTERS: dict[tuple[str, str], Adapter] = {}
LOOSE: dict[tuple[str, str], Mapping[str, float]] = {}
"""Outputs of solvers that stop at a tolerance of their own, and how near two of them come."""


def adapter(slug: str, cls: str, loose: Mapping[str, float] | None = None) -> Callable[[Adapter], Adapter]:
    """Register how to run our form of the authors' class `cls`.

    The adapter gets a `Case` and returns tensors named as in the case's `out.*` without the prefix. A missing
    `grad.NAME` is
    computed by the harness as the gradient of the sum of the first output with respect to that input.
    """

    def register(function: Adapter) -> Adapter:
        ADAPTERS[slug, cls] = function
        LOOSE[slug, cls] = loose or {}
        return function

    return register


def load_adapters() -> None:
    from tests.golden import adapters

    for module in pkgutil.iter_modules(adapters.__path__):
        importlib.import_module(f"tests.golden.adapters.{module.name}")


def case_names(folder: Path) -> list[tuple[str, str, int]]:
    """`(slug, file stem, index)` of every case in the folder."""
    return [
        (path.parent.name, Path(case["file"]).stem, i)
        for path in sorted(folder.glob("*/cases.json"))
        for i, case in enumerate(json.loads(path.read_text()))
    ]


def load_case(folder: Path, slug: str, index: int) -> Case:
    raw = json.loads((folder / slug / "cases.json").read_text())[index]
    tensors = load_file(folder / slug / raw["file"])

    def named(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    inputs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in named("in.").items()}
    expected = named("out.") | {k: v for k, v in tensors.items() if k.startswith("grad.")}
    return Case(slug, raw["class"], raw.get("config") or {}, inputs, named("param."), expected, folder / slug, raw)


def load_parameters(module: nn.Module, params: dict[str, Tensor], rename: dict[str, str] | None = None) -> nn.Module:
    """Load the authors' parameters into `module` in eval mode and float64; prefixes in `rename` map theirs to ours."""
    renamed = {}
    for name, value in params.items():
        for theirs, ours in (rename or {}).items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        renamed[name] = value
    module = module.double().eval()
    module.load_state_dict(renamed)
    return module


def outputs_and_gradients(case: Case) -> dict[str, Tensor]:
    """Run the adapter and add the gradients that the case expects."""
    outputs = dict(ADAPTERS[case.slug, case.cls](case))
    wanted = [k for k in case.expected if k.startswith("grad.") and k not in outputs]
    if wanted:
        names = [k.removeprefix("grad.") for k in wanted]
        first = next(iter(outputs.values()))
        grads = torch.autograd.grad(first.sum(), [case.inputs[n] for n in names])
        outputs.update({f"grad.{n}": g for n, g in zip(names, grads, strict=True)})
    return outputs
