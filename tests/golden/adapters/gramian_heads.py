import torch
from torch import Tensor

from cenote.core import PaddedTokens
from cenote.pool import GramianHeads, divergence_from_mean
from cenote.pool.spatial.gramian_heads.model import gramian
from tests.golden.cases import Case, adapter, load_parameters

LINEAR = {"gram_contraction": "contraction", "gram_embedding": "embedding"}
ATTENTION = {
    "attn.": "",
    "mlp.": "",
    "gamma_": "gamma",
    "norm": "norm",
}
CONVNEXT = {"blocks.0.conv_dw": "conv", "blocks.0.mlp.": "", "blocks.0.": ""}


def renamed(name: str, prefixes: dict[str, str]) -> str:
    theirs = next(p for p in prefixes if name.startswith(p))
    return prefixes[theirs] + name.removeprefix(theirs)


def parameters(case: Case, model: GramianHeads) -> dict[str, Tensor]:
    """Theirs by head; ours has the contractions and embeddings of all heads side by side."""
    ours: dict[str, Tensor] = {}
    wanted = model.state_dict()
    branches = case.config["branches"]
    for theirs, name in LINEAR.items():
        for i, suffix in enumerate(("", "_norm")):
            for part in ("weight", "bias", "running_mean", "running_var"):
                if f"{theirs}.0.{i}.{part}" in case.params:
                    parts = [case.params[f"{theirs}.{m}.{i}.{part}"] for m in range(branches)]
                    ours[f"pool.{name}{suffix}.{part}"] = torch.cat(parts)
        ours[f"pool.{name}_norm.num_batches_tracked"] = torch.tensor(0)
    for full, value in case.params.items():
        kind, _, rest = full.partition(".")
        m, _, name = rest.partition(".")
        if kind == "fc":
            ours[f"classifiers.{m}.{name}"] = value
        if kind == "ga":
            ours[f"pool.blocks.{m}.{renamed(name, ATTENTION)}"] = value
        if kind == "gram_layer":
            ours[f"pool.gram_layers.{m}.{renamed(name, CONVNEXT)}"] = value
    return {k: v.reshape(wanted[k].shape) for k, v in ours.items()}


@adapter("gramian-heads", "GA_ConvNeXt heads (backbone replaced by identity)")
def gramian_heads(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = GramianHeads(
        config["dim"],
        config["num_classes"],
        branches=config["branches"],
        gram_dim=config["gram_dim"],
        groups=config["groups"],
        dim_embed=config["dim_embed"],
        gram_layer=config["gram_layer"],
    )
    load_parameters(model, parameters(case, model))
    x = case.inputs["x"].double()
    logits = model.logits(x)
    tokens = PaddedTokens(x.flatten(2).transpose(1, 2))
    first = model.pool.reduced(tokens)[..., : config["gram_dim"]]
    return {
        "logits": logits.transpose(0, 1).float(),
        "gram0": gramian(tokens, first).float(),
        "kl_to_mean": divergence_from_mean(logits).float(),
    }
