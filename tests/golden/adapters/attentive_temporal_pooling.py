import torch
from torch import Tensor

from cenote.pool import AttentiveTemporalPool
from tests.golden.cases import Case, adapter, load_parameters


@adapter("attentive-temporal-pooling", "CumulativeStatisticsLayer")
def cumulative(case: Case) -> dict[str, Tensor]:
    config = case.config
    x, paddings = case.inputs["features"], case.inputs["paddings"].detach()
    if config["stats_type"] == "PASS_THRU":
        return {"features": x, "features_streamed": x}
    pool = AttentiveTemporalPool(
        x.shape[-1],
        statistics=config["stats_type"].lower(),
        weighted=config.get("use_weighted_frames", True),
        eps=config.get("epsilon", 1e-4),
    )
    if pool.scorer is not None:
        load_parameters(pool, {"scorer.0.weight": case.params["W"].T, "scorer.0.bias": case.params["b"]})
    frames, mask = x.transpose(0, 1).double(), paddings.T == 0
    offline = pool.running(frames, mask, count_padding=True)
    pieces, state, start = [], None, 0
    for packet in config.get("packets", [len(x)]):
        here = slice(start, start + packet)
        piece, state = pool.step(frames[:, here], state, mask[:, here], count_padding=True)
        pieces.append(piece)
        start += packet
    outputs = {
        "features": offline.transpose(0, 1),
        "features_streamed": torch.cat(pieces, 1).transpose(0, 1),
        "state_count": state.sum_w.squeeze(-1),
        "state_sum_x": state.sum_x,
    }
    if state.sum_xx is not None:
        outputs["state_sum_xx"] = state.sum_xx
    return {k: v.to(x.dtype) for k, v in outputs.items()}
