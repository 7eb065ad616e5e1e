import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.mix.deconstructing_attention.indicators import indicators
from cenote.mix.deconstructing_attention.running import running_softmax, taylor_joint, taylor_literal, token_scores
from tests.golden.cases import Case, adapter


@adapter("deconstructing-attention", "equations 7, 8, 6 and appendix recurrence; indicators of section 4.4")
def forms(case: Case) -> dict[str, Tensor]:
    q, k, v = (case.inputs[name] for name in ("q_pre", "k", "v"))
    running, _ = running_softmax(token_scores(F.silu(q), k), v)
    grads = torch.autograd.grad(running.square().sum(), (q, k, v), retain_graph=True)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    maps = ((q @ k.mT) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    distances = list(case.config.get("locfoc_distances", range(4)))
    found = indicators(maps, max(distances) + 1)
    return {
        "out_nonapprox": running,
        **{f"grad.{name}": g for name, g in zip(("q", "k", "v"), grads, strict=True)},
        "out_taylor_joint": taylor_joint(q, k, v)[0],
        "out_taylor_literal": taylor_literal(q, k, v)[0],
        "attn": maps,
        "entropy": found.entropy,
        "concentration": found.concentration,
        "head_diversity": found.head_diversity,
        "sink": found.sink,
        "locfoc": found.local_focus[..., distances],
    }
