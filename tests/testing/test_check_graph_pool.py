"""Every rule of the contract catches a graph pool that breaks it, and says which rule that is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import GraphLevel, GraphPool, GraphPooled
from cenote.pool.graph.base import Graph, mean_by, sum_by
from cenote.testing import ContractError, check_graph_pool


class Sound(GraphPool):
    """`sum_n tanh(W (x_n + sum of its neighbours))`, the smallest pool that keeps the contract."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.lin = nn.Linear(3, 2)

    def messages(self, graph: Graph) -> Tensor:
        row, col = graph.edge_index
        return graph.x + sum_by(graph.x[row], col, len(graph.x))

    def pool(self, graph: Graph) -> GraphPooled:
        h = torch.tanh(self.lin(self.messages(graph)))
        return GraphPooled(sum_by(h, graph.batch, graph.size), None, ())


class ReadsNoEdges(Sound):
    reads_edges = False

    def messages(self, graph: Graph) -> Tensor:
        return graph.x


def test_sound_pools_pass() -> None:
    check_graph_pool(Sound())
    check_graph_pool(ReadsNoEdges())


def test_the_pool_is_not_changed() -> None:
    pool = Sound()
    before = pool.lin.weight.detach().clone()
    check_graph_pool(pool)
    assert torch.equal(pool.lin.weight, before)
    assert pool.lin.weight.dtype == torch.float32
    assert pool.training


class HasNoWidth(Sound):
    def __init__(self) -> None:
        super().__init__()
        del self.out_dim


class ReturnsMore(Sound):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs), None


class NeedsABatch(Sound):
    def forward(
        self, x: Any, edge_index: Any = None, edge_attr: Any = None, batch: Any = None, size: Any = None
    ) -> Tensor:
        return super().forward(x, edge_index, edge_attr, batch.clone(), size)


class Throws(Sound):
    def messages(self, graph: Graph) -> Tensor:
        return super().messages(graph) + torch.rand(())


class Halves(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.out_dim = 4


class LooksAround(Sound):
    def messages(self, graph: Graph) -> Tensor:
        return super().messages(graph) - graph.x.mean(0)


class WaitsForTheDeepest(Sound):
    """As in the code of Graph Parsing Networks: everybody is processed as long as anybody needs it."""

    def pool(self, graph: Graph) -> GraphPooled:
        h = graph.x
        for _ in range(int(graph.batch.bincount().max()) if len(h) else 0):
            h = self.messages(graph._replace(x=0.1 * h))
        return GraphPooled(self.lin(mean_by(h, graph.batch, graph.size)), None, ())


class TakesTheFirst(Sound):
    def messages(self, graph: Graph) -> Tensor:
        first = graph.batch.diff(prepend=graph.batch.new_tensor([-1])) > 0
        return super().messages(graph) + graph.x * first.unsqueeze(1)


class WeighsLaterEdges(Sound):
    def messages(self, graph: Graph) -> Tensor:
        row, col = graph.edge_index
        place = torch.arange(len(row)).to(graph.x.dtype).unsqueeze(1)
        starts = sum_by(torch.ones_like(place), graph.batch[row], graph.size).cumsum(0).roll(1, 0)
        starts[:1] = 0
        return graph.x + sum_by(graph.x[row] * (place - starts[graph.batch[row]]), col, len(graph.x))


class IsBlind(Sound):
    def messages(self, graph: Graph) -> Tensor:
        return graph.x


class Sees(Sound):
    reads_edges = False


class TakesNoGraphs(Sound):
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x + 0, *args, **kwargs)


class FillsEmpty(Sound):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        return y + (y == 0)


class IgnoresSize(Sound):
    def forward(
        self, x: Any, edge_index: Any = None, edge_attr: Any = None, batch: Any = None, size: Any = None
    ) -> Tensor:
        y = super().forward(x, edge_index, edge_attr, batch, size)
        return y if batch is None else y[: int(batch[-1:].sum()) + 1]


class Holds(Sound):
    def pool(self, graph: Graph) -> GraphPooled:
        output = super().pool(graph).output
        return GraphPooled(output * output.detach(), None, ())


class HasADeadParameter(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Parameter(torch.ones(1))


class DeclaresALiveOneInert(Sound):
    inert_parameters = ("lin.bias",)


class Widens(Sound):
    def pool(self, graph: Graph) -> GraphPooled:
        return GraphPooled(super().pool(graph).output.double(), None, ())


class Overflows(Sound):
    def pool(self, graph: Graph) -> GraphPooled:
        return GraphPooled(super().pool(graph).output * 1e5 / 1e5, None, ())

    def messages(self, graph: Graph) -> Tensor:
        return super().messages(graph) * 1e5 / 1e5


class Copies(Sound):
    def __deepcopy__(self, memo: object) -> "Copies":
        copy = Copies()
        copy.load_state_dict({k: v * 2 for k, v in self.state_dict().items()})
        return copy.double().eval()


class Forgets(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(lambda module, state, prefix, local: state.pop(prefix + "lin.weight"))

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(state, strict=False)


class HidesATensor(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.scale = {"of": torch.ones(2)}


class ReadsMemory(Sound):
    def messages(self, graph: Graph) -> Tensor:
        return super().messages(graph._replace(x=graph.x.as_strided(graph.x.shape, (graph.x.shape[1], 1))))


class WritesOver(Sound):
    def messages(self, graph: Graph) -> Tensor:
        if not graph.x.requires_grad:
            graph.x.round_(decimals=12)
        return super().messages(graph)


class AttendsToSomethingElse(Sound):
    def attend(self, *args: Any, **kwargs: Any) -> GraphPooled:
        pooled = super().attend(*args, **kwargs)
        return pooled._replace(output=2 * pooled.output)


class _Levels(Sound):
    def level(self, graph: Graph) -> GraphLevel:
        raise NotImplementedError

    def pool(self, graph: Graph) -> GraphPooled:
        return super().pool(graph)._replace(levels=(self.level(graph),))


class MixesGraphs(_Levels):
    def level(self, graph: Graph) -> GraphLevel:
        return GraphLevel(0 * graph.batch, graph.edge_index[:, :0], graph.batch[:1], graph.x[:1, 0])


class InventsEdges(_Levels):
    def level(self, graph: Graph) -> GraphLevel:
        nodes = torch.arange(len(graph.x))
        return GraphLevel(nodes, torch.stack([nodes, nodes]), graph.batch, graph.x[:, 0])


class TakesAnything(Sound):
    def forward(
        self, x: Any, edge_index: Any = None, edge_attr: Any = None, batch: Any = None, size: Any = None
    ) -> Tensor:
        if isinstance(x, Tensor):
            x = x.double()
        return super().forward(x, edge_index, edge_attr, batch, size)


@pytest.mark.parametrize(
    ("pool", "rule"),
    [
        (HasNoWidth(), "attributes"),
        (ReturnsMore(), "call: pool(x, edge_index, batch=batch) returned tuple"),
        (NeedsABatch(), "call: pool(x, edge_index) raised"),
        (Throws(), "determinism"),
        (Halves(), "output shape"),
        (LooksAround(), "batch: the output of a path"),
        (WaitsForTheDeepest(), "batch: the output of a disconnected graph"),
        (TakesTheFirst(), "order: numbering the nodes"),
        (WeighsLaterEdges(), "order: listing the edges"),
        (IsBlind(), "edges: the output is the same"),
        (Sees(), "edges: the output changes"),
        (TakesNoGraphs(), "graphs"),
        (FillsEmpty(), "no node"),
        (IgnoresSize(), "no node: with size="),
        (Holds(), "gradient: disagrees"),
        (HasADeadParameter(), "gradient: does not reach dead"),
        (DeclaresALiveOneInert(), "gradient: lin.bias is declared inert"),
        (Widens(), "half precision"),
        (Overflows(), "half precision"),
        (Copies(), "deepcopy"),
        (Forgets(), "safetensors"),
        (HidesATensor(), "state: scale"),
        (ReadsMemory(), "memory layout"),
        (WritesOver(), "input: x is written over"),
        (AttendsToSomethingElse(), "attend: its output differs"),
        (MixesGraphs(), "attend: level 0 puts a node into a cluster of another graph"),
        (InventsEdges(), "attend: level 0 has an edge"),
        (TakesAnything(), "errors: integers for x is accepted"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_pool_is_caught(pool: nn.Module, rule: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_graph_pool(pool)
    lines = str(caught.value).splitlines()
    assert type(pool).__name__ in lines[0]
    assert any(line.startswith(f"- {rule}") for line in lines), str(caught.value)


def test_what_graphs_hold_is_not_given_twice() -> None:
    from cenote.core.graphs import Graphs

    graphs = Graphs(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([[0], [1]]))
    with pytest.raises(InputError, match="hold them already"):
        Sound()(graphs, graphs.edge_index)
