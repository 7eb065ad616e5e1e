import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cenote.pool import AttentionalAffine, AttentionalConcat, AttentionalGate
from tests.golden.cases import Case, adapter, load_parameters

POOLS = {
    "concat": AttentionalConcat,
    "gate": AttentionalGate,
    "affine": AttentionalAffine,
    "nonlinear_affine": lambda dim, features: AttentionalAffine(dim, features, tanh=True),
    "non_linear_affine": lambda dim, features: AttentionalAffine(dim, features, tanh=True),
}
OURS = {"attention.attention.0.": "score.", "gate.": "gate.", "scale.": "scale.", "shift.": "shift."}


@adapter("attention-conditioning", "AffectiveAttention")
def affective_attention(case: Case) -> dict[str, Tensor]:
    """Their model around our pool: frozen word vectors, one LSTM unless `no_rnn`, the pool, a linear classifier."""
    c, p = case.config, case.params
    src, features, lengths = (case.inputs[k] for k in ("src", "features", "lengths"))
    mask = torch.arange(src.shape[1]) < lengths.unsqueeze(1)
    h = p["word_embedding.embedding.weight"][src]
    if c.get("conc_emb"):
        h = torch.cat([h, features], -1)
    if not c.get("no_rnn"):
        h = states(c, p, h, lengths)
    if c.get("conc_rnn") and not c.get("no_rnn"):
        h = torch.cat([h, features], -1)
    pool = POOLS[c["attention_type"]](h.shape[-1], c["feature_size"])
    own = {k: v for k, v in p.items() if k.startswith(tuple(OURS))}
    load_parameters(pool, own, OURS).to(h.dtype)
    representation, weights = pool.attend(h, features, mask)
    logits = representation @ p["classes.weight"].T + p["classes.bias"]
    return {"logits": logits, "h": h, "representation": representation, "attention": weights.squeeze(1)}


def states(c: dict, p: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
    rnn = nn.LSTM(x.shape[-1], c.get("rnn_size", 100), c.get("rnn_layers", 1), batch_first=True).to(x.dtype)
    rnn.load_state_dict({k.removeprefix("rnn.rnn."): v for k, v in p.items() if k.startswith("rnn.rnn.")})
    packed, _ = rnn.eval()(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
