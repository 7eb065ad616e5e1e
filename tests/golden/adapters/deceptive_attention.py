import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.explain.attention_classifiers import AttentionClassifier, BiLSTM, LinearScorer
from cenote.explain.deceptive_attention.penalty import attention_mass_penalty
from tests.golden.cases import Case, adapter, load_parameters

NAMES = {
    "embedding_layer.": "embedding.",
    "lstm_layer.": "encoder.lstm.",
    "weight_layer.": "scorer.weight.",
    "linear.": "output.",
}


@adapter("deceptive-attention", "EmbAttModel")
@adapter("deceptive-attention", "BiLSTMAttModel")
def classifier(case: Case) -> dict[str, Tensor]:
    config = case.config
    encoder = None if config["hid_dim"] is None else BiLSTM(config["emb_dim"], config["hid_dim"])
    states = config["emb_dim"] if encoder is None else 2 * config["hid_dim"]
    model = AttentionClassifier(
        nn.Embedding(config["vocab_size"], config["emb_dim"]),
        nn.Linear(states, config["out_dim"]),
        LinearScorer(states),
        encoder,
    )
    model = load_parameters(model, case.params, NAMES).float()
    ids, block = case.inputs["input_ids"], case.inputs["block"].bool()[None]
    found = model(ids)
    ce = F.cross_entropy(found.logits, case.inputs["label"])
    penalty = attention_mass_penalty(found.weights, block, config["loss_hammer"]).loss
    assert isinstance(model.scorer, LinearScorer)
    (gradient,) = torch.autograd.grad(ce + penalty, model.scorer.weight.weight)
    blocked = model(ids, blocked=block)
    return {
        "logits": found.logits,
        "attention": found.weights,
        "ce": ce,
        "hammer": penalty[None],
        "grad.weight_layer": gradient,
        "logits_blocked": blocked.logits,
        "attention_blocked": blocked.weights,
    }


@adapter("deceptive-attention", "run_classifier.attention_regularization_loss")
def penalty(case: Case) -> dict[str, Tensor]:
    attention = case.inputs["attention_last"]
    impermissible, real = case.inputs["impermissible"].bool(), case.inputs["attention_mask"].bool()
    outputs = {}
    for name in case.config["optimize_func"]:
        reduce = "batch_min" if name == "max" else name
        found = attention_mass_penalty(attention[:, None], impermissible, case.config["hammer_coeff"], reduce, real)
        (gradient,) = torch.autograd.grad(found.loss, attention)
        outputs |= {f"{name}_loss": found.loss[None], f"{name}_grad": gradient[:, :, 0]}
    other = attention_mass_penalty(attention[:, None], ~impermissible, mask=real)
    return outputs | {
        "mass_imp": found.mass[None],
        "mass_other": other.mass[None],
        "mass_pad": found.padding[None],
        "mass_max": found.largest[None],
    }
