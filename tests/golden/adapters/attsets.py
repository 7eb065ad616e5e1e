from torch import Tensor

from cenote.pool.attention.attsets.pool import AttSets
from tests.golden.cases import Case, adapter, load_parameters


@adapter("attsets", "attsets_fc")
def attsets_fc(case: Case) -> dict[str, Tensor]:
    x = case.inputs["x"]
    pool = AttSets(x.shape[-1], outputs=case.config["out_ele_num"])
    load_parameters(pool, {"score.weight": case.params["w"].T, "score.bias": case.params["b"]})
    return {"y": pool(x), "weights": pool.channel_weights(x)}
