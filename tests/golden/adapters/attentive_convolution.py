import math
from typing import Any

import torch
from torch import Tensor, nn

from cenote.mix.attentive_convolution.convolution import ATConv
from cenote.mix.attentive_convolution.model import AttNetBlock
from cenote.mix.maps import on_map
from tests.golden.cases import Case, adapter, load_parameters
from tests.golden.words import activation_of


def loaded(module: nn.Module, params: dict[str, Tensor]) -> Any:
    """Biases that the authors' config leaves out are zeros."""
    missing = {n: torch.zeros_like(v) for n, v in module.state_dict().items() if n.endswith("bias") and n not in params}
    return load_parameters(module, {**missing, **params})


def mixer_of(case: Case) -> ATConv:
    config = case.config
    (squared,) = (len(value) for name, value in case.params.items() if name.endswith("kernel_gen.weight"))
    return ATConv(config["dim"], math.isqrt(squared), act=activation_of(config.get("act_layer", "GELU")))


@adapter("attentive-convolution", "ATConv")
def atconv(case: Case) -> dict[str, Tensor]:
    mixer = loaded(mixer_of(case), case.params)
    x = case.inputs["x"].double()
    return {"y": on_map(mixer, x).float(), "kernels": mixer.kernels(x).float()}


@adapter("attentive-convolution", "Block")
def block(case: Case) -> dict[str, Tensor]:
    config = case.config
    made = AttNetBlock(
        config["dim"],
        mixer_of(case),
        ratio=config.get("exp_rate", 4.0),
        act=activation_of(config.get("act_layer", "GELU")),
        dconv=config.get("glu_dconv", False),
        norm=config.get("glu_norm", True),
        layer_scale=1e-6 if config.get("use_layer_scale", True) else None,
    )
    return {"y": loaded(made, case.params)(case.inputs["x"].double()).float()}
