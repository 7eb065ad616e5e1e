import torch
from torch import Tensor

from cenote.mix.contextual_position_encoding.scores import CoPE
from tests.golden.cases import Case, adapter


@adapter("contextual-position-encoding", "ContextPosSelfAttn")
def attention(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.config
    # theirs lay items and heads on one axis
    q, k, v = (given[name].unsqueeze(1) for name in ("query", "key", "val"))
    mask = given["attn_mask"].detach().bool().unsqueeze(1)
    # theirs takes the values where both are asked for
    kind = "values" if config.get("cope_val_gates") else "own" if config.get("cope_sep_key") else "keys"
    gate_keys = {"values": v, "own": given.get("key_cope", given["key"]).unsqueeze(1), "keys": None}[kind]
    table = given["pos_emb"]
    positions = config.get("cope_npos") or config["block_size"] + 1
    cope = CoPE(config["head_dim"], positions, kind, scaled_positions=not config.get("cope_nodiv"))
    scores = torch.func.functional_call(cope, {"table": table}, (q, k, mask), {"gate_keys": gate_keys})
    attn = scores.softmax(-1)
    out = attn @ v
    found = {"out": out.squeeze(1), "attn": attn.squeeze(1)}
    wanted = [name for name in given if f"grad.{name}" in case.expected]
    grads = torch.autograd.grad(out.square().sum(), [given[name] for name in wanted])
    return found | {f"grad.{name}": g for name, g in zip(wanted, grads, strict=True)}
