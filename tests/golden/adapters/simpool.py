from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool import SimPool
from tests.golden.cases import Case, adapter, load_parameters


class BatchMinimumSimPool(SimPool):
    """The authors' scope of the minimum: one number for the whole batch."""

    def value_minimum(self, tokens: Tokens, values: Tensor) -> Tensor:
        return values.min().expand(tokens.batch, 1)


@adapter("simpool", "SimPool")
def simpool(case: Case) -> dict[str, Tensor]:
    config = case.config
    pool = BatchMinimumSimPool(
        config["dim"],
        heads=config.get("num_heads", 1),
        gamma=config.get("gamma"),
        beta=config.get("use_beta", False) and config.get("gamma") is not None,
        qkv_bias=config.get("qkv_bias", False),
    )
    params = {k: v for k, v in case.params.items() if k != "beta" or pool.beta is not None}
    # ours always scales by head_width ** -0.5
    scale = config.get("qk_scale") or (pool.dim // pool.heads) ** -0.5
    for name in params.keys() & {"wq.weight", "wq.bias"}:
        params[name] = params[name] * (scale * (pool.dim // pool.heads) ** 0.5)
    load_parameters(pool, params)
    output, weights = pool.attend(case.inputs["x"])
    # with gamma they leave the heads unmerged; they always squeeze
    merged = output if pool.gamma is None else output.unflatten(-1, (pool.heads, -1))
    return {"y": merged.squeeze(), "attn": weights.unsqueeze(2)}
