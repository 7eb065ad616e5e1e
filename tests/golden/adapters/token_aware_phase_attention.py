import torch
from torch import Tensor

from cenote.mix.normalisers import softmax
from cenote.mix.token_aware_phase_attention.scores import TAPA
from tests.golden.cases import Case, adapter


@adapter("token-aware-phase-attention", "equation 12")
def equation_12(case: Case) -> dict[str, Tensor]:
    q, k, v = (case.inputs[name] for name in "qkv")
    tapa = TAPA(case.config["theta"], case.config["alpha"])
    if "amplitude_dims" in case.config:
        assert tapa.split(q.shape[-1]) == case.config["amplitude_dims"]
    mask = None
    if case.config["causal"]:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
    scores = tapa(q, k, mask)
    out = softmax(scores) @ v
    wanted = [name for name in case.inputs if f"grad.{name}" in case.expected]
    grads = torch.autograd.grad(out.square().sum(), [case.inputs[name] for name in wanted], retain_graph=True)
    # theirs shows scores before the mask or behind it
    shown = scores if not torch.isfinite(case.expected["scores"]).all() else tapa(q, k)
    return {"out": out, "scores": shown} | {f"grad.{n}": g for n, g in zip(wanted, grads, strict=True)}
