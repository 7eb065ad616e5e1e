"""Pickles what earlier code can make, for the tests that later code still reads it.

Run with the sources of the last commit before the rooms moved, 88c40c3, on the path:
`PYTHONPATH=OLD/src python tests/core/old_pickles.py tests/core/old_pickles.zip`.
"""

import inspect
import pickle
import sys
import zipfile
from typing import Any

import numpy as np
import torch
from torch import nn

import cenote
from cenote.core.graphs import Graphs

GIVEN = {"tokens": 4, "layers": 3, "classes": 3, "parts": 2, "in_channels": 8, "channels": 8, "kernel_size": 2}
OWN: dict[str, dict[str, Any]] = {
    "cbam": {"dim": 8, "tokens": 4},
    "binary-afa": {"channels": 16},
    "multi-afa": {"channels": 16},
    "afa-dla": {"channels": (16, 16)},
    "joint-attention": {"dim": 8},
    "tokenflex": {"dim": 8, "out_dim": 5, "num_tokens": 4},
}
"""Arguments of pools that take others, besides those that all take."""
LEFT_OUT = ("layer-aware-tdnn",)
"""Of the same classes as others, and large."""


def dull(module: nn.Module) -> nn.Module:
    """In eval mode, with parameters that a file can be packed by, and that are not all alike."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_((torch.arange(p.numel()).view(p.shape) * (3 + number) % 7 - 3) / 8)
    return module.eval()


def inputs(name: str, kind: str) -> tuple[Any, ...]:
    """What a pool of that name and kind is called with."""
    generator = torch.Generator().manual_seed(1)
    if kind == "graphs":
        edges = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
        return (Graphs(torch.randn(5, 8, generator=generator), torch.tensor([0, 3, 5]), edges),)
    if kind == "pyramids":
        fine, coarse, other = (torch.randn(2, 16, side, side, generator=generator) for side in (8, 4, 8))
        return (fine, other) if name == "binary-afa" else ([fine, coarse] if name == "afa-dla" else [coarse, fine],)
    if kind == "map-scores":
        image = (255 * torch.rand(2, 3, 6, 6, generator=generator)).round()
        return torch.randn(2, 4, 6, 6, generator=generator).softmax(1), image
    shape = {"sets": (2, 4, 8), "layers": (2, 3, 4, 8)}.get(kind, (2, 8, 6, 6))
    return (torch.randn(*shape, generator=generator),)


def built(entry: Any) -> nn.Module:
    """A pool for tokens of width 8."""
    wanted = inspect.signature(entry.load()).parameters
    given = {"dim": 8, **GIVEN} if entry.kind != "layers" else {"dim": 8, "layers": GIVEN["layers"]}
    if entry.name in OWN:
        given = {**OWN[entry.name], **({"in_channels": 8} if "in_channels" in wanted else {})}
    known = {k: v for k, v in given.items() if k in wanted and k not in (entry.settings or {})}
    return dull(cenote.create(entry.name, **known))


def main(out: str) -> None:
    """Write the archive: of each, what is pickled, what it is called with, and what it gives."""
    # which later code no longer has
    from cenote.probe.module import probe_of

    made: dict[str, Any] = {}
    for entry in cenote.methods(room="pool"):
        if entry.name in LEFT_OUT:
            continue
        x = inputs(entry.name, entry.kind)
        pool = built(entry)
        y = pool(*x)
        made[entry.name] = (pool, x, y.detach())
    probed = {"cls-mean": "sets", "mean": "sets", "weighted-layer-sum": "layers", "sparse-hierarchical": "graphs"}
    for name, kind in probed.items():
        probe = dull(probe_of(built(cenote.method(name)), 2, 1))
        x = inputs(name, kind)
        made[f"probe of {name}"] = (probe, x, probe(*x).detach())
    X = np.random.default_rng(0).normal(size=(40, 4, 8)).astype("float32")
    target = X[:, :, 0].mean(1)
    quick = {"epochs": 2, "learning_rates": (0.01,)}
    for method in ("gem", "simpool", "dinovit"):
        classifier = cenote.ProbeClassifier(method, prefix_tokens=1, **quick).fit(X, target > 0)
        made[f"classifier {method}"] = (classifier, (X,), classifier.predict_proba(X))
    regressor = cenote.ProbeRegressor("abmil", **quick).fit(X, target)
    made["regressor"] = (regressor, (X,), regressor.predict(X))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
        for name, what in made.items():
            archive.writestr(f"{name}.pkl", pickle.dumps(what))
    print(len(made), "made")


if __name__ == "__main__":
    main(sys.argv[1])
