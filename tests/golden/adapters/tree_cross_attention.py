import torch
from torch import Tensor

from cenote.pool.attention.tree_cross_attention.search import Retrieved, TreeCrossAttention
from cenote.pool.attention.tree_cross_attention.tree import Tree
from tests.golden.cases import Case, adapter, load_parameters


class AsTheirs(TreeCrossAttention):
    """Their code leaves the siblings of the opened node visible also where no token stands below them.

    It adds 1e-9 to the number of children, which shows above the leaves, whose mask is float64, and is lost in the float32
    masks of all other levels.
    """

    def build(self, x: Tensor, *others: Tensor) -> Tree:
        self.at_leaves = True
        return super().build(x, *others)

    def _aggregate(self, children: Tensor, real: Tensor) -> Tensor:
        mean, count = super()._aggregate(children, real), real.sum(-1, keepdim=True).to(children.dtype)
        if not self.at_leaves:
            return mean
        self.at_leaves = False
        return mean * (count / (count + 1e-9))

    def siblings_shown(self, real: Tensor, chosen: Tensor) -> Tensor:
        return ~chosen


@adapter("tree-cross-attention", "models.memory_modules.TreeMemory")
def tree_memory(case: Case) -> dict[str, Tensor]:
    c = case.config
    assert c.get("norm_first", True)
    assert c.get("aggregator_type", "transformer") == "transformer"
    b = c.get("branch_factor", 2)
    tca = AsTheirs(c["d_model"], c["nhead"], c["dim_feedforward"], b, c.get("num_aggregation_layers", 1), c["bptt"])
    load_parameters(tca, {ours(name): value for name, value in case.params.items()})
    x, query = case.inputs["tokens_BND"], case.inputs["query_BMD"]
    tree = tca.build(x)
    found = tca.attend(query, tree)
    grads = torch.autograd.grad(found.output.sum(), [x, query], retain_graph=True)
    outputs = {
        "retrieved": found.output,
        "leaf_retrieved_before_ff": tca.query_model(query, tree.nodes[-1], tree.real[-1]),
        "grad_tokens": grads[0],
        "grad_query": grads[1],
    }
    shape: list[int] = []
    for level, (nodes, real) in enumerate(zip(tree.nodes, tree.real, strict=True)):
        shape += [nodes.shape[1] // tree.nodes[level - 1].shape[1]] if level else []
        if level == tree.levels + 1:
            nodes = with_their_copies(nodes, x)
        outputs[f"level{level}_nodes"] = nodes.unflatten(1, shape) if shape else nodes.squeeze(1)
        dtype = case.expected[f"level{level}_realmask"].dtype
        mask = real.to(dtype).unsqueeze(-1)
        outputs[f"level{level}_realmask"] = mask.unflatten(1, shape) if shape else mask.squeeze(1)
    for level in range(tree.levels):
        outputs[f"step{level}_mean_head_weights_BM"] = policy(tca, found, tree, query, level).flatten(0, 1)
        outputs[f"step{level}_choice_BM"] = found.choices[..., level].flatten()
    return outputs


def policy(tca: TreeCrossAttention, found: Retrieved, tree: Tree, query: Tensor, level: int) -> Tensor:
    """Mean over the heads of the weights of the children that were there to choose from."""
    b = tca.branch_factor
    nodes = found.nodes[..., level * b : (level + 1) * b]
    flat = nodes.flatten(1)
    values = tree.nodes[level + 1].gather(1, flat.unsqueeze(-1).expand(-1, -1, tca.dim)).unflatten(1, nodes.shape[1:])
    real = tree.real[level + 1].gather(1, flat).unflatten(1, nodes.shape[1:])
    scores = tca.query_model.absorbed(tca.query_model.norm(query)) @ values.transpose(-1, -2)
    return scores.masked_fill(~real.unsqueeze(2), float("-inf")).softmax(-1).mean(2)


def with_their_copies(leaves: Tensor, x: Tensor) -> Tensor:
    """Their empty leaves, masked everywhere, hold copies of the first tokens plus 1e-5."""
    missing = leaves.shape[1] - x.shape[1]
    return torch.cat([leaves[:, : x.shape[1]], x[:, :missing] + 1e-5], 1) if missing else leaves


def ours(name: str) -> str:
    name = name.replace("aggregator.encoder.layers.", "aggregator.")
    for theirs, mine in (
        (".dataset_self_attn.", ".attention."),
        (".ff.", ".ff."),
        (".fn.net.0.", ".fc1."),
        (".fn.net.2.", ".fc2."),
        (".fn.", "."),
    ):
        name = name.replace(theirs, mine)
    return name
