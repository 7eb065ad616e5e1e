from torch import Tensor

from cenote.mix.sinklora.attention import Groups, grouped_attention
from tests.golden.cases import Case, adapter


@adapter("sinklora", "forward_noflashattn (S2-Attn)")
def shifted(case: Case) -> dict[str, Tensor]:
    x, config = case.inputs["x"], case.config
    heads, width = config["num_heads"], config["head_dim"]

    def projected(name: str, heads: int) -> Tensor:
        return (x @ case.params[f"{name}_proj.weight"].T).unflatten(-1, (heads, width)).transpose(1, 2)

    kv_heads = config.get("num_key_value_heads", heads)
    q, k, v = projected("q", heads), projected("k", kv_heads), projected("v", kv_heads)
    y = grouped_attention(q, k, v, Groups.shifted(ratio=config["group_size_ratio"]))
    return {"out": y.transpose(1, 2).flatten(2) @ case.params["o_proj.weight"].T}
