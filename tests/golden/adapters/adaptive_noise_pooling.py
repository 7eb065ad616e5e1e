from typing import Any

import numpy as np
import torch
from torch import Tensor

from cenote.pool.attention.adaptive_noise_pooling.attenuator import Attenuator
from cenote.pool.attention.adaptive_noise_pooling.knn_centroid import knn_centroid_targets, knn_centroid_vectors
from cenote.pool.attention.adaptive_noise_pooling.pool import AdaptiveNoisePool
from tests.golden.cases import Case, adapter, load_parameters

SLUG = "adaptive-noise-pooling"
POOLING = {"AdaPool": "adaptive", "AvgPool": "mean", "MaxPool": "max", "ClsToken": "cls"}
PARTS = {"attn.Q.": "q.", "attn.KV.": "kv.", "attn.out.": "out."}
LAYER = {
    ".norm_attn.": ".norm1.",
    ".attn.out.": ".attn.proj.",
    ".norm_ff.": ".norm2.",
    ".ff.l_in.": ".mlp.fc1.",
    ".ff.l_out.": ".mlp.fc2.",
}


@adapter(SLUG, "AdaPool")
def ada_pool(case: Case) -> dict[str, Tensor]:
    c = case.config
    pool = AdaptiveNoisePool(c["dim_hidden"], c["num_heads"], c.get("query_idx"), c.get("bias", False))
    load_parameters(pool, case.params, PARTS)
    return {"y": pool(case.inputs["x"])}


@adapter(SLUG, "Attenuator")
def attenuator(case: Case) -> dict[str, Tensor]:
    c = case.config
    pooling = POOLING[c.get("pooling_method", "AdaPool")]
    model = Attenuator(
        c.get("dim_input") or c["dim_hidden"],
        out_dim=c.get("dim_output") or None,
        hidden=c["dim_hidden"],
        pooling=pooling,
        query=c.get("query_idx"),
        layers=c["num_layers"],
        heads=c["num_heads"],
        ff=c["dim_ff"],
        query_embedding=c.get("pos_emb", False),
        project_in=bool(c.get("dim_input")),
        norm_output=c.get("norm_output", False),
        bias_attention=c["bias_attn"],
        bias_ff=c["bias_ff"],
        bias_pool=c.get("bias", False),
        cls_tokens=c.get("k", 1),
        cls_index=c.get("cls_token_idx", 0),
    )
    load_parameters(model, our_parameters(case.params, pooling, c))
    return {"y": model(case.inputs["x"])}


@adapter(SLUG, "knn_centroid.generate_X/generate_y")
def knn_centroid(case: Case) -> dict[str, Tensor]:
    c = case.config
    x = knn_centroid_vectors(c["num_samples"], c["num_vectors"], c["dim_vectors"], c["seed"])
    np.testing.assert_array_equal(x, case.inputs["X"].detach().numpy())
    return {method: torch.from_numpy(knn_centroid_targets(x, method)) for method in c["methods"]}


def our_parameters(params: dict[str, Tensor], pooling: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' names mapped to ours, without the attention that their class token owns and never uses."""
    renamed = {}
    for raw, value in params.items():
        if pooling == "cls" and raw.startswith("pool.attn."):
            continue
        name = raw.replace("transformer.encoder.", "").replace("pool.cls_token", "cls_token")
        name = "head." + name.removeprefix("pool.") if name.startswith("pool.") else name
        if ".attn.KV." in name and name.startswith("layers."):
            continue
        if ".attn.Q." in name and name.startswith("layers."):
            value = torch.cat([value, params[raw.replace(".attn.Q.", ".attn.KV.")]])
            name = name.replace(".attn.Q.", ".attn.qkv.")
        for theirs, ours in (LAYER if name.startswith("layers.") else PARTS).items():
            name = name.replace(theirs, ours)
        # an embedding may have rows for ids that never occur
        renamed[name] = value[:2] if name == "query_emb.weight" else value
    return renamed
