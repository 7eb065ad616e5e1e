from torch import Tensor

from cenote.mix.probabilistic_attention.layer import ProbabilisticAttention
from tests.golden.cases import Case, adapter

NAMES = {
    "pi": "priors",
    "v_init": "v_init",
    "v_fixed": "v_fixed",
    "zeta_prior_precision": "key_precision",
    "mu_prior_precision": "value_precision",
    "q_pos_emb": "q_pos",
    "zeta_pos_emb": "key_pos",
    "v_pos_emb": "v_pos",
    "q_pos": "q_pos",
    "zeta_pos": "key_pos",
    "v_pos": "v_pos",
}


@adapter("probabilistic-attention", "ProbabilisticAttention")
def layer(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.config
    attention = ProbabilisticAttention(
        magnitude_priors=config.get("magnitude_priors", False),
        key_steps=config.get("key_adaptation_iters", 0) if config.get("key_adaptation") else 0,
        value_steps=config.get("value_belief_propagation_iters", 0),
    )
    settings = {ours: given[theirs] for theirs, ours in NAMES.items() if theirs in given}
    masks = [given[name] for name in ("nonzero_wts_mask", "mask") if name in given]
    if masks:
        settings["mask"] = masks[0].detach().bool()
    return {"v": attention(given["q"], given["zeta"], given["mu"], given["alpha"], given["beta"], **settings)}
