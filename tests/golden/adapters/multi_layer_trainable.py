import torch
from torch import Tensor, nn

from cenote.pool import LastLayerTrainable, MultiLayerTrainable
from tests.golden.cases import Case, adapter, load_parameters

SLUG = "multi-layer-trainable"
# their x gives keys and values, their context the queries
RENAME = {
    "latents": "look_up.latents",
    "pos_emb.weight": "layer_embedding",
    "cross_attend_blocks.0.fn.": "look_up.",
    "cross_attend_blocks.0.norm_context.": "look_up.norm_latents.",
    "cross_attend_blocks.0.norm.": "look_up.norm.",
    "cross_attend_blocks.1.norm.": "look_up.ff_norm.",
    "cross_attend_blocks.1.fn.net.0.": "look_up.ff_in.",
    "cross_attend_blocks.1.fn.net.2.": "look_up.ff_out.",
}


@adapter(SLUG, "PerceiverResampler (MultiLayersTrainablePooling)")
def multi_layer(case: Case) -> dict[str, Tensor]:
    x = case.inputs["hiddens"]
    # their input is already one vector per layer
    return outputs(case, MultiLayerTrainable(x.shape[-1], x.shape[1], **settings(case)), x.unsqueeze(2))


@adapter(SLUG, "PerceiverResampler (LastLayersTrainablePooling)")
def last_layer(case: Case) -> dict[str, Tensor]:
    x = case.inputs["hiddens"]
    return outputs(case, LastLayerTrainable(x.shape[-1], **settings(case)), x)


def outputs(case: Case, pool: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = load_parameters(pool, case.params, RENAME).to(x.dtype)(x)
    # the gradient of the case is that of sum_j j y_j: the plain sum of a unit vector says little
    weighted = (y * torch.arange(y.shape[-1], dtype=y.dtype)).sum()
    (grad,) = torch.autograd.grad(weighted, case.inputs["hiddens"], retain_graph=True)
    return {"embedding": y, "grad.hiddens": grad}


def settings(case: Case) -> dict[str, int]:
    c = case.config
    return {"latents": c["num_latents_value"], "heads": c["num_cross_heads"], "head_dim": c["cross_dim_head"]}
