import re

from torch import Tensor, nn

from cenote.pool import AFAChannelAttention, AFAIDAUp, AFASpatialAttention, MultiAFA, scale_space_rendering
from tests.golden.cases import Case, adapter, load_parameters

# theirs numbers a normalisation inside of another list
INSIDE = ((r"\.1\.0\.", ".1."), (r"\.0\.0\.", ".0."))
SPATIAL = (("conv_inner.", "outer."), ("conv.", "inner."), ("final.0.", "final."))
CHANNEL = (("conv1.", "squeeze."), ("conv2.0.", "excite."))


def renamed(params: dict[str, Tensor], *names: tuple[str, str]) -> dict[str, Tensor]:
    """`names` are their beginnings and ours, patterns, the first that fits wins."""
    ours = {}
    for name, value in params.items():
        for theirs, own in INSIDE:
            name = re.sub(theirs, own, name)
        for theirs, own in names:
            if re.match(theirs, name):
                name = re.sub(theirs, own, name, count=1)
                break
        ours[name] = value
    return ours


def inside(prefix: str, own: str, names: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(prefix + re.escape(theirs), own + ours) for theirs, ours in names]


def loaded(module: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    return load_parameters(module, params)


@adapter("attentive-feature-aggregation", "SpatialAttentionModule")
def spatial(case: Case) -> dict[str, Tensor]:
    config = case.config
    module = AFASpatialAttention(
        config["in_ch"], config["out_ch"], config["bot_channels"], config.get("activation", "sigmoid")
    )
    loaded(module, renamed(case.params, *inside("", "", SPATIAL)))
    x = case.inputs["x"]
    logits, attention = module.logits(x), module(x)
    return {"logits": logits, "attn": attention}


@adapter("attentive-feature-aggregation", "ChannelAttentionModule")
def channel(case: Case) -> dict[str, Tensor]:
    module = AFAChannelAttention(case.config["in_ch"], case.config.get("down_ratio", 16))
    loaded(module, renamed(case.params, *inside("", "", CHANNEL)))
    x = case.inputs["x"]
    return {"attn": module(x), "logits": module.logits(x)}


@adapter("attentive-feature-aggregation", "AFAIDAUp")
def ida_up(case: Case) -> dict[str, Tensor]:
    config = case.config
    node = AFAIDAUp(config["channels"], config["up_factors"], config["out_dim"])
    names = [(r"proj_(\d+)\.", r"projections.\1."), (r"up_(\d+)\.", r"enlarge.\1.")]
    for i in range(1, len(config["channels"])):
        names += inside(rf"sa_{i}\.", f"fuse.{i - 1}.spatial.", SPATIAL)
        names += inside(rf"ca_{i}\.", f"fuse.{i - 1}.channel.", CHANNEL)
    loaded(node, renamed(case.params, *names))
    every = node([case.inputs[f"x{i}"] for i in range(len(config["channels"]))])
    return {"y": every[-1], **{f"y{i}": y for i, y in enumerate(every)}}


@adapter("attentive-feature-aggregation", "AFADLAUpTrunk.final_feature_fusion (multi-level)")
def multi_level(case: Case) -> dict[str, Tensor]:
    # theirs counts the projections from 1 and from coarse to fine, C2 is the coarsest
    count = len(case.inputs)
    coarser = [case.inputs[f"f{i}"].shape[1] for i in range(count - 1)]
    module = MultiAFA(case.config["C"], coarser)
    names = [(rf"proj_{i + 1}\.", f"projections.{i}.") for i in range(count - 1)]
    names += inside(r"level_sa\.", "spatial.", SPATIAL) + inside(r"level_ca\.", "channel.", CHANNEL)
    loaded(module, renamed(case.params, *names))
    return {"y": module([case.inputs[f"f{i}"] for i in range(count)])}


@adapter("attentive-feature-aggregation", "scale_space_rendering")
def rendering(case: Case) -> dict[str, Tensor]:
    order = sorted(range(len(case.config["scales"])), key=case.config["scales"].__getitem__)
    found = scale_space_rendering(
        [case.inputs[f"pred_{i}"] for i in order], [case.inputs[f"logits_{i}"] for i in order]
    )
    weights = {f"attn_{i}": w.unsqueeze(1) for i, w in zip(order, found.weights.unbind(1), strict=True)}
    return {"y": found.output, **weights}
