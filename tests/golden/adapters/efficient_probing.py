"""All probes of the efficient-probing repository. Values that their constructors leave out are the authors' defaults."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.core.sets import PaddedTokens, Tokens
from cenote.pool import (
    ABMILP,
    ABMILPPositions,
    AimPool,
    CaePool,
    CaiTPool,
    CbamPool,
    ClipPool,
    CoCaPool,
    DinoViTPool,
    DolgPool,
    EfficientProbing,
    ESimPool,
    JepaPool,
    SigLipPool,
)
from tests.golden.cases import Case, adapter, load_parameters


def require(config: dict[str, Any], **only: Any) -> None:
    """Refuse a config whose other values of these options this adapter would silently misread."""
    for name, value in only.items():
        if config.get(name, value) != value:
            raise NotImplementedError(f"{name}={config[name]!r} of the authors' class has no counterpart here")


def rescaled(params: dict[str, Tensor], names: tuple[str, ...], config: dict[str, Any], head_width: int) -> None:
    """Move their `qk_scale` into what it multiplies; ours always scales by `head_width ** -0.5`."""
    scale = config.get("qk_scale") or head_width**-0.5
    for name in names:
        if name in params:
            params[name] = params[name] * (scale * head_width**0.5)


@adapter("efficient-probing", "EfficientProbing")
def efficient_probing(case: Case) -> dict[str, Tensor]:
    config, params = case.config, dict(case.params)
    require(config, num_heads=1)
    rescaled(params, ("cls_token",), config, config["dim"])
    # the weights sum to 1, so their value bias is a constant of the output
    bias = params.pop("v.bias", None)
    pool = EfficientProbing(config["dim"], queries=config.get("num_queries", 32), d_out=config.get("d_out", 1))
    y = load_parameters(pool, params)(case.inputs["x"])
    return {"y": y if bias is None else y + bias}


class BatchMinimumESimPool(ESimPool):
    """The authors' scope of the minimum: one number for the whole batch."""

    def value_minimum(self, tokens: Tokens, values: Tensor) -> Tensor:
        return values.min().expand(tokens.batch, 1)


@adapter("efficient-probing", "SimPool_nolinears")
def esimpool(case: Case) -> dict[str, Tensor]:
    config = case.config
    gamma = config.get("gamma")
    pool = BatchMinimumESimPool(
        config["dim"],
        heads=config.get("num_heads", 1),
        gamma=gamma,
        beta=bool(config.get("use_beta")) and gamma is not None,
        scale=config.get("qk_scale") or None,
    )
    params = {
        k: v for k, v in case.params.items() if k.startswith("norm_patches.") or (k == "beta" and pool.beta is not None)
    }
    y = load_parameters(pool, params)(case.inputs["x"])
    # with gamma they leave the heads unmerged; they always squeeze
    return {"y": (y if gamma is None else y.unflatten(-1, (pool.heads, -1))).squeeze()}


@adapter("efficient-probing", "ABMILPHead")
def abmilp(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["x"]
    depth = config.get("depth", 2)
    settings: dict[str, Any] = {
        "self_attention": config.get("self_attention_apply_to", "none"),
        "activation": "tanh" if config.get("activation", "tanh") == "tanh" else "relu",
        "depth": depth,
    }
    params = dict(case.params)
    pool: ABMILP
    if config.get("cond", "none") == "pe":
        pool = ABMILPPositions(config["dim"], tokens=int(config["num_patches"] ** 0.5) ** 2, **settings)
        # with content "all" their table has a row of zeros for [CLS] in front
        pool.tokens = params["pos_embed"].shape[1]
        pool.pos_embed = torch.zeros(1, pool.tokens, config["dim"])
    else:
        pool = ABMILP(config["dim"], **settings)
    renamed = {f"attention_predictor.{2 * i}.": f"hidden.{i}." for i in range(depth - 1)}
    renamed[f"attention_predictor.{2 * (depth - 1)}."] = "score."
    del params[f"attention_predictor.{2 * (depth - 1)}.bias"]
    load_parameters(pool, params, renamed)
    return {"y": pool(x[:, 1:] if config.get("content", "all") == "patch" else x)}


@adapter("efficient-probing", "AttentionPoolingClassifier")
def aim(case: Case) -> dict[str, Tensor]:
    config, params = case.config, dict(case.params)
    heads = config.get("num_heads", 12)
    rescaled(params, ("cls_token",), config, config["dim"] // heads)
    params.pop("k.bias", None)
    pool = AimPool(
        config["dim"], heads=heads, queries=config.get("num_queries", 1), qkv_bias=config.get("qkv_bias", False)
    )
    return {"y": load_parameters(pool, params)(case.inputs["x"])}


@adapter("efficient-probing", "AttentionPool2d")
def clip(case: Case) -> dict[str, Tensor]:
    config = case.config
    size = config["feat_size"]
    pool = ClipPool(
        config["in_features"],
        tokens=size**2 if isinstance(size, int) else size[0] * size[1],
        heads=config.get("num_heads", 4),
        out_dim=config.get("out_features"),
        width=config.get("embed_dim"),
        qkv_bias=config.get("qkv_bias", True),
    )
    return {"y": load_parameters(pool, case.params)(case.inputs["x"])}


@adapter("efficient-probing", "AttentionPoolLatent")
def siglip(case: Case) -> dict[str, Tensor]:
    config, params = case.config, dict(case.params)
    dim = config.get("embed_dim") or config["in_features"]
    require(config, pos_embed="")
    pool_type = config.get("pool_type", "token")
    latents = params["latent"].shape[1]
    if pool_type == "token":
        params["latent"], latents = params["latent"][:, :1], 1
    params.pop("k_norm.bias", None)
    pool = SigLipPool(
        dim,
        heads=config.get("num_heads", 8),
        queries=latents,
        average=pool_type == "avg",
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", True),
        norm="norm.weight" in params,
        qk_norm="q_norm.weight" in params,
    )
    y = load_parameters(pool, params)(case.inputs["x"])
    return {"y": y.unsqueeze(1) if y.dim() == 2 and pool_type not in ("token", "avg") else y}


@adapter("efficient-probing", "CrossAttention")
def coca(case: Case) -> dict[str, Tensor]:
    config, params = case.config, dict(case.params)
    dim = config["dim"]
    pool = CoCaPool(
        config.get("context_dim") or dim,
        out_dim=dim,
        heads=config.get("heads", 8),
        head_dim=config.get("dim_head", 64),
        norm_tokens=config.get("norm_context", False),
        feedforward=config.get("ff_mult", 4) if config.get("parallel_ff") else None,
    )
    # only the answer to the first query is returned
    params["img_queries"] = params["img_queries"][:1]
    for norm in ("norm", "context_norm"):
        # a buffer that is zero in their code
        assert not params.pop(f"{norm}.beta", torch.zeros(1)).any()
    renamed = {
        "norm.gamma": "norm.weight",
        "context_norm.gamma": "context_norm.weight",
        "ff.0.": "ff_in.",
        "ff.2.": "ff_out.",
    }
    return {"y": load_parameters(pool, params, renamed)(case.inputs["x"])}


@adapter("efficient-probing", "CAPooling")
def cait(case: Case) -> dict[str, Tensor]:
    config = case.config
    dim, heads, depth = config.get("embed_dim", 512), config.get("num_heads", 4), config.get("iterations", 1)
    params = {k: v for k, v in case.params.items() if not k.endswith("attn.k.bias")}
    pool = CaiTPool(
        dim,
        heads=heads,
        depth=depth,
        mlp_ratio=config.get("mlp_ratio_clstk", 4.0),
        qkv_bias=config.get("qkv_bias", True),
    )
    renamed: dict[str, str] = {}
    for i in range(depth):
        theirs, ours = f"blocks_token_only.{i}.", f"blocks.{i}."
        rescaled(params, (f"{theirs}attn.q.weight", f"{theirs}attn.q.bias"), config, dim // heads)
        renamed |= {f"{theirs}attn.": ours, theirs: ours}
    return {"y": load_parameters(pool, params, renamed)(case.inputs["x"])}


@adapter("efficient-probing", "CAEAttentiveBlock")
def cae(case: Case) -> dict[str, Tensor]:
    config = case.config
    dim, heads = config["dim"], config.get("num_heads", 8)
    head_dim = config.get("attn_head_dim")
    # a LayerNorm that is never used, and a bias that drops out of the softmax
    params = {k: v for k, v in case.params.items() if not k.startswith("norm2_cross.") and k != "norm1_k.bias"}
    pool = CaePool(dim, heads=heads, head_dim=head_dim, qkv_bias=config.get("qkv_bias", False))
    names = ("cross_attn.q.weight", "cross_attn.q_bias")
    rescaled(params, names, config, dim // heads if head_dim is None else head_dim)
    renamed = {"cross_attn.q_bias": "q.bias", "cross_attn.v_bias": "v.bias", "cross_attn.": ""}
    return {"y": load_parameters(pool, params, renamed)(case.inputs["x"]).squeeze()}


@adapter("efficient-probing", "AttentivePooler")
def jepa(case: Case) -> dict[str, Tensor]:
    config = case.config
    pool = JepaPool(
        config.get("embed_dim", 768),
        heads=config.get("num_heads", 12),
        queries=config.get("num_queries", 1),
        depth=config.get("depth", 1),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qkv_bias=config.get("qkv_bias", True),
        complete_block=config.get("complete_block", True),
    )
    renamed = {"cross_attention_block.xattn.": "", "cross_attention_block.": ""}
    return {"y": load_parameters(pool, case.params, renamed)(case.inputs["x"])}


@adapter("efficient-probing", "SpatialAttention2d")
def dolg(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["x"]
    require(config, with_aspp=False)
    params = {k: v.flatten(1) if v.dim() == 4 else v for k, v in case.params.items()}
    # what the first map adds, the BatchNorm subtracts
    params["bn.running_mean"] = params["bn.running_mean"] - params.pop("conv1.bias")
    pool = DolgPool(
        config["in_c"],
        hidden=config.get("s3_dim", 1024),
        activation="relu" if config.get("act_fn", "relu").lower() == "relu" else "leaky_relu",
        eps=config.get("bn_eps", 1e-5),
    )
    load_parameters(pool, params)
    if pool.out_dim == pool.dim:
        return {"y": pool(x)}
    # a map of another width is read as one of the input's width
    features, scores = pool.attended(PaddedTokens(x))
    return {"y": (features * scores).transpose(1, 2).reshape(x.shape[0], pool.dim, -1).mean(-1)}


@adapter("efficient-probing", "CbamPooling")
def cbam(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["x"]
    require(config, gate_layer="sigmoid")
    params = {k: v.flatten(1) if ".fc" in k and v.dim() == 4 else v for k, v in case.params.items()}
    pool = CbamPool(
        config["channels"],
        tokens=x.shape[1],
        # rd_ratio, rd_channels, rd_divisor and a rounding rule decide it
        hidden=params["channel.fc1.weight"].shape[0],
        kernel_size=config.get("spatial_kernel_size", 7),
        bias=config.get("mlp_bias", False),
    )
    renamed = {"channel.": "", "spatial.conv.conv.": "conv.", "spatial.conv.bn.": "bn."}
    load_parameters(pool, params, renamed)
    if config.get("output_size", 1) == 1:
        return {"y": pool(x).squeeze()}
    channel, spatial = pool.gates(PaddedTokens(x))
    gated = F.relu(spatial * channel.unsqueeze(1) * x + x).transpose(1, 2).unflatten(-1, (pool.side, pool.side))
    return {"y": nn.AdaptiveAvgPool2d(config["output_size"])(gated).squeeze()}


@adapter("efficient-probing", "DinoViTBlockPooling")
def dinovit(case: Case) -> dict[str, Tensor]:
    config = case.config
    pool = DinoViTPool(config.get("d_model", 512), heads=config.get("num_heads", 8))
    return {"y": load_parameters(pool, case.params, {"dino_block.": "block."})(case.inputs["x"])}
