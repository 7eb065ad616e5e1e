import torch
from torch import Tensor

from cenote.mix.moba.attention import moba_attention_packed
from tests.golden.cases import Case, adapter


@adapter("moba", "moba_attn_varlen_naive")
def packed(case: Case) -> dict[str, Tensor]:
    q, k, v = (case.inputs[name] for name in "qkv")
    block, top = case.config["moba_chunk_size"], case.config["moba_topk"]
    out = moba_attention_packed(q, k, v, case.inputs["cu_seqlens"], block, top)
    found = {"out": out}
    if "grad_out" in case.inputs:
        grads = torch.autograd.grad((out * case.inputs["grad_out"].detach()).sum(), [q, k, v])
        found |= {f"grad.{name}": grad for name, grad in zip("qkv", grads, strict=True)}
    return found
