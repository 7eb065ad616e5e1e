import re

import torch
from torch import Tensor, nn

from cenote.core import PaddedTokens, Tokens
from cenote.pool import AamSoftmax, AttentiveStatisticsPool, D3Net, Ecapa2d, LayerAttentionPool, SpeakerStatisticsPool
from tests.golden.cases import Case, adapter, load_parameters


def renamed(params: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Every rule that fits is applied, in order."""
    out = {}
    for name, value in params.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        out[name] = value
    return out


def frontal(case: Case, front: nn.Module, rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    shared = [(r"^in_conv\.0\.", "norm."), (r"^in_conv\.1\.", "conv."), (r"^fusion\.0\.", "fusion.")]
    shared += [(r"se_attention\.1\.", "down."), (r"se_attention\.3\.", "up.")]
    load_parameters(front, renamed(case.params, shared + rules))
    x = case.inputs["x"]
    return {"y": front(x.double()).to(x.dtype)}


@adapter("layer-aware-tdnn", "ECAPA (2-D)")
def ecapa(case: Case) -> dict[str, Tensor]:
    rules = [(rf"^block{i + 1}\.se_res2block\.", f"blocks.{i}.") for i in range(3)]
    rules += [
        (r"(blocks\.\d)\.0\.", r"\1.before."),
        (r"(blocks\.\d)\.1\.", r"\1."),
        (r"(blocks\.\d)\.2\.", r"\1.after."),
    ]
    rules += [(r"(blocks\.\d)\.3\.", r"\1.se.")]
    return frontal(case, Ecapa2d(case.config["in_channels"], case.config["channels"]), rules)


@adapter("layer-aware-tdnn", "D3Block")
def d3net(case: Case) -> dict[str, Tensor]:
    config = case.config
    front = D3Net(config["in_channels"], config["channels"], config.get("n_block", 3), config.get("depth", 4))
    return frontal(
        case, front, [(r"^se_d2blocks\.(\d+)\.layers\.", r"blocks.\1.convs."), (r"^se_d2blocks\.", "blocks.")]
    )


@adapter("layer-aware-tdnn", "LayerAttentionPool")
def layer_pool(case: Case) -> dict[str, Tensor]:
    config = case.config
    pool = LayerAttentionPool(config["in_dim"], config["out_dim"], config["n_layers"], config["n_heads"])
    rules = [(r"^in_projection\.0\.", "norm."), (r"^in_projection\.1\.", "inwards.")]
    rules += [
        (r"^out_projection\.0\.", "outwards."),
        (r"^out_projection\.1\.", "out_norm."),
        (r"^([Wb])(\d)$", r"\1\2"),
    ]
    params = {k.lower() if k in ("W1", "W2") else k: v for k, v in renamed(case.params, rules).items()}
    load_parameters(pool, params)
    x = case.inputs["x"]
    return {"y": pool(x.double()).to(x.dtype)}


class UnbiasedContext(AttentiveStatisticsPool):
    """The authors' context: without a mask the deviation divides by one frame less, and nothing is added under the root."""

    def statistics(self, tokens: Tokens) -> Tensor:
        assert isinstance(tokens, PaddedTokens)
        std = tokens.std(eps=0.0) if tokens.mask is not None else tokens.values.std(1)
        return torch.cat([tokens.mean(), std], -1)


@adapter("layer-aware-tdnn", "AttentiveStatisticPool")
def stat_pool(case: Case) -> dict[str, Tensor]:
    dim = case.config["in_dim"]
    pool = SpeakerStatisticsPool(dim, case.config["out_dim"])
    pool.statistics.__class__ = UnbiasedContext
    params = renamed(
        case.params,
        [
            (r"^attention\.0\.", "statistics.token."),
            (r"^attention\.2\.", "statistics.norm."),
            (r"^attention\.3\.", "statistics.score."),
            (r"^attn_norm\.", "norm."),
            (r"^out_proj\.", "projection."),
        ],
    )
    # theirs takes the token, its mean and its deviation side by side
    first = params.pop("statistics.token.weight").squeeze(-1)
    params |= {"statistics.token.weight": first[:, :dim], "statistics.context.weight": first[:, dim:]}
    params["statistics.score.weight"] = params["statistics.score.weight"].squeeze(-1)
    load_parameters(pool, params)
    x = case.inputs["x"].double().transpose(1, 2)
    outputs = {"nomask": pool(x)}
    if "mask" in case.inputs:
        outputs["masked"] = pool(x, case.inputs["mask"])
    return {k: v.to(case.inputs["x"].dtype) for k, v in outputs.items()}


@adapter("layer-aware-tdnn", "Multiheaded_AAMsoftmax")
def aam(case: Case) -> dict[str, Tensor]:
    config = case.config
    loss = AamSoftmax(config["in_dim"], config["n_class"], config["n_heads"], config["m"], config["s"])
    load_parameters(loss, case.params)
    x, label = case.inputs["x"], case.inputs["label"]
    cosines = loss.with_margin(loss.cosines(x.double()), label)
    # theirs shows the posteriors with the margin in
    prob = (loss.scale * cosines).softmax(-1).mean(1)
    return {"loss": loss(x.double(), label).to(x.dtype), "prob": prob.to(x.dtype)}
