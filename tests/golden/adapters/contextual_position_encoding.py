from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.mix.contextual_position_encoding.scores import CoPE
from cenote.mix.position_scores import RelativeTable
from tests.golden.cases import Case, adapter


def distances_of(table: Tensor, keys: int, extend: bool) -> Tensor:
    """Theirs is `[1, width, distances]`, from the farthest to the token itself; what is farther has 0, unless it extends."""
    near_first = table.reshape(table.shape[-2:]).flip(-1)
    return near_first if extend or table.shape[-1] >= keys else F.pad(near_first, (0, 1))


@adapter("contextual-position-encoding", "ContextPosSelfAttn")
def attention(case: Case) -> dict[str, Tensor]:
    given = {**{name: value.requires_grad_() for name, value in case.params.items()}, **case.inputs}
    config = case.config
    # theirs lay items and heads on one axis
    q, k, v = (given[name].unsqueeze(1) for name in ("query", "key", "val"))
    told = given.get("attn_mask")
    mask = torch.ones(1, *q.shape[1:3], k.shape[2], dtype=torch.bool) if told is None else told.detach().bool()
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    # theirs takes the values where both are asked for
    kind = "values" if config.get("cope_val_gates") else "own" if config.get("cope_sep_key") else "keys"
    gate_keys = {"values": v, "own": given.get("key_cope", given["key"]).unsqueeze(1), "keys": None}[kind]
    parts: dict[str, Tensor] = {}
    relative = None
    if config.get("pos_emb") == "cope+rel":
        (table,) = (value for name, value in given.items() if name.startswith("rel"))
        parts["table"] = distances_of(table, k.shape[2], config.get("extend", config.get("rel_extend", False)))
        relative = parts["table"].shape[-1]
    every = config.get("cope_layers") or 1
    positions: nn.Module
    if every > 1 and (config.get("lay_ind", 0) + 1) % every:
        assert relative is not None
        positions = RelativeTable(config["head_dim"], relative)
        further: dict[str, Any] = {}
    else:
        table = given["pos_emb"]
        positions = CoPE(
            config["head_dim"],
            table.shape[-1],
            kind,
            scaled_positions=not config.get("cope_nodiv"),
            relative=relative,
        )
        parts = {"table": table, **{f"relative.{name}": value for name, value in parts.items()}}
        further = {"gate_keys": gate_keys}
    scores = torch.func.functional_call(positions.to(q.dtype), parts, (q, k, mask), further)
    attn = scores.softmax(-1)
    out = attn @ v
    found = {"out": out.squeeze(1), "attn": attn.squeeze(1)}
    wanted = [name for name in given if f"grad.{name}" in case.expected]
    grads = torch.autograd.grad(out.square().sum(), [given[name] for name in wanted]) if wanted else ()
    return found | {f"grad.{name}": g for name, g in zip(wanted, grads, strict=True)}
