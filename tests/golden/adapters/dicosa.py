from torch import Tensor

from cenote.pool.attention.dicosa.similarity import DiCoSA
from tests.golden.cases import Case, adapter, load_parameters


@adapter("dicosa", "DiCoSA.similarity")
def similarity(case: Case) -> dict[str, Tensor]:
    c, given = case.config, case.inputs
    text, frames = given["cls"], given["video_feat"]
    head = DiCoSA(
        text.shape[-1],
        c["center"],
        c["temp"],
        c.get("alpha", 0.01),
        c.get("beta", 0.005),
        normaliser=c.get("n_words"),
        renormalise=False,
    )
    state = {name: value for name, value in head.state_dict().items() if not name.startswith("weight_fc.")}
    load_parameters(head, state | {f"weight_fc.{name}": value for name, value in case.params.items()})
    head.to(text.dtype)
    mask = given["video_mask"] > 0
    outputs = {"sim_t2v": head(text, frames, mask)}
    if "sim_v2t" in case.expected:
        outputs["sim_v2t"] = outputs["sim_t2v"].T
    if "d_loss" in case.expected:
        outputs["d_loss"] = head.losses(text, frames, mask).decoupling
    return outputs
