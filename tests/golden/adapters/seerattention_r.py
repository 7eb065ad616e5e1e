import re

import torch
from torch import Tensor

from cenote.core.rotary import angles
from cenote.mix.seerattention_r.gate import CompressedKeys, GroupGate, select
from tests.golden.cases import Case, adapter

NAMES = {
    "attngate_linear_q.weight": "query_maps",
    "attngate_linear_k.weight": "key_maps",
    "attngate_qnorm.weight": "query_norm.weight",
    "attngate_knorm.weight": "key_norm.weight",
}


def gate_of(case: Case) -> GroupGate:
    keys, query = case.cls.split("+")
    config = case.config
    gate = GroupGate(
        config["model_hidden_size"],
        config["num_q_head"],
        config["num_k_head"],
        config["block_size"],
        config["gate_hidden_size"],
        query.removeprefix("Q"),
        re.findall("max|min|avg", keys),
        norm=config["use_qk_norm"],
    )
    gate.load_state_dict({NAMES[name]: value for name, value in case.params.items()})
    return gate


@torch.no_grad()
def decoded(case: Case) -> dict[str, Tensor]:
    """Token by token behind a prompt, blocks that decoding fills at their last position, as in the authors' code."""
    config, gate = case.config, gate_of(case)
    q, k = (case.inputs[name].transpose(1, 2) for name in ("q_nope", "k_nope"))
    at = angles(torch.arange(q.shape[2])[None], config["gate_hidden_size"], config["rope_base"])
    blocks = -(-q.shape[2] // config["block_size"])
    how = (
        {"budget": config["block_budget"]}
        if config["sparsity_method"] == "token_budget"
        else {"threshold": config.get("threshold", config.get("sparsity_threshold"))}
    )
    cache = CompressedKeys(gate, "end")
    start = config["prefill_len"]
    cache.append(k[:, :, :start], at.at(torch.arange(start)[None]))
    masks, caches = [], []
    for step in range(start, q.shape[2]):
        here = at.at(torch.tensor([[step]]))
        cache.append(k[:, :, step : step + 1], here)
        scores = gate.scores(gate.queries(q[:, :, step : step + 1], here), cache.keys)
        missing = blocks - cache.keys.shape[2]
        kept = select(scores, **how)[:, :, 0].to(torch.uint8)
        masks.append(torch.nn.functional.pad(kept, (0, missing), value=2))
        caches.append(torch.nn.functional.pad(cache.keys, (0, 0, 0, missing)).transpose(1, 2))
    return {"block_mask": torch.stack(masks), "k_compressed": torch.stack(caches)}


for keys in ("max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg"):
    for query in ("proj", "avgproj", "avg", "orig"):
        adapter("seerattention-r", f"K{keys}+Q{query}")(decoded)
