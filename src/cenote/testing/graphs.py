"""The contract of a graph pool, as a check that anybody can run on their own class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core.graphs import Graphs
from cenote.testing import rules
from cenote.testing.contract import difference as _difference
from cenote.testing.contract import require_attributes, run_rules

CLOSE = 1e-9


def check_graph_pool(pool: nn.Module, *, seed: int = 0) -> None:
    """Check everything that cenote promises of a graph pool, called with `x, edge_index, edge_attr, batch, size`.

    The output is one vector per graph, of the declared width. No graph depends on its batch mates, a disconnected one beside a
    deep one included; nor on the order in which its nodes and edges stand. Without `batch` all nodes are of one graph, and
    `cenote.core.Graphs` give what the tensors give. A graph of one node and one without edges work; one without nodes gives
    zeros and finite gradients. Where `reads_edges` is declared, edges matter. Gradients agree with finite differences in
    float64 and reach every parameter. Half precision is finite, and close where the pool makes no discrete choices. The module
    deep-copies, survives safetensors, repeats itself, holds no hidden tensors, and takes non-contiguous input. `attend` agrees
    with calling, and its levels are true: communities stay inside their graph, and edges between them come from edges.
    A wrong input is named.

    The pool given is not changed. Parameters are shaken in a copy, because zeros at initialisation hide mistakes.

    Args:
        pool: with `dim`, `out_dim` and the attributes of `cenote.pool.GraphPool`.
        seed: of the trial graphs.

    Raises:
        ContractError: with one line per broken rule.

    Example:
        >>> check_graph_pool(cenote.pool.GraphParsingPool(4, hidden=6, gnn_layers=1))
    """
    require_attributes(pool, {"dim": "the width of a node", "out_dim": "the width of its output"})
    run_rules(pool, _RULES, _Trial(pool, seed), first=(_rule_call, rules._rule_determinism))


class _Trial(rules.Trial):
    """Graphs and copies that the rules share."""

    def __init__(self, pool: nn.Module, seed: int) -> None:
        super().__init__(pool, seed)
        given: Any = pool
        self.dim: int = given.dim
        self.out_dim: int = given.out_dim
        self.reads_edges = bool(getattr(pool, "reads_edges", True))
        self.discrete = bool(getattr(pool, "discrete", False))
        # a long path and a dense graph, so that hierarchies differ in depth; two pieces and a lone node; one node; no edge
        path = [(i, i + 1) for i in range(11)]
        dense = [(i, j) for i in range(6) for j in range(i) if (i * j) % 4 != 3]
        pieces = [(0, 1), (1, 2), (2, 3), (0, 3), (4, 5), (5, 6)]
        self.graphs = [(12, path), (8, pieces), (1, []), (6, dense), (3, [])]
        self.batch = torch.repeat_interleave(torch.arange(len(self.graphs)), torch.tensor([n for n, _ in self.graphs]))
        offsets, edges = 0, []
        for nodes, pairs in self.graphs:
            edges += [(offsets + a, offsets + b) for u, v in pairs for a, b in ((u, v), (v, u))]
            offsets += nodes
        self.edge_index = torch.tensor(sorted(edges)).T.contiguous()
        self.x = self.randn(offsets, self.dim)

    def output(self, pool: nn.Module, x: Tensor) -> Tensor:
        return pool(x, self.edge_index, batch=self.batch)

    def whole(self) -> Tensor:
        return self.output(self.pool, self.x)

    def alone(self, graph: int) -> tuple[Tensor, Tensor]:
        nodes = (self.batch == graph).nonzero().squeeze(1)
        inside = self.batch[self.edge_index[0]] == graph
        return self.x[nodes], self.edge_index[:, inside] - int(nodes[0])


def _rule_call(t: _Trial) -> str | None:
    calls: tuple[tuple[str, Callable[[], Tensor]], ...] = (
        ("pool(x, edge_index, batch=batch)", lambda: t.pool(t.x, t.edge_index, batch=t.batch)),
        ("pool(x, edge_index)", lambda: t.pool(*t.alone(0))),
    )
    for name, call in calls:
        try:
            y = call()
        except Exception as error:
            return (
                f"call: {name} raised {type(error).__name__}: {str(error)[:500]}; "
                f"a graph pool is called with x [nodes, dim], edge_index [2, edges], edge_attr and batch [nodes]"
            )
        if not isinstance(y, Tensor):
            return f"call: {name} returned {type(y).__name__}, expected the output tensor alone"
    return None


def _rule_output_shape(t: _Trial) -> str | None:
    expected = (len(t.graphs), t.out_dim)
    if (came := tuple(t.whole().shape)) != expected:
        return f"output shape: got {came} for {expected[0]} graphs, expected {expected} from out_dim"
    if (came := tuple(t.pool(*t.alone(0)).shape)) != (1, t.out_dim):
        return f"output shape: got {came} for one graph without batch, expected (1, {t.out_dim})"
    return None


def _rule_batch_mates(t: _Trial) -> str | None:
    whole = t.whole()
    kinds = ("a path", "a disconnected graph", "a single node", "a dense graph", "a graph without edges")
    for i, kind in enumerate(kinds):
        if (difference := _difference(whole[i : i + 1], t.pool(*t.alone(i)))) > CLOSE:
            return f"batch: the output of {kind} changes by {difference:.3g} when its batch mates are taken away"
    return None


def _rule_order_of_nodes(t: _Trial) -> str | None:
    difference = 0.0
    # a choice between equal scores (a dead ReLU makes some) may fall either way, so that a discrete pool has three trials
    for _ in range(3 if t.discrete else 1):
        difference = 0.0
        for i in (0, 1, 3):
            _, edges = t.alone(i)
            x = t.randn(t.graphs[i][0], t.dim)
            order = torch.randperm(len(x), generator=t.generator)
            renamed = order.argsort()[edges]
            difference = max(difference, _difference(t.pool(x, edges), t.pool(x[order], renamed)))
        if difference <= CLOSE:
            return None
    return f"order: numbering the nodes of a graph anew changes its output by {difference:.3g}"


def _rule_order_of_edges(t: _Trial) -> str | None:
    order = torch.randperm(t.edge_index.shape[1], generator=t.generator)
    if (difference := _difference(t.whole(), t.pool(t.x, t.edge_index[:, order], batch=t.batch))) > CLOSE:
        return f"order: listing the edges in another order changes the output by {difference:.3g}"
    return None


def _rule_edges_matter(t: _Trial) -> str | None:
    without = t.pool(t.x, t.edge_index[:, :0], batch=t.batch)
    difference = _difference(t.whole()[[0, 1, 3]], without[[0, 1, 3]])
    if t.reads_edges and difference < CLOSE:
        return "edges: the output is the same without any edge; declare reads_edges = False if that is meant"
    if not t.reads_edges and difference > CLOSE:
        return f"edges: the output changes by {difference:.3g} without them, but reads_edges is declared False"
    return None


def _rule_graphs_equal_tensors(t: _Trial) -> str | None:
    sizes = t.batch.bincount()
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    try:
        y = t.pool(Graphs(t.x, offsets, t.edge_index))
    except Exception as error:
        return f"graphs: pool(graphs) raised {type(error).__name__}: {str(error)[:500]}; a graph pool also takes Graphs"
    if (difference := _difference(t.whole(), y)) > CLOSE:
        return f"graphs: the same as cenote.core.Graphs gives an output that differs by {difference:.3g}"
    return None


def _rule_no_node_gives_zeros(t: _Trial) -> str | None:
    last = len(t.graphs) + 1
    y = t.pool(t.x, t.edge_index, batch=t.batch, size=last)
    if y.shape[0] != last:
        return f"no node: with size={last} the output has {y.shape[0]} rows"
    if _difference(y[:-1], t.whole()) > CLOSE:
        return "no node: a graph without nodes changes the others"
    # one in the middle, and nothing at all
    batch = t.batch + (t.batch > 1)
    for name, row in (("behind all", y[-1]), ("between others", t.pool(t.x, t.edge_index, batch=batch)[2])):
        if not torch.equal(row, torch.zeros_like(row)):
            return f"no node: a graph without nodes {name} gives {'NaN' if row.isnan().any() else 'no zeros'}"
    x = t.x.clone().requires_grad_()
    t.pool(x, t.edge_index, batch=batch).square().sum().backward()
    if x.grad is not None and not bool(x.grad.isfinite().all()):
        return "no node: a graph without nodes makes gradients NaN or infinite"
    nothing = t.pool(t.x[:0], t.edge_index[:, :0], batch=t.batch[:0], size=2)
    if nothing.shape != (2, t.out_dim) or bool(nothing.any()):
        return (
            f"no node: two graphs without nodes give {tuple(nothing.shape)}, expected zeros of shape (2, {t.out_dim})"
        )
    return None


def _rule_gradients_are_right(t: _Trial) -> str | None:
    return rules.gradient_error(t.pool, t.output, t.x)


def _rule_half_precision(t: _Trial) -> str | None:
    bfloat16, float16 = (math.inf, math.inf) if t.discrete else (0.12, 0.03)
    hint = "; sum in float32, or declare discrete = True where rounding can turn a choice over"
    return rules.half_precision_error(t.pool, t.output, t.x, bfloat16, float16, hint)


def _rule_memory_layout(t: _Trial) -> str | None:
    x, edges = t.x.T.contiguous().T, t.edge_index.T.contiguous().T
    if (difference := _difference(t.whole(), t.pool(x, edges, batch=t.batch))) > CLOSE:
        return f"memory layout: the same numbers with other strides change the output by {difference:.3g}"
    return None


def _rule_input_is_left_alone(t: _Trial) -> str | None:
    # fresh, because earlier rules called with the others
    before = (t.randn(*t.x.shape), t.edge_index.clone(), t.batch.clone())
    given = tuple(v.clone() for v in before)
    t.pool(given[0], given[1], batch=given[2])
    for name, now, was in zip(("x", "edge_index", "batch"), given, before, strict=True):
        if not torch.equal(now, was):
            return f"input: {name} is written over by the call"
    return None


def _rule_attend(t: _Trial) -> str | None:
    attend = getattr(t.pool, "attend", None)
    if attend is None:
        return None
    output, weights, levels = attend(t.x, t.edge_index, batch=t.batch)
    if (difference := _difference(output, t.whole())) > CLOSE:
        return f"attend: its output differs from the call's by {difference:.3g}"
    if weights is not None and (weights.dim() != 2 or weights.shape[1] != len(t.x)):
        return f"attend: weights have shape {tuple(weights.shape)}, expected [heads, {len(t.x)}]"
    batch, edges = t.batch, t.edge_index
    for i, level in enumerate(levels):
        clusters = level.batch.shape[0]
        if level.assignment.shape != batch.shape or level.scores.shape != (clusters,):
            return f"attend: level {i} does not give every node an assignment and every cluster a score"
        kept = level.assignment >= 0
        into = level.assignment[kept]
        if sorted(set(into.tolist())) != list(range(clusters)):
            return f"attend: level {i} assigns nodes to other clusters than 0 to {clusters - 1}"
        if not torch.equal(level.batch[into], batch[kept]):
            return f"attend: level {i} puts a node into a cluster of another graph"
        moved = {(a, b) for a, b in level.assignment[edges].T.tolist() if a >= 0 and b >= 0}
        if not {(a, b) for a, b in level.edge_index.T.tolist()} <= moved:
            return f"attend: level {i} has an edge between clusters whose nodes have none"
        batch, edges = level.batch, level.edge_index
    return None


def _rule_wrong_input_is_named(t: _Trial) -> str | None:
    x, edges, batch = t.x, t.edge_index, t.batch
    across = torch.cat([edges, torch.tensor([[0], [len(x) - 1]])], 1)
    beyond = torch.cat([edges, torch.tensor([[0], [len(x)]])], 1)
    trials: dict[str, Callable[[], object]] = {
        "nodes of another width": lambda: t.pool(torch.cat([x, x], 1), edges, batch=batch),
        "integers for x": lambda: t.pool(x.long(), edges, batch=batch),
        "a batch of padded sets for x": lambda: t.pool(x.unsqueeze(0), edges, batch=batch),
        "no edge_index": lambda: t.pool(x, None, batch=batch),
        "a float edge_index": lambda: t.pool(x, edges.double(), batch=batch),
        "edge_index [edges, 2]": lambda: t.pool(x, edges.T, batch=batch),
        "an edge to a node that there is not": lambda: t.pool(x, beyond, batch=batch),
        "an edge between two graphs": lambda: t.pool(x, across, batch=batch),
        "edge_attr with too few rows": lambda: t.pool(x, edges, x[:1], batch),
        "a batch that is too short": lambda: t.pool(x, edges, batch=batch[1:]),
        "a batch that is not sorted": lambda: t.pool(x[:3], edges[:, :0], batch=torch.tensor([1, 0, 1])),
        "a negative batch": lambda: t.pool(x, edges, batch=batch - 1),
        "a size below the graphs of batch": lambda: t.pool(x, edges, batch=batch, size=1),
    }
    return rules.unnamed_input(trials)


_RULES: tuple[Callable[[_Trial], str | None], ...] = (
    _rule_output_shape,
    _rule_batch_mates,
    _rule_order_of_nodes,
    _rule_order_of_edges,
    _rule_edges_matter,
    _rule_graphs_equal_tensors,
    _rule_no_node_gives_zeros,
    _rule_gradients_are_right,
    rules._rule_gradient_reaches_every_parameter,
    _rule_half_precision,
    rules._rule_deepcopy,
    rules._rule_safetensors_round_trip,
    rules._rule_state_is_registered,
    _rule_memory_layout,
    _rule_input_is_left_alone,
    _rule_attend,
    _rule_wrong_input_is_named,
)
