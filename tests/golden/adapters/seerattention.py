import re

import torch
from torch import Tensor

from cenote.core.rotary import Angles, angles, rotated
from cenote.mix.blocks import pooled_target
from cenote.mix.seerattention.gate import BlockGate, above, top_share
from tests.golden.cases import ADAPTERS, Case, adapter

POOLS = ("max", "min", "avg")


def pools(text: str) -> list[str]:
    return re.findall("|".join(POOLS), text)


def gate_of(case: Case) -> BlockGate:
    queries, keys = case.cls.split("_")
    config = case.config
    double = "mask_linear_q.weight" in case.params
    gate = BlockGate(
        config["in_channel_size"],
        config["num_q_head"],
        config["num_k_head"],
        config["block_size"],
        config["hidden_size"],
        pools(queries),
        pools(keys),
        force_double=double,
    )
    assert gate.two_maps == double
    names = {"mask_linear_k.weight": "key_maps", "mask_linear_q.weight": "query_maps"}
    gate.load_state_dict({names[name]: value for name, value in case.params.items()})
    return gate


def gated(case: Case) -> dict[str, Tensor]:
    q, k = (case.inputs[name].transpose(1, 2) for name in ("q_nope", "k_nope"))
    logits = gate_of(case)(q, k, Angles(case.inputs["block_cos"], case.inputs["block_sin"]))
    options = {"keep_diagonal": False, "last_dense": case.config["last_block_dense"]}
    by = angles(torch.arange(q.shape[2])[None], q.shape[3])
    return {
        "gate_logits": logits,
        "gate_prob": logits.softmax(-1),
        "mask_threshold": above(logits, case.config["threshold"], **options).to(torch.uint8),
        "mask_nz": top_share(logits, case.config["nz_ratio"], **options).to(torch.uint8),
        "target": pooled_target(rotated(q, by), rotated(k, by), case.config["block_size"]),
    }


def _every_class() -> list[str]:
    chosen = ["max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg"]
    return [f"Q{q}_K{k}" for q in chosen for k in chosen]


for name in _every_class():
    adapter("seerattention", name)(gated)

assert ("seerattention", "Qavg_Kmaxminavg") in ADAPTERS
