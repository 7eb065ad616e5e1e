"""Graphs as text, as the DGCNN repository keeps the usual benchmarks: MUTAG, PROTEINS, ...

The first line is the number of graphs. Each graph begins with a line `nodes label`; then each node has a line
`tag count neighbour neighbour ...`, its neighbours numbered from 0 within the graph, and after them, if there are, numbers that
describe the node. Features are the tag in one-hot form, column by column from 0, and those numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

from cenote.core import InputError
from cenote.core.graphs import undirected
from cenote.features.source import Edges, Filled, Source
from cenote.features.validate import Problems, some

SUFFIX = ".txt"
MOST_TAGS = 4096


def dgcnn_file(path: Path) -> Path | None:
    """The file with the graphs: the path itself, or the one text in a folder; `None` where there is none.

    Raises:
        InputError: where a folder holds several and none has its name.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    texts = sorted(f for f in path.glob(f"*{SUFFIX}") if f.is_file())
    named = [f for f in texts if f.stem == path.name]
    if len(texts) > 1 and not named:
        raise InputError(f"{path}: holds several files of graphs, {some(f.name for f in texts)}; name one of them")
    return next(iter(named or texts), None)


def open_dgcnn(file: Path) -> Source:
    """The graphs of a file; their label is the column `label`, their ids are their numbers from 0.

    Raises:
        InputError: where the file does not hold what it says; naming the line, the graph and the node.
    """
    graphs = _parsed(file)
    tags = max((tag for g in graphs for tag in g.tags), default=-1) + 1
    widths = {len(numbers) for g in graphs for numbers in g.numbers}
    width = max(widths, default=0)

    def load(problems: Problems) -> Filled | None:
        for i, g in enumerate(graphs):
            for node, numbers in enumerate(g.numbers):
                if len(numbers) != width:
                    problems.add(
                        "width",
                        f"graph {i}, node {node} (line {g.line + 1 + node}) has {len(numbers)} numbers behind its neighbours, "
                        f"others {width}; give every node the same",
                    )
        if len(problems):
            return None
        nodes = sum(len(g.tags) for g in graphs)
        values = torch.zeros(nodes, tags + width)
        values[torch.arange(nodes), torch.tensor([tag for g in graphs for tag in g.tags], dtype=torch.int64)] = 1.0
        if width:
            values[:, tags:] = torch.tensor([numbers for g in graphs for numbers in g.numbers])
        pairs, start = [], 0
        for g in graphs:
            pairs += [(start + u, start + v) for u, v in g.edges]
            start += len(g.tags)
        edges = undirected(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T, nodes)
        return Filled(values, [len(g.tags) for g in graphs], Edges(edges))

    return Source(
        "graphs in DGCNN's text format",
        [str(i) for i in range(len(graphs))],
        {"label": [g.label for g in graphs]},
        load,
    )


class _Graph:
    def __init__(self, line: int, label: str) -> None:
        self.line = line
        self.label = label
        self.tags: list[int] = []
        self.edges: list[tuple[int, int]] = []
        self.numbers: list[list[float]] = []


def _parsed(file: Path) -> list[_Graph]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text ({error})") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or not lines[0].strip().isdecimal():
        came = lines[0][:40] if lines else ""
        raise InputError(
            f"{file}: line 1 must be the number of graphs, got {came!r}; expected DGCNN's text format: that number, then "
            f"for each graph 'nodes label' and for each node 'tag count neighbours...'"
        )
    graphs: list[_Graph] = []
    at = 1
    for i in range(int(lines[0])):
        if at >= len(lines):
            raise InputError(f"{file}: line 1 says {lines[0].strip()} graphs, but the file ends after {i}")
        head = lines[at].split()
        if len(head) != 2 or not head[0].isdecimal():
            _wrong(file, at, f"graph {i}", f"expected 'nodes label', got {lines[at][:40]!r}")
        graph, nodes = _Graph(at + 1, head[1]), int(head[0])
        if at + nodes >= len(lines):
            _wrong(file, at, f"graph {i}", f"says {nodes} nodes, but the file ends after {len(lines) - at - 1} of them")
        for node in range(nodes):
            _add_node(graph, node, nodes, lines[at + 1 + node], file, at + 1 + node, i)
        graphs.append(graph)
        at += nodes + 1
    if at < len(lines):
        _wrong(file, at, "the file", f"goes on behind its {len(graphs)} graphs with {lines[at][:40]!r}; correct line 1")
    return graphs


def _add_node(graph: _Graph, node: int, nodes: int, text: str, file: Path, line: int, number: int) -> None:
    who = f"graph {number}, node {node}"
    cells = text.split()
    try:
        tag, count = int(cells[0]), int(cells[1])
        neighbours = [int(c) for c in cells[2 : 2 + count]]
        numbers = [float(c) for c in cells[2 + count :]]
    except (ValueError, IndexError):
        _wrong(file, line, who, f"expected 'tag count neighbours...' in numbers, got {text[:40]!r}")
    if not 0 <= tag < MOST_TAGS:
        _wrong(
            file, line, who, f"tag {tag}: expected a whole number from 0 to {MOST_TAGS - 1}; number the kinds of nodes"
        )
    if count < 0 or len(neighbours) < count:
        _wrong(file, line, who, f"says {count} neighbours, {len(neighbours)} follow")
    for v in neighbours:
        if not 0 <= v < nodes:
            _wrong(file, line, who, f"neighbour {v} is none of its graph's nodes 0 to {nodes - 1}")
    graph.tags.append(tag)
    graph.numbers.append(numbers)
    graph.edges += [(node, v) for v in neighbours]


def _wrong(file: Path, line: int, who: str, what: str) -> NoReturn:
    raise InputError(f"{file}: {who} (line {line + 1}): {what}")
