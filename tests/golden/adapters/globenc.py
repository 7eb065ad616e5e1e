import torch
from torch import Tensor

from cenote.explain.globenc.explainer import GlobEnc
from cenote.explain.globenc.norms import product
from tests import tiny
from tests.golden.cases import Case, adapter


@adapter("globenc", "modeling_bert.BertEmbeddings + BertEncoder (output_globenc / output_norms)")
@torch.no_grad()
def bert(case: Case) -> dict[str, Tensor]:
    library = tiny.transformers()
    model = library.BertModel(library.BertConfig(**case.config), add_pooling_layer=False).eval()
    missing, unexpected = model.load_state_dict(case.params, strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    inputs = {"input_ids": case.inputs["input_ids"], "attention_mask": case.inputs["attention_mask"].detach()}
    states = model(**inputs, output_hidden_states=True).hidden_states
    explainer = GlobEnc()
    # theirs keep rows of padding in a layer's norms, and zero them in the product
    kept = explainer.matrices(model, inputs, padding=True)
    outputs = {"embedding_output": states[0], "last_hidden_state": states[-1]}
    outputs["globenc"] = product(explainer.matrices(model, inputs)["n_enc"])
    for layer in range(len(states) - 1):
        for ours in ("head_n", "n", "n_res", "n_resln", "n_enc"):
            outputs[f"layer{layer}.{ours}"] = kept[ours][:, layer]
        for ours in ("n", "n_res", "n_resln", "n_enc"):
            outputs[f"layer{layer}.ratio_{ours.removeprefix('n_')}"] = kept[f"ratio_{ours}"][:, layer]
    return outputs
