"""Datasets of PyTorch Geometric on disk: a root folder with `processed/`, or a `.pt` file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cenote.core import InputError
from cenote.features.source import Edges, Filled, Source
from cenote.features.table import Column
from cenote.features.token_labels import TOKEN_LABELS, TokenLabels
from cenote.features.validate import Problems, some

NOT_DATA = ("pre_filter.pt", "pre_transform.pt")


def geometric_file(path: Path) -> Path | None:
    """The file with the graphs: the path itself, or the one in its folder `processed`; `None` where there is none.

    Raises:
        InputError: where `processed` holds several and none is `data.pt`.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".pt" else None
    if (path / "labels.csv").is_file():
        return None
    files = sorted(f for f in (path / "processed").glob("*.pt") if f.name not in NOT_DATA)
    named = [f for f in files if f.name == "data.pt"]
    if len(files) > 1 and not named:
        raise InputError(f"{path}: processed holds several files, {some(f.name for f in files)}; name one of them")
    return next(iter(named or files), None)


def open_geometric(file: Path) -> Source:
    """The graphs of a saved dataset: what `InMemoryDataset.save` or `torch.save` of a list of `Data` wrote.

    Raises:
        InputError: where PyTorch Geometric is missing, the file is no such dataset, or holds more than tensors.
    """
    graphs = _Graphs(file, _loaded(file))

    def load(problems: Problems) -> Filled | None:
        for i in range(len(graphs)):
            graphs.check(i, problems)
        labels = graphs.token_labels(problems)
        return None if len(problems) else graphs.filled()._replace(token_labels=labels)

    return Source(
        "dataset of PyTorch Geometric",
        [str(i) for i in range(len(graphs))],
        graphs.columns(),
        load,
    )


def _loaded(file: Path) -> Any:
    try:
        # importing registers classes that such files name; what is not registered or listed below is not built
        from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
        from torch_geometric.data.storage import GlobalStorage
    except ImportError as error:
        raise InputError(
            f"torch_geometric: is needed to read {file} and cannot be imported ({error}); "
            f'install it with pip install "cenote[graph]"'
        ) from error
    try:
        with torch.serialization.safe_globals([DataEdgeAttr, DataTensorAttr, GlobalStorage]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file of another kind makes of the unpickler is not listed anywhere
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it wants {named[1]}" if named else f"{type(error).__name__}"
        raise InputError(
            f"{file}: is no dataset of PyTorch Geometric that can be read without running code from it ({why}); "
            f"save it again with InMemoryDataset.save, or torch.save a list of Data with tensors alone"
        ) from None


class _Graphs:
    """The graphs as lists of tensors, whichever way they were stored."""

    def __init__(self, file: Path, content: Any) -> None:
        self.file = file
        self._get = _reader(file, content)
        self.x = self._get("x")
        if not self.x or any(x is None for x in self.x):
            raise InputError(
                f"{file}: graph {next((i for i, x in enumerate(self.x) if x is None), 0)} has no node features x; add some, "
                f"its degrees in one-hot form for example (torch_geometric.transforms.OneHotDegree), and save the dataset again"
            )
        nothing = [None] * len(self.x)
        self.edge_index = self._get("edge_index") or nothing
        self.edge_attr = self._get("edge_attr") or nothing
        self.y = self._get("y") or nothing

    def __len__(self) -> int:
        return len(self.x)

    def check(self, i: int, problems: Problems) -> None:
        x, edges, attr = self.x[i], self.edge_index[i], self.edge_attr[i]
        width = self.x[0].shape[1:]
        if x.dim() != 2 or x.shape[1:] != width:
            problems.add(
                "shape",
                f"graph {i}: x has shape {list(x.shape)}; expected [nodes, {width[0] if width else 'dim'}] as in graph 0",
            )
        elif not bool(torch.isfinite(x.float()).all()):
            problems.add("not finite", f"graph {i}: x holds NaN or infinite values; leave the graph out or repair it")
        if edges is None or edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point():
            came = "is missing" if edges is None else f"has shape {list(edges.shape)} and type {edges.dtype}"
            problems.add("edges", f"graph {i}: edge_index {came}; expected [2, edges] of node numbers")
        elif edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= len(x)):
            problems.add(
                "edges", f"graph {i}: edge_index names nodes {int(edges.min())} to {int(edges.max())} of {len(x)}"
            )
        elif attr is not None and len(attr) != edges.shape[1]:
            problems.add("edges", f"graph {i}: edge_attr has {len(attr)} rows for {edges.shape[1]} edges")

    def columns(self) -> dict[str, Column]:
        if all(y is None for y in self.y):
            return {}
        cells = []
        for i, y in enumerate(self.y):
            if y is None:
                raise InputError(f"{self.file}: graph {i} has no label y; a graph needs one")
            flat = y.flatten().tolist()
            if len(flat) != 1 and len(flat) == len(self.x[i]) and y.shape[0] == len(self.x[i]):
                raise InputError(
                    f"{self.file}: graph {i} has a label y for each of its {len(flat)} nodes; cenote probe classifies graphs"
                )
            cells.append(flat)
        widths = {len(c) for c in cells}
        if len(widths) > 1 or not all(widths):
            raise InputError(f"{self.file}: graphs have {some(sorted(widths))} labels in y; expected equally many")
        width = widths.pop() if widths else 1
        if width == 1:
            return {"y": [c[0] for c in cells]}
        return {f"y {k}": [c[k] for c in cells] for k in range(width)}

    def token_labels(self, problems: Problems) -> Tensor | None:
        labels = TokenLabels([str(i) for i in range(len(self))], [len(x) for x in self.x], problems)
        for i, given in enumerate(self._get(TOKEN_LABELS) or []):
            if given is not None:
                labels.add(i, given.numpy() if isinstance(given, Tensor) else given, TOKEN_LABELS)
        return labels.flat()

    def filled(self) -> Filled:
        lengths = [len(x) for x in self.x]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        values = torch.cat(self.x)
        if values.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            values = values.float()
        edges = torch.cat([e.long() + s for e, s in zip(self.edge_index, starts.tolist(), strict=False)], 1)
        known = [a for a in self.edge_attr if a is not None]
        attr = torch.cat(known) if len(known) == len(self.edge_attr) else None
        return Filled(values, lengths, Edges(edges, attr))


def _reader(file: Path, content: Any) -> Callable[[str], list[Any]]:
    """A function from a name to that tensor of every graph."""
    if isinstance(content, Sequence) and content and all(hasattr(d, "edge_index") for d in content):
        return lambda name: [d.get(name) if hasattr(d, "get") else getattr(d, name, None) for d in content]
    if isinstance(content, tuple) and len(content) >= 2 and (content[1] is None or isinstance(content[1], dict)):
        data, slices = content[0], content[1]
        stored = data if isinstance(data, dict) else data.to_dict() if hasattr(data, "to_dict") else None
        if isinstance(stored, dict) and slices:
            return lambda name: _cut(stored, slices, name)
        if isinstance(stored, dict):
            return lambda name: [stored.get(name)]
    raise InputError(
        f"{file}: holds {type(content).__name__}, not what InMemoryDataset.save writes, nor a list of Data; if these are the "
        f"tokens of one item, give the folder with labels.csv"
    )


def _cut(stored: dict[str, Any], slices: dict[str, Any], name: str) -> list[Any]:
    whole = stored.get(name)
    if not isinstance(whole, Tensor) or name not in slices:
        graphs = max((len(s) - 1 for s in slices.values()), default=0)
        return [None] * graphs
    at = slices[name].tolist()
    dim = 1 if name == "edge_index" else 0
    return [whole.narrow(dim, a, b - a) for a, b in itertools.pairwise(at)]
