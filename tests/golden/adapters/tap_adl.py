import math

from torch import Tensor

from cenote.mix.tap_adl.diversification import attention_diversification
from cenote.mix.tap_adl.model import FANBlock
from cenote.mix.tap_adl.pooling import TokenAwarePooling
from tests.golden.cases import Case, adapter, load_parameters

PREDICTOR = {
    "dilation_predictor.proj.0.": "first.",
    "dilation_predictor.proj.1.": "norm.",
    "dilation_predictor.proj.2.": "second.",
}


@adapter("tap-adl", "DilationPredictor + DilatedAvgPooling (as combined in TAPFANBlock.forward)")
def pooling(case: Case) -> dict[str, Tensor]:
    config = case.config
    scales, temperature = config.get("num_scales", 4), config.get("temperature", 1)
    module = TokenAwarePooling(config["dim"], scales, temperature=temperature)
    load_parameters(module, case.params, PREDICTOR)
    module.train(config.get("mode", "eval") == "train")
    found = module.pooled(case.inputs["x"].double())
    return {"y": found.output.float(), "mask": found.weights.unsqueeze(1).float()}


@adapter("tap-adl", "AttentionDiversificationLoss")
def loss(case: Case) -> dict[str, Tensor]:
    layers = [case.inputs[name] for name in sorted(case.inputs, key=lambda n: int(n.removeprefix("attn")))]
    return {"loss": attention_diversification(layers, case.config.get("th", 2)).view(1)}


@adapter("tap-adl", "TAPFANBlock")
def fan_block(case: Case) -> dict[str, Tensor]:
    config = case.config
    block = FANBlock(
        config["dim"],
        config["num_heads"],
        ratio=config.get("mlp_ratio", 4.0),
        bias=config.get("qkv_bias", False),
        scale=config.get("eta", 1.0),
        scales=config.get("num_scales", 4),
    )
    x = case.inputs["x"].double()
    side = math.isqrt(x.shape[1])
    grid = (config.get("H", side), config.get("W", side))
    load_parameters(block, case.params, {theirs: f"pooling.{own}" for theirs, own in PREDICTOR.items()})
    y, weights = block(x.transpose(1, 2).unflatten(-1, grid))
    return {"y": y.float(), "attn": weights.float()}
