import torch
from torch import Tensor

from cenote.mix.ponet.mixer import PoNetMixer, pooled_views
from cenote.mix.ponet.segments import segments_between, special_tokens
from tests.golden.cases import Case, adapter, load_parameters


@adapter("ponet", "PoNetAttention")
def lra(case: Case) -> dict[str, Tensor]:
    given = case.inputs
    q, k, o, local, segment = (given[name].double() for name in ("q", "k", "o", "local", "segment"))
    batch, _, tokens, _ = q.shape
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    if case.config.get("uses_mask", True):
        mask = given["mask"].detach() > 0.5
    # theirs cuts the padded length
    segments = (torch.arange(tokens) // (tokens // case.config["segment_num"] + 1)).expand(batch, -1)
    out = pooled_views(q, k, o, segment, local, mask, segments).output
    wanted = [name.removeprefix("grad.") for name in case.expected if name.startswith("grad.")]
    along = given["grad_out"].detach().double() if "grad_out" in given else torch.ones_like(out)
    grads = torch.autograd.grad((out * along).sum(), [given[name] for name in wanted], retain_graph=True)
    return {"out": out.float(), **{f"grad.{name}": g for name, g in zip(wanted, grads, strict=True)}}


@adapter("ponet", "PoNetSelfAttention")
def bert(case: Case) -> dict[str, Tensor]:
    config, ids = case.config, case.inputs["input_ids"]
    mixer = PoNetMixer(config["hidden_size"], config["num_attention_heads"], out=False)
    load_parameters(mixer, case.params)
    special = special_tokens(ids, (config["cls_id"], config["eos_id"]))
    segments = segments_between(special)
    mask = case.inputs["attention_mask"].detach() > 0.5
    found = mixer.view(
        case.inputs["hidden_states"].double(), mask, segments, special if config.get("clsgsepg", True) else None
    )
    return {
        "out": found.output.float(),
        "att_prob": found.weights.float(),
        "segment_index": segments - 1 + special[:, :1].long(),
        "token_type_mask": special.to(torch.uint8),
    }
