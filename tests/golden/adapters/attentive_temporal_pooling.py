import torch
from torch import Tensor

from cenote.core import PaddedTokens, Tokens
from cenote.pool import AttentiveTemporalPool
from tests.golden.cases import Case, adapter, load_parameters


class LeakyTemporalPool(AttentiveTemporalPool):
    """The authors' padding: a padded frame is read, and weighs `eps` where frames are weighted."""

    paddings: Tensor

    def frame_weights(self, tokens: Tokens) -> Tensor:
        assert isinstance(tokens, PaddedTokens)
        valid = 1 - self.paddings.T.unsqueeze(-1).to(tokens.values)
        if self.scorer is None:
            return valid
        return valid * torch.sigmoid(self.scorer(tokens.values)) + self.eps


@adapter("attentive-temporal-pooling", "CumulativeStatisticsLayer")
def cumulative(case: Case) -> dict[str, Tensor]:
    config = case.config
    x, paddings = case.inputs["features"], case.inputs["paddings"].detach()
    if config["stats_type"] == "PASS_THRU":
        return {"features": x, "features_streamed": x}
    pool = LeakyTemporalPool(
        x.shape[-1],
        statistics=config["stats_type"].lower(),
        weighted=config.get("use_weighted_frames", True),
        eps=config.get("epsilon", 1e-4),
    )
    if pool.scorer is not None:
        load_parameters(pool, {"scorer.0.weight": case.params["W"].T, "scorer.0.bias": case.params["b"]})
    pool.paddings = paddings
    frames = x.transpose(0, 1).double()
    offline = pool.running(frames)
    pieces, state, start = [], None, 0
    for packet in config.get("packets", [len(x)]):
        pool.paddings = paddings[start : start + packet]
        piece, state = pool.step(frames[:, start : start + packet], state)
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
