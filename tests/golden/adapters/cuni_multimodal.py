from __future__ import annotations

from torch import Tensor

from cenote.pool import FlatMemories, HierarchicalMemories, ParallelMemories, SerialMemories
from tests.golden.cases import Case, adapter, load_parameters

SLUG = "cuni-multimodal"
OURS = {"query_proj": "to_q", "keys_proj": "to_k", "vals_proj": "to_v", "output_proj": "to_out"}


@adapter(SLUG, "serial")
def serial(case: Case) -> dict[str, Tensor]:
    return run(case, SerialMemories)


@adapter(SLUG, "parallel")
def parallel(case: Case) -> dict[str, Tensor]:
    return run(case, ParallelMemories)


@adapter(SLUG, "flat")
def flat(case: Case) -> dict[str, Tensor]:
    return run(case, FlatMemories)


@adapter(SLUG, "hierarchical")
def hierarchical(case: Case) -> dict[str, Tensor]:
    return run(case, HierarchicalMemories, **hierarchical_heads(case))


def run(case: Case, layer: type, **settings: int) -> dict[str, Tensor]:
    c, i = case.config, case.inputs
    names = [k.removesuffix("_states") for k in ("text_states", "image_states") if k in i]
    module = layer(
        c["dim"],
        memories=len(names),
        heads=c["n_heads"],
        bias=c.get("use_att_transform_bias", False),
        eps=c.get("layer_norm_eps", 1e-6),
        **settings,
    )
    params = {ours(name): value.T if name.endswith("kernel") else value for name, value in case.params.items()}
    load_parameters(module, params)
    masks = [i[f"{n}_mask"].bool() if f"{n}_mask" in i else None for n in names]
    return {"y": module(i["queries"], [i[f"{n}_states"] for n in names], masks)}


def hierarchical_heads(case: Case) -> dict[str, int]:
    given = case.config.get("n_heads_hier", case.config.get("heads_hier"))
    if given is None and not any(name.startswith("enc_hier/") for name in case.params):
        given = 1  # the second attention has no parameters
    return {} if given is None else {"hierarchical_heads": given}


def ours(name: str) -> str:
    """`enc_0/keys_proj/kernel` is `attentions.0.to_k.weight`, `enc_0/LayerNorm/gamma` is `norms.0.weight`."""
    *scope, part, kind = name.split("/")
    kind = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}[kind]
    index = scope[0].removeprefix("enc_") if scope and scope[0].startswith("enc_") else ""
    if part == "LayerNorm":
        return f"norms.{index}.{kind}" if index.isdigit() else f"norm.{kind}"
    where = f"attentions.{index}" if index.isdigit() else "choice" if index == "hier" else "joint_attention"
    return f"{where}.{OURS[part]}.{kind}"
