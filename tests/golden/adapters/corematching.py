import torch
from torch import Tensor, nn

from cenote.reduce.corematching.matching import above_elbow, matching, token_neurons
from tests.golden.cases import Case, adapter

ACTIVATIONS = {"silu": nn.functional.silu, "relu": nn.functional.relu, "gelu": nn.functional.gelu}


@adapter("corematching", "transformers.models.llama.modeling_llama.LlamaMLP (patched in the release)")
def released(case: Case) -> dict[str, Tensor]:
    """The score of the release: overlap with one token of the prompt; strictly above the elbow."""
    x = case.inputs["x_f16"].float()
    act = ACTIVATIONS[case.config["act"]]
    neurons = act(x @ case.params["gate_proj.weight"].T) * (x @ case.params["up_proj.weight"].T)
    start, end = case.config["image_span"]
    scores = matching(neurons, token_neurons(neurons, case.config["query_row"]))[:, start:end]
    kept = torch.ones(x.shape[1], dtype=torch.bool)
    kept[start:end] = above_elbow(scores, strict=True)[0]
    return {"kept_mask": kept, "overlap_row": scores[0].float()}
