import torch
from torch import Tensor

from cenote.pool import IMLPAttention, MLPAttention, YangAttention, ZhouAttention
from tests.golden.cases import Case, adapter, load_parameters

SLUG = "sentiment-attitudes"


@adapter(SLUG, "attention_by_peng_zhou")
def zhou(case: Case) -> dict[str, Tensor]:
    h = case.inputs["h"]
    pool = load_parameters(ZhouAttention(h.shape[-1]), {"u": case.params["u_omega"].unsqueeze(0)})
    y, weights = pool.attend(h)
    return {"y": y, "alpha": weights.squeeze(1)}


@adapter(SLUG, "attention_by_z_yang")
def yang(case: Case) -> dict[str, Tensor]:
    h, p = case.inputs["h"], case.params
    pool = YangAttention(h.shape[-1], case.config.get("attention_size", 100))
    named = {"u": p["u_omega"].unsqueeze(0), "map.weight": p["w_omega"].T, "map.bias": p["b_omega"]}
    y, weights = load_parameters(pool, named).attend(h)
    return {"y": y, "alpha": weights.squeeze(1)}


@adapter(SLUG, "MLPAttention")
def mlp(case: Case) -> dict[str, Tensor]:
    x, keys = terms(case), case.inputs["keys"]
    pool = MLPAttention(x.shape[-1], keys.shape[1], case.config["hidden_size"])
    y, weights = load_parameters(pool, scores(case)).attend(x, keys)
    return {"y": y, "alpha": weights}


@adapter(SLUG, "InteractiveMLPAttention")
def imlp(case: Case) -> dict[str, Tensor]:
    x = terms(case)
    pool = IMLPAttention(x.shape[-1], case.config["hidden_size"])
    y, weights = load_parameters(pool, scores(case)).attend(x, case.inputs["keys"])
    return {"y": y, "alpha": weights.squeeze(1)}


def terms(case: Case) -> Tensor:
    """Their term vectors: the embedding of the word, then that of its position."""
    p, i = case.params, case.inputs
    return torch.cat([p["emb.t"][i["ids"]], p["emb.p"][i["pos_ids"]]], -1)


def scores(case: Case) -> dict[str, Tensor]:
    p = case.params
    return {
        "map.weight": p["H_W_we"].T,
        "map.bias": p["H_b_we"],
        "score.weight": p["H_W_a"].T,
        "score.bias": p["H_b_a"],
    }
