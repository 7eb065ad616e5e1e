import torch
from torch import Tensor

from cenote.mix.local_attention_tkl.model import TKL
from tests.golden.cases import Case, adapter

NAMES = {
    "contextualizer.": "reader.encoder.",
    "dense.": "saturated.dense.",
}
EMBEDDING = {
    "saturation_linear.": "saturated.factor.",
    "saturation_linear2.": "saturated.root.",
    "saturation_linear3.": "saturated.offset.",
    "sat_normer.": "saturated.norm.",
    "sat_emb_reduce1.": "saturated.reduce.",
}
"""Theirs has them by each saturation, and `mixer_sat`, `mixer_end` for nothing."""


@adapter("local-attention-tkl", "matchmaker.models.published.sigir20_tkl.TKL_sigir20")
def tkl(case: Case) -> dict[str, Tensor]:
    config, own = case.config, case.params
    saturation = config["saturation_type"]
    # idfs, which both others read, are no argument of theirs
    assert saturation in ("embedding", "log")
    tables = {name: own[f"positional_features_{name}"][0] for name in "qd" if f"positional_features_{name}" in own}
    if not config["use_diff_posencoding"] and "q" in tables:
        tables.setdefault("d", tables["q"])
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
        saturation=saturation,
        positions=config["use_pos_encoding"],
        apart=config["use_diff_posencoding"],
        queries=len(tables.get("q", [0])),
        documents=len(tables.get("d", [0])),
        published=True,
    )
    names = NAMES | (EMBEDDING if saturation == "embedding" else {})
    state = {"reader.mixer": own["mixer"]}
    for name, value in own.items():
        ours = next((o + name.removeprefix(t) for t, o in names.items() if name.startswith(t)), None)
        if ours is not None:
            state[ours] = value
    state |= {
        "saturated.means": own["mu"].flatten(),
        "saturated.deviations": own["sigma"].flatten(),
        "top.weights": own["chunk_scoring"].flatten(),
    }
    if config["use_pos_encoding"]:
        state |= {"reader.query_positions": tables["q"], "reader.document_positions": tables["d"]}
    if saturation == "log":
        # theirs is [4, 1, 1, 1, kernels], of which the first row counts
        kernels = own["mu"].numel()
        state["saturated.gain"] = own.get("kernel_mult", own["mu"].new_ones(kernels)).reshape(-1, kernels)[0]
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
