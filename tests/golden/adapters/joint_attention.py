import re

import torch
from torch import Tensor, nn

from cenote.pool.attention.joint_attention.fusion import JointAttentionFusion
from cenote.pool.attention.joint_attention.model import JointAttention
from tests.golden.cases import Case, adapter


@adapter("joint-attention", "JointAttentionEstimatorTransformerDualOnlyPeople")
def people(case: Case) -> dict[str, Tensor]:
    c, given = case.config, case.inputs
    x, gaze = given["people"], given["gaze"]
    model = JointAttention(
        actions=x.shape[-1] - 2,
        width=c["people_feat_dim"],
        layers=c["enc_num"],
        heads=c["heads"],
        embedding="mlp" if c.get("head_embedding", "mlp") == "mlp" else "linear",
        depth=c.get("estimator", "field_middle").removeprefix("field_"),
        aggregation=c.get("aggregation", "token_only"),
        people=x.shape[1],
        sigmoid=c.get("loss", "mse") == "bce",
    ).eval()
    in_order(model.group.embedding, case.params, "head_info_feat_embeding.")
    field = model.field if model.joined_field is None else model.joined_field
    in_order(field, case.params, "person_person_attention_heatmap.")
    rest = {
        "joint_token": case.params["ja_embedding"].flatten(),
        "norm.weight": case.params["trans_layer_norm_people_people.weight"],
        "norm.bias": case.params["trans_layer_norm_people_people.bias"],
    }
    for name, value in case.params.items():
        for theirs, ours in (
            (r"people_people_self_attention\.(\d+)\.in_proj_(\w+)", r"layers.\1.in_proj.\2"),
            (r"people_people_self_attention\.(\d+)\.out_proj\.(\w+)", r"layers.\1.out_proj.\2"),
            (r"people_people_fc\.(\d+)\.0\.(\w+)", r"layers.\1.fc1.\2"),
            (r"people_people_fc\.(\d+)\.2\.(\w+)", r"layers.\1.fc2.\2"),
        ):
            if re.fullmatch(theirs, name):
                rest[re.sub(theirs, ours, name)] = value
    missing, unexpected = model.group.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(name.startswith("embedding.") for name in missing)
    mask = x.detach().sum(-1) != 0
    # their tokens of padded people keep the gaze; nobody attends to them, but they have maps of their own
    encoded = model.group._encoded(torch.cat([x[..., :2], gaze, x[..., 2:]], -1), mask)
    maps = model.paint(encoded, mask, (c["H"], c["W"]))
    return {
        "joint_heatmap": maps.joint,
        "person_heatmap": model._painted(model.field, encoded.people, (c["H"], c["W"])),
        "attention": maps.attention,
    }


@adapter("joint-attention", "JointAttentionFusion")
def fusion(case: Case) -> dict[str, Tensor]:
    c = case.config
    model = JointAttentionFusion(c.get("fusion_net_type", "mid"), sigmoid=c.get("loss", "mse") == "bce").eval()
    for module, prefix in (
        ("people", "person_person_preconv."),
        ("scene", "person_scene_preconv."),
        ("final", "final_joint_atention_heatmap."),
    ):
        if hasattr(model, module):
            in_order(getattr(model, module), case.params, prefix)
    return {"final": model(case.inputs["p_p"], case.inputs["p_s"])}


def in_order(module: nn.Module, params: dict[str, Tensor], prefix: str) -> None:
    """Load their layers, whatever their numbers, into ours in the order in which they run."""
    theirs = [(name.removeprefix(prefix), value) for name, value in params.items() if name.startswith(prefix)]
    theirs.sort(key=lambda item: ([int(n) for n in re.findall(r"\d+", item[0])], "bias" in item[0]))
    ours = list(module.parameters())
    assert len(ours) == len(theirs)
    with torch.no_grad():
        for p, (_, value) in zip(ours, theirs, strict=True):
            p.copy_(value.view_as(p))
