import torch
from torch import Tensor

from cenote.reduce.pruning_and_pooling.policy import (
    CLS_SCORE,
    importance,
    in_place,
    pooled_tokens,
    pruned_tokens,
    score_variance,
)
from cenote.reduce.pruning_and_pooling.reducer import PruneOrPool
from cenote.reduce.reducible_vit.model import ReducingBlock
from tests.golden.cases import Case, adapter, load_parameters


class _Watched(PruneOrPool):
    """Keeps what it was given."""

    def forward(self, x: Tensor, *given: Tensor, **signals: Tensor):  # type: ignore[no-untyped-def]
        self.given = {"x": x, **signals}
        return super().forward(x, *given, **signals)


@adapter("pruning-and-pooling", "ppt_deit.pp_block_adaptive")
def adaptive_block(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["x"]
    block = ReducingBlock(config["dim"], config["num_heads"], config["mlp_hidden"], config["qkv_bias"])
    load_parameters(block, case.params)
    sizes = case.inputs["size"].squeeze(-1).detach() if "size" in case.inputs and config["prop_attn"] else None
    left = x.shape[1] - 1 - min(config["r"], (x.shape[1] - 1) // 2)
    reducer = _Watched(tokens=left, threshold=config["OP_threshold"])
    y = block(x, reducer, sizes, protect=1)
    seen = reducer.given
    scores = importance(seen["attention"][..., 1:], seen["values"][:, :, 1:])
    variance, metric = score_variance(scores), seen["keys"].mean(1)
    scores = torch.cat([torch.full_like(scores[:, :1], CLS_SCORE), scores], 1)
    # the paper's block leaves other orders, by which a network that knows places by its input is not changed
    pooled = pooled_tokens(seen["x"], metric, config["r"], sizes)
    pruned = pruned_tokens(seen["x"], scores, config["r"], sizes)
    pools = (variance < config["OP_threshold"])[:, None]
    place = torch.where(pools, in_place(y, pooled), in_place(y, pruned))
    item = torch.arange(len(x))[:, None]
    return {
        "y": y.tokens[item, place],
        "size_out": y.sizes[item, place].unsqueeze(-1),
        "scores": scores,
        "score_variance": variance,
        "metric": metric,
        "grad_x": torch.autograd.grad(y.tokens.sum(), x, retain_graph=True)[0],
    }
