from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.mix.deconstructing_attention.indicators import indicators
from cenote.mix.deconstructing_attention.running import (
    Moments,
    expansion,
    running_softmax,
    taylor_joint,
    taylor_literal,
    token_scores,
)
from tests.golden.cases import Case, adapter


def over_all(q: Tensor, features: Callable[[Tensor], Tensor], state: Moments) -> Tensor:
    """What each query reads where it may read every token: from the sums behind the last."""
    asked = features(q)
    return asked @ state.values / (asked @ state.keys.unsqueeze(-1))


@adapter("deconstructing-attention", "equations 7, 8, 6 and appendix recurrence; indicators of section 4.4")
def forms(case: Case) -> dict[str, Tensor]:
    q, k, v = (case.inputs[name] for name in ("q_pre", "k", "v"))
    running, state = running_softmax(token_scores(F.silu(q), k), v)
    joint, moments = taylor_joint(q, k, v)
    literal, orders = taylor_literal(q, k, v)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    if case.config.get("causal", True):
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    else:
        running = state.mean.unsqueeze(2).expand_as(v)
        joint = over_all(q, expansion, moments)
        powers = (lambda x: torch.ones_like(x[..., :1]), lambda x: x, torch.square)
        literal = sum((over_all(q, f, m) for f, m in zip(powers, orders, strict=True)), torch.zeros_like(v))
    grads = torch.autograd.grad(running.square().sum(), (q, k, v), retain_graph=True)
    maps = scores.softmax(-1)
    distances = list(case.config.get("locfoc_distances", range(4)))
    population = case.config.get("std", "population") in ("population", "biased", 0)
    found = indicators(maps, max(distances) + 1, population=population)
    return {
        "out_nonapprox": running,
        **{f"grad.{name}": g for name, g in zip(("q", "k", "v"), grads, strict=True)},
        "out_taylor_joint": joint,
        "out_taylor_literal": literal,
        "attn": maps,
        "entropy": found.entropy,
        "concentration": found.concentration,
        "head_diversity": found.head_diversity,
        "sink": found.sink,
        "locfoc": found.local_focus[..., distances],
    }
