from typing import Any

from torch import Tensor, nn

from cenote.mix.basic.attention import AttentionMixer
from cenote.mix.basic.grids import IdentityMixer, SpatialLinear
from cenote.mix.maps import on_map
from cenote.mix.metaformer.block import MetaFormerBlock
from cenote.mix.metaformer.model import FeatureMaps, MetaFormer
from cenote.mix.metaformer.pooling import PoolMixer
from tests.golden.cases import Case, adapter, load_parameters
from tests.golden.words import activation_of, class_word

NORMS = {"GroupNorm": "group", "LayerNormChannel": "layer", "BatchNorm2d": "batch", "Identity": "none"}


def norm_word(case: Case, norm: str) -> str:
    return NORMS[class_word(case.config.get("norm_layer", norm))]


def settings(case: Case, norm: str) -> dict[str, Any]:
    config = case.config
    scale = config.get("layer_scale_init_value", 1e-5) if config.get("use_layer_scale", True) else None
    return {
        "norm": norm_word(case, norm),
        "act": activation_of(config.get("act_layer", "GELU")),
        "layer_scale": scale,
    }


def block(case: Case, mixer: nn.Module, norm: str) -> MetaFormerBlock:
    made = MetaFormerBlock(case.config["dim"], mixer, ratio=case.config.get("mlp_ratio", 4.0), **settings(case, norm))
    load_parameters(made, case.params)
    return made


@adapter("metaformer", "PoolFormerBlock")
def poolformer_block(case: Case) -> dict[str, Tensor]:
    mixer = PoolMixer(case.config.get("pool_size", 3))
    x = case.inputs["x"].double()
    return {"y": block(case, mixer, "GroupNorm")(x).float(), "pool_minus_id": on_map(mixer, x).float()}


@adapter("metaformer", "MetaFormerBlock")
def metaformer_block(case: Case) -> dict[str, Tensor]:
    config = case.config
    word = str(config.get("token_mixer", "identity")).lower()
    if "attention" in word:
        heads = config["dim"] // config.get("head_dim", 32)
        mixer: nn.Module = AttentionMixer(config["dim"], heads, bias=config.get("qkv_bias", False))
    elif "fc" in word:
        # an int, or a list of one, is how many cells there are
        rows, columns = case.inputs["x"].shape[2:]
        mixer = SpatialLinear((rows, columns))
    elif "pool" in word:
        mixer = PoolMixer(config.get("pool_size", 3))
    else:
        mixer = IdentityMixer()
    return {"y": block(case, mixer, "LayerNormChannel")(case.inputs["x"].double()).float()}


@adapter("metaformer", "PoolFormer")
def poolformer(case: Case) -> dict[str, Tensor]:
    config = case.config
    dense = config.get("fork_feat", False)
    stages = len(config["layers"])
    size = config.get("pool_size", 3)
    patch = [config.get(f"in_{name}", default) for name, default in (("patch_size", 7), ("stride", 4), ("pad", 2))]
    step = [config.get(f"down_{name}", default) for name, default in (("patch_size", 3), ("stride", 2), ("pad", 1))]
    net = MetaFormer(
        config["layers"],
        config["embed_dims"],
        lambda dim, grid: PoolMixer(size),
        classes=0 if dense else config.get("num_classes", 1000),
        ratio=config.get("mlp_ratios") or [4.0] * stages,
        halve=(config.get("downsamples") or [True] * stages)[: stages - 1],
        patch=(patch[0], patch[1], patch[2]),
        step=(step[0], step[1], step[2]),
        **settings(case, "GroupNorm"),
    )
    x = case.inputs["x"].double()
    if not dense:
        load_parameters(net, case.params)
        return {"y": net(x).float()}
    maps = FeatureMaps(net, norm_word(case, "GroupNorm"))
    own = {f"norm{place}.": f"norms.{i}." for i, place in enumerate(net.stages)}
    params = {f"net.{n}" if n.startswith(("network.", "patch_embed.")) else n: v for n, v in case.params.items()}
    wanted = maps.double().state_dict()
    load_parameters(maps, {**{n: v for n, v in wanted.items() if n.startswith("net.norm.")}, **params}, own)
    return {f"y{i}": y.float() for i, y in enumerate(maps(x))}
