import torch
from torch import Tensor

from cenote.mix.mixture_of_attentive_experts.attention import MixtureAttention
from tests.golden.cases import Case, adapter


@adapter("mixture-of-attentive-experts", "equations of section 3")
def layer(case: Case) -> dict[str, Tensor]:
    x, own = case.inputs["X"], case.params
    heads, dim, width = own["Wq"].shape
    made = MixtureAttention(
        dim,
        heads,
        drop=case.config["heads_dropped_per_expert"],
        head_dim=width,
        hidden=own["gate_W1"].shape[1],
        bias=False,
    ).to(x.dtype)
    state = {f"{ours}.weight": own[theirs].transpose(1, 2).flatten(0, 1) for theirs, ours in
             (("Wq", "query"), ("Wk", "key"), ("Wv", "value"))}  # fmt: skip
    state |= {
        "output.weight": own["Wo"].flatten(0, 1).T,
        "gate.hidden.weight": own["gate_W1"].T,
        "gate.hidden.bias": own["gate_b1"],
        "gate.output.weight": own["gate_W2"].T,
        "gate.output.bias": own["gate_b2"],
    }
    made.load_state_dict(state)
    soft, gates = made.attend(x)
    every = made.gate.members
    even = torch.full_like(gates, 1 / len(every))
    heads_out = made.head_outputs(x)
    outputs = {
        "out_soft": soft,
        "gate": gates,
        "head_out": heads_out,
        "out_hard": made.use("hard").attend(x).output,
        "mha": made.use("even").attend(x).output,
    }
    made.gate.chosen = lambda xbar: even  # type: ignore[method-assign]
    return {**outputs, "out_uniform": made.use("soft").attend(x).output}
