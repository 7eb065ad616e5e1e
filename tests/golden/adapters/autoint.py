from torch import Tensor

from cenote.mix.autoint.interacting import InteractingLayer
from tests.golden.cases import Case, adapter

NAMES = {"W_Q": "query", "W_K": "key", "W_V": "value", "W_Res": "residual"}


@adapter("autoint", "multihead_attention (stacked) + linear head")
def interacting(case: Case) -> dict[str, Tensor]:
    x = case.inputs["embeddings"]
    config = case.config
    units = config["block_shape"]
    if isinstance(units, int):
        units = [units] * config["blocks"]
    for number, width in enumerate(units[: config["blocks"]]):
        layer = InteractingLayer(
            x.shape[-1],
            width,
            heads=config["heads"],
            residual=config["has_residual"],
            eps=config.get("layer_norm_eps", 1e-8),
        ).to(x.dtype)
        own = {}
        for theirs, ours in NAMES.items():
            if (kernel := case.params.get(f"layer{number}.{theirs}.kernel")) is not None:
                own |= {f"{ours}.weight": kernel.T, f"{ours}.bias": case.params[f"layer{number}.{theirs}.bias"]}
        own |= {
            "norm.weight": case.params[f"layer{number}.norm.gamma"],
            "norm.bias": case.params[f"layer{number}.norm.beta"],
        }
        layer.load_state_dict(own)
        x = layer(x)
    logit = x.flatten(1) @ case.params["prediction.weight"] + case.params["prediction.bias"]
    # gradients are those of the sum of the logits
    return {"logit": logit, "interacting": x}
