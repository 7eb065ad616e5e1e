"""Networks of several layers on graphs, for nodes and for whole graphs.

Source: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?", ICLR 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError
from torch import Tensor, nn

from cenote.core import files
from cenote.core.errors import InputError
from cenote.core.graphs import Graphs
from cenote.core.requirements import require_at_least, require_one_of, require_rate
from cenote.mix.gatv2.conv import Attended, DotProductConv, GATConv, GATv2Conv, GraphAttention
from cenote.mix.gatv2.edges import sum_at
from cenote.mix.gatv2.plain import GCNConv, GINConv

ATTENTIVE = {"gatv2": GATv2Conv, "gat": GATConv, "dot": DotProductConv}
PLAIN = {"gcn": GCNConv, "gin": GINConv}
FORMAT = 1


class GraphAttentionNetwork(nn.Module):
    """Layers on a graph, an ELU between them, and logits of each node, or of each graph behind a readout.

    All layers but the last join their heads; the last takes their mean.

    Args:
        dim: width of a node.
        hidden: width of a head.
        outputs: number of logits.
        layers: their number.
        heads: of each layer.
        conv: `"gatv2"`, `"gat"`, `"dot"`; `"gcn"` and `"gin"`, whose layers are as wide as all heads.
        readout: `"mean"`, `"sum"` or `"max"` of a graph's nodes; None for logits of each node.
        edge_dim: width of the features of edges, None for none.
        dropout: on what layers are given, in training.
        attention_dropout: on weights, in training.
        residual: whether layers of attention add a map of what they are given.
        slope, share_weights: of `GATv2Conv`.

    Example:
        >>> net = GraphAttentionNetwork(3, 4, outputs=2, heads=2, readout="mean")
        >>> net(torch.randn(5, 3), torch.tensor([[0, 1, 3], [1, 0, 4]]), batch=torch.tensor([0, 0, 0, 1, 1])).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        outputs: int,
        *,
        layers: int = 2,
        heads: int = 1,
        conv: Literal["gatv2", "gat", "dot", "gcn", "gin"] = "gatv2",
        readout: Literal["mean", "sum", "max"] | None = None,
        edge_dim: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        residual: bool = False,
        slope: float = 0.2,
        share_weights: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, layers=layers, outputs=outputs, hidden=hidden, heads=heads)
        require_one_of((*ATTENTIVE, *PLAIN), conv=conv)
        require_one_of(("mean", "sum", "max", None), readout=readout)
        require_rate(dropout=dropout)
        self.settings = {
            "dim": dim,
            "hidden": hidden,
            "outputs": outputs,
            "layers": layers,
            "heads": heads,
            "conv": conv,
            "readout": readout,
            "edge_dim": edge_dim,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "residual": residual,
            "slope": slope,
            "share_weights": share_weights,
        }
        self.readout, self.dropout = readout, dropout
        own: dict[str, Any] = {"edge_dim": edge_dim, "dropout": attention_dropout, "residual": residual}
        if conv == "gatv2":
            own |= {"slope": slope, "share_weights": share_weights}
        elif conv == "gat":
            own["slope"] = slope
        convs: list[nn.Module] = []
        width = dim
        for i in range(layers):
            last = i == layers - 1
            if conv in PLAIN:
                wide = (outputs if readout is None else hidden) if last else heads * hidden
                convs.append(PLAIN[conv](width, wide))
            else:
                of_head = outputs if last and readout is None else hidden
                convs.append(ATTENTIVE[conv](width, of_head, heads, join=not last, **own))
                wide = of_head if last else heads * of_head
            width = wide
        self.convs = nn.ModuleList(convs)
        self.head = None if readout is None else nn.Linear(width, outputs)

    def forward(
        self,
        x: Float[Tensor, "nodes dim"] | Graphs,
        edge_index: Int[Tensor, "2 edges"] | None = None,
        edge_attr: Shaped[Tensor, "edges *channels"] | None = None,
        batch: Int[Tensor, "nodes"] | None = None,
        size: int | None = None,
    ) -> Float[Tensor, "rows outputs"]:
        """Logits of each node, or of each graph.

        Args:
            x: the nodes, or `Graphs`, which hold all the rest.
            edge_index: row 0 the source, row 1 the target.
            edge_attr: what is known of each edge.
            batch: the graph of each node; None for one graph.
            size: number of graphs; default `batch.max() + 1`.
        """
        return self._run(x, edge_index, edge_attr, batch, size)[0]

    def attend(
        self,
        x: Float[Tensor, "nodes dim"] | Graphs,
        edge_index: Int[Tensor, "2 edges"] | None = None,
        edge_attr: Shaped[Tensor, "edges *channels"] | None = None,
    ) -> list[Attended]:
        """What each layer of attention took along which edge; empty for `"gcn"` and `"gin"`."""
        return self._run(x, edge_index, edge_attr, None, None)[1]

    def save(self, folder: str | Path) -> None:
        """Write the network and its settings into a folder; no pickle."""
        folder = Path(folder)
        state = self.state_dict()
        # a map that is shared stands twice
        if self.settings["share_weights"]:
            state = {k: v for k, v in state.items() if ".lin_r." not in k}
        card = {"format": FORMAT, "settings": self.settings}
        files.write_saved(folder / "graphs.json", folder / "graphs.safetensors", card, state)

    @classmethod
    def load(cls, folder: str | Path) -> GraphAttentionNetwork:
        """What `save` wrote.

        Raises:
            InputError: naming the folder and what is wrong with it.
        """
        folder = Path(folder)
        try:
            card, state = files.read_saved(
                folder / "graphs.json", folder / "graphs.safetensors", "train it again", format=int, settings=dict
            )
            files.require_format(folder, card, FORMAT)
            made = cls(**card["settings"])
            shared = (
                {k.replace(".lin_l.", ".lin_r."): v for k, v in state.items()} if made.settings["share_weights"] else {}
            )
            made.load_state_dict({**shared, **state})
        except InputError:
            raise
        except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: holds no whole graph network ({error}); name the folder of save") from error
        return made.eval()

    def _run(
        self,
        x: Tensor | Graphs,
        edge_index: Tensor | None,
        edge_attr: Tensor | None,
        batch: Tensor | None,
        size: int | None,
    ) -> tuple[Tensor, list[Attended]]:
        if isinstance(x, Graphs):
            if any(given is not None for given in (edge_index, edge_attr, batch, size)):
                raise InputError("edge_index, edge_attr, batch, size: Graphs hold them already; leave them out")
            edge_index, edge_attr, batch, size = x.edge_index, x.edge_attr, x.set_index(), x.batch
            x = x.values
        if edge_index is None:
            raise InputError("edge_index: is missing; a graph without edges has torch.empty(2, 0, dtype=torch.int64)")
        h, found = x, []
        for i, conv in enumerate(self.convs):
            h = F.dropout(h, self.dropout, self.training)
            if isinstance(conv, GraphAttention):
                found.append(conv.attend(h, edge_index, edge_attr))
                h = found[-1].output
            else:
                h = conv(h, edge_index, edge_attr)
            if i < len(self.convs) - 1 or self.head is not None:
                h = F.elu(h)
        return (h if self.head is None else self.head(self._read(h, batch, size))), found

    def _read(self, x: Tensor, batch: Tensor | None, size: int | None) -> Tensor:
        if batch is None:
            batch = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if batch.shape != x.shape[:1]:
            raise InputError(f"batch: expected one number for each of {len(x)} nodes, got shape {list(batch.shape)}")
        size = (int(batch.max()) + 1 if len(batch) else 1) if size is None else size
        if self.readout == "max":
            low = x.new_full((size, x.shape[1]), -torch.inf)
            top = low.scatter_reduce(0, batch.unsqueeze(1).expand_as(x), x, "amax")
            return torch.where(top.isfinite(), top, torch.zeros_like(top))
        total = sum_at(x, batch, size)
        if self.readout == "sum":
            return total
        return total / batch.bincount(minlength=size).clamp(min=1).unsqueeze(1)
