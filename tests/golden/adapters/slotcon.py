import torch
from torch import Tensor, nn

from cenote.pool.attention.slotcon.grouping import Grouped, SemanticGrouping
from cenote.pool.attention.slotcon.model import SlotCon
from tests.golden.cases import Case, adapter, load_parameters


@adapter("slotcon", "SemanticGrouping")
def semantic_grouping(case: Case) -> dict[str, Tensor]:
    c = case.config
    settings = {name: c[name] for name in ("temp", "eps") if name in c}
    grouping = SemanticGrouping(c["dim_slot"], c["num_slots"], **settings)
    load_parameters(grouping, {"slot_embed": case.params["slot_embed.weight"]})
    return grouping.group(case.inputs["x"])._asdict()


@adapter("slotcon", "SlotCon.self_distill / ctr_loss_filtered / update_center")
def losses(case: Case) -> dict[str, Tensor]:
    c, given = case.config, case.inputs
    hidden, dim = case.params["predictor_slot.mlp.0.weight"].shape
    slots = given["slot_q"].shape[1]
    names = ("student_temp", "teacher_temp", "tau", "center_momentum")
    model = SlotCon(nn.Identity(), dim, slots, dim, hidden, **{name: c[name] for name in names}).double().eval()
    load_parameters(model.predictor, case.params, {"predictor_slot.mlp.": ""})
    model.center.copy_(given["center"].detach())
    group = model.group_loss(given["score_q"], given["score_k"])
    slot = model.slot_loss(Grouped(given["slot_q"], given["score_q"]), Grouped(given["slot_k"], given["score_k"]))
    model.update_center(torch.cat([given["score_k"], given["score_q"]]))
    return {"loss_group": group.view(1), "loss_slot": slot.view(1), "center_after": model.center}
