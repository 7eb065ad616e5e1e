import torch
from torch import Tensor, nn

from cenote.core import as_tokens
from cenote.pool import MIDAM, MIDAMAttentionLoss, MIDAMLoss, MIDAMSmoothedMax, MIDAMSmoothedMaxLoss
from cenote.pool.bags.midam.scorers import statistic
from tests.golden.cases import Case, adapter


@adapter("midam", "MIDAMLoss + MIDAM")
def midam(case: Case) -> dict[str, Tensor]:
    config = case.config
    weight = case.params["weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict(case.params)
    linear.double()
    model = MIDAMSmoothedMax(linear, config.get("tau", 0.1))
    shared = {"margin": config["margin"], "gamma": config["gamma"], "init": "authors"}
    loss: MIDAMLoss
    if config["mode"] == "softmax":
        loss = MIDAMSmoothedMaxLoss(config["data_len"], config["tau"], **shared)
    else:
        loss = MIDAMAttentionLoss(config["data_len"], **shared)
    loss.double()
    optimizer = MIDAM(
        linear.parameters(),
        loss,
        config["lr"],
        config["momentum"],
        config["weight_decay"],
    )
    seen: dict[str, list[Tensor]] = {"loss": [], "a": [], "b": [], "alpha": []}
    steps = zip(case.inputs["X"].double(), case.inputs["Y"], case.inputs["index"], strict=True)
    for x, y, index in steps:
        x = x.detach()
        sampled = model.sampled(x) if config["mode"] == "softmax" else statistic(as_tokens(linear(x)))
        value = loss(sampled, y, index)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        for name, now in zip(seen, (value, loss.a, loss.b, loss.alpha), strict=True):
            seen[name].append(now.detach().clone())
    out = {name: torch.stack(values).float() for name, values in seen.items()}
    if isinstance(loss, MIDAMSmoothedMaxLoss):
        out["s"] = loss.log_s.exp().unsqueeze(1).float()
    elif isinstance(loss, MIDAMAttentionLoss):
        out["sd"] = loss.log_mass.exp().unsqueeze(1).float()
        out["sn"] = (loss.score * loss.log_mass.exp()).unsqueeze(1).float()
    return out | {"final_weight": linear.weight.detach().float(), "final_bias": linear.bias.detach().float()}
