import torch
from torch import Tensor

from cenote.core import PaddedTokens
from cenote.pool import StaV2aOnsets, StaV2aPrompt, window_mean
from tests.golden.cases import Case, adapter, load_parameters

PROMPT = {
    "fga.un_models.0.embed.": "attention.unary.",
    "fga.un_models.0.feature_reduce.": "attention.unary_score.",
    "fga.pp_models.0.embed_X.": "attention.first.",
    "fga.pp_models.0.embed_Y.": "attention.second.",
}
ONSETS = {f"trans.fc{i + 1}.": f"mlp.{2 * i}." for i in range(4)} | {"onset.l1.": "feature.", "onset.l2.": "onset."}


@adapter("sta-v2a", "GlobalVideoFeature (fga.atten.Atten inside, width reduced)")
def prompt(case: Case) -> dict[str, Tensor]:
    config, params = case.config, dict(case.params)
    pool = StaV2aPrompt(config["input_size"], config["width"], config["n_tokens"])
    params["attention.reduce"] = params.pop("fga.reduce_potentials.0.weight").flatten()
    # their maps of frames are convolutions of one frame
    params = {k: v.squeeze(-1) if k.startswith("fga.") and v.dim() == 3 else v for k, v in params.items()}
    load_parameters(pool, params, PROMPT)
    video = case.inputs["video"].double()
    tokens = PaddedTokens(pool.fc(video))
    outputs = {"tokens": pool(video), "pooled": pool.attention.pool(tokens).output}
    if config["n_tokens"] == 1:
        outputs["tokens"] = outputs["tokens"].unsqueeze(1)
    return {k: v.to(case.inputs["video"].dtype) for k, v in outputs.items()}


@adapter("sta-v2a", "TransVideoFeature + PreOnSet_by_MultiScaleFeature")
def onsets(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = StaV2aOnsets(
        config["input_size"],
        config["hidden_size"],
        config["output_size"],
        config["windows"],
        condition=case.params["onset.l1.weight"].shape[0],
        latent_frames=config["latent_frames"],
    )
    load_parameters(model, case.params, ONSETS)
    video = case.inputs["video"].double()
    z = model.mlp(video)
    features, logits = model(video)
    outputs = {"frame_feat": z} | {f"win{w}": window_mean(z, w) for w in config["windows"]}
    outputs |= {"onset_logits": logits, "cond_feat": features}
    if "selected_rows" in case.expected:
        outputs["cond_feat_selected_rows"] = features[:, case.expected["selected_rows"]]
    outputs = {k: v.to(case.inputs["video"].dtype) for k, v in outputs.items()}
    return outputs | {"selected_rows": case.expected.get("selected_rows", torch.zeros(0, dtype=torch.int64))}
