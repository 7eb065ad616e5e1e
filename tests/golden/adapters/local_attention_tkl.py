import torch
from torch import Tensor

from cenote.mix.local_attention_tkl.model import TKL
from tests.golden.cases import Case, adapter

NAMES = {
    "contextualizer.": "reader.encoder.",
    "mixer": "reader.mixer",
    "saturation_linear.": "saturated.factor.",
    "saturation_linear2.": "saturated.root.",
    "saturation_linear3.": "saturated.offset.",
    "sat_normer.": "saturated.norm.",
    "sat_emb_reduce1.": "saturated.reduce.",
    "dense.": "saturated.dense.",
}


@adapter("local-attention-tkl", "matchmaker.models.published.sigir20_tkl.TKL_sigir20")
def tkl(case: Case) -> dict[str, Tensor]:
    config, own = case.config, case.params
    tables = {name: own[f"positional_features_{name}"][0] for name in "qd" if f"positional_features_{name}" in own}
    model = TKL(
        config["_embsize"],
        heads=config["att_heads"],
        layers=config["att_layer"],
        hidden=config["att_ff_dim"],
        means=config["kernels_mu"],
        deviations=config["kernels_sigma"],
        chunk=config["chunk_size"],
        overlap=config["overlap"],
        window=config["sliding_window_size"],
        regions=config["top_k_chunks"],
        saturation=config["saturation_type"],
        positions=config["use_pos_encoding"],
        apart=config["use_diff_posencoding"],
        queries=len(tables.get("q", [0])),
        documents=len(tables.get("d", [0])),
        published=True,
    )
    state = {}
    for name, value in own.items():
        ours = next((o + name.removeprefix(t) for t, o in NAMES.items() if name.startswith(t)), None)
        if ours is not None:
            state[ours] = value
    state |= {
        "saturated.means": own["mu"].flatten(),
        "saturated.deviations": own["sigma"].flatten(),
        "top.weights": own["chunk_scoring"].flatten(),
    }
    if config["use_pos_encoding"]:
        state |= {"reader.query_positions": tables["q"], "reader.document_positions": tables["d"]}
    if "kernel_mult" in own and config["saturation_type"] == "log":
        state["saturated.gain"] = own["kernel_mult"].flatten()
    model = model.to(case.inputs["doc"].dtype).eval()
    model.load_state_dict(state)
    query, document = case.inputs["query"], case.inputs["doc"]
    found = model.scored(query, document, *(case.inputs[f"{name}_mask"].detach() > 0 for name in ("query", "doc")))
    gradients = torch.autograd.grad(found.score.sum(), [query, document])
    return {
        "score": found.score,
        "window_scores": found.regions.windows,
        "top_idx": found.regions.tops,
        "top_values": found.regions.values,
        "grad_query": gradients[0],
        "grad_doc": gradients[1],
    }
