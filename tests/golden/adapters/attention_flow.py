from torch import Tensor

from cenote.explain.attention_flow.matrices import augmented, max_flow, rollout
from tests.golden.cases import Case, adapter


@adapter("attention-flow", "attention_graph_util.compute_joint_attention / get_adjmat / compute_flows")
def flows(case: Case) -> dict[str, Tensor]:
    attention = case.inputs["attention"]
    residual = 0.5 if case.config["add_residual"] else 0.0
    return {
        "augmented": augmented(attention, residual) if residual else attention,
        "rollout": rollout(attention, residual),
        "rollout_no_residual": rollout(attention, 0.0),
        "flow": max_flow(attention, residual),
    }
