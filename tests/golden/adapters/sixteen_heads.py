import torch
from torch import Tensor

from cenote.mix.sixteen_heads.gated import GatedAttention, denominator, gate_gradients, head_importance
from tests.golden.cases import Case, adapter

NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}


@adapter("sixteen-heads", "batch_head_importance")
def one_layer(case: Case) -> dict[str, Tensor]:
    x, target = case.inputs["x"], case.inputs["target"].detach()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    if "pad_mask" in case.inputs:
        mask = case.inputs["pad_mask"].detach() == 0
    heads = case.config["num_heads"]
    layer = GatedAttention(x.shape[-1], heads, head_dim=case.config["head_dim"]).to(x.dtype)
    own = {f"{NAMES[name[0]]}{name[1:]}": value for name, value in case.params.items()}
    layer.load_state_dict({**own, "gates": torch.ones(heads, dtype=x.dtype)})
    contexts = layer.contexts(x, mask)
    loss = (layer.joined(contexts) - target).square()[mask].sum()
    (gradients,) = torch.autograd.grad(loss, contexts)
    return {
        "importance": head_importance(contexts, gradients, mask),
        "importance_one_minus": head_importance(contexts, gradients, mask, others=True),
        "denom": denominator(mask).to(x.dtype),
        "gate_grad_per_example": gate_gradients(contexts, gradients, mask),
    }
