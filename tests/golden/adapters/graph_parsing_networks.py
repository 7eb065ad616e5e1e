import torch
from torch import Tensor

from cenote.core.graphs import undirected
from cenote.pool.graph.base import GraphLevel
from cenote.pool.graph.graph_parsing_networks.model import GraphParsingNetwork, GraphParsingNodes, GraphParsingPool
from cenote.pool.graph.graph_parsing_networks.parsing import EdgeScores, parse
from tests.golden.cases import Case, adapter, load_parameters


class BatchWide(GraphParsingPool):
    """The authors go on with every node until the whole batch stops merging, except for the only node of a graph."""

    of_nodes = False

    def unfinished(self, edge_index: Tensor, batch: Tensor, level: GraphLevel) -> Tensor:
        if self.of_nodes:
            return torch.ones_like(batch, dtype=torch.bool)
        return (batch.bincount() > 1)[batch]


def numbered_like(assignment: Tensor, theirs: Tensor) -> Tensor:
    """Our number -> theirs, by a common node; the case compares communities, whose numbers are free."""
    order = torch.full((int(assignment.max()) + 1,), -1)
    order[assignment] = theirs
    return order


@adapter("graph-parsing-networks", "ParsingNet_GPU")
def parsing(case: Case) -> dict[str, Tensor]:
    config = case.config
    scorer = EdgeScores(
        config["channel"],
        config["layer_parsingnet"],
        edge_dropout=config.get("dropout_parsing", 0),
        self_loops=not config.get("link_ignore_self_loop", True),
    )
    renamed = {name.removeprefix("edge_net."): value for name, value in case.params.items()}
    load_parameters(scorer, renamed)
    x, batch = case.inputs["x"].double(), case.inputs["batch"]
    level = parse(*scorer(x, undirected(case.inputs["edge_index"], len(x))), batch)
    assert level.counts is not None
    theirs = case.expected["node2comm"]
    number = numbered_like(level.assignment, theirs)
    back = number.argsort()
    edges = number[level.edge_index]
    edges = edges[:, (edges[0] * len(number) + edges[1]).argsort()]
    return {
        "node2comm": number[level.assignment],
        "new_edge_index": edges,
        "new_batch": level.batch[back],
        "node_score": level.scores[back].float(),
        "link_counts": level.counts[back].float(),
    }


def ours(name: str) -> str:
    """Their name of a parameter of GPNN as ours."""
    part, _, rest = name.partition(".")
    parts = {"input_trans": "pool.input", "gnn1": "pool.gnn", "gnn2": "pool.gnn2", "gnn3": "gnn3"}
    parts |= {"deepsets_pre": "pool.pre", "deepsets_post": "pool.post", "parsing_net": "pool.parser"}
    if part == "input_trans" or part == "predictor":
        return f"{parts.get(part, part)}.{rest.removeprefix('mlp.')}"
    if part == "parsing_net":
        return f"pool.parser.{rest.removeprefix('edge_net.')}"
    if rest.startswith("gnn."):
        _, index, tail = rest.split(".", 2)
        tail = "lin.weight" if tail == "lin_src.weight" else tail
        # a convolution, a ReLU and a Dropout stand for each layer
        return f"{parts[part]}.convs.{int(index) // 3}.{tail}"
    return f"{parts[part]}.{rest}"


@adapter("graph-parsing-networks", "GPNN")
def gpnn(case: Case) -> dict[str, Tensor]:
    config = case.config
    dropout, last = config.get("dropout_network", 0.0), config["act_final"]
    conv = str(config.get("gnn_model", "GCN")).lower()
    first, second = config["layer_gnn1"], config["layer_gnn2"]
    second = {"share": None, "follow": first}.get(second, second)
    of_nodes = config["task_type"] == "task_node"
    pool = BatchWide(
        config["in_channel"],
        config["hidden_channel"],
        first,
        second,
        config["layer_deepsets"],
        config["layer_parsingnet"],
        config["layer_trans"],
        dropout,
        config.get("dropout_parsing", 0.0),
        not config.get("link_ignore_self_loop", True),
        last,
        conv,
    )
    pool.of_nodes = of_nodes
    model: GraphParsingNetwork | GraphParsingNodes
    if of_nodes:
        third = config["layer_gnn3"]
        third = {"share": None, "follow": first if second is None else second}.get(third, third)
        model = GraphParsingNodes(pool, config["out_channel"], third, config["layer_trans"], dropout, conv, last)
    else:
        model = GraphParsingNetwork(pool, config["out_channel"], config["layer_trans"], dropout)
    named = {ours(name): value for name, value in case.params.items()}
    wanted = model.state_dict()
    load_parameters(
        model,
        {k: v for k, v in named.items() if k in wanted}
        | {
            # a shared GNN may be stored under either name; GIN keeps its constant in a buffer
            k: v
            for k, v in wanted.items()
            if k.endswith(".eps") and k not in named
        },
    )
    x, edge_index = case.inputs["x"].double(), case.inputs["edge_index"]
    batch = None if of_nodes else case.inputs["batch"]
    logits = model(x, edge_index, None, batch)
    depth = len(pool.attend(x, edge_index, None, batch).levels)
    return {"logits": logits.float(), "num_pooling_layers": torch.tensor(depth)}
