import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.explain.attention_adversarial_training.perturbations import at_perturbation, iat_code_perturbation
from cenote.explain.attention_classifiers import AdditiveScorer, AttentionClassifier, DotScorer
from tests.golden.cases import Case, adapter


@adapter(
    "attention-adversarial-training", "amep TanhBCAttention / TanhBCAttentionAT / TanhBCAttentioniAT / DotBCAttention"
)
def training(case: Case) -> dict[str, Tensor]:
    dim, eps = case.config["hidden_size"], case.config["xi"]
    h, mask, label = case.inputs["hidden"], case.inputs["mask"] != 0, case.inputs["label"]
    embedding, output = nn.Embedding(1, dim), nn.Linear(dim, 1)
    model, dot = (AttentionClassifier(embedding, output, s) for s in (AdditiveScorer(dim), DotScorer(dim)))
    with torch.no_grad():
        for ours, theirs in (
            (model.scorer.inner.weight, "attn.0.weight"),
            (model.scorer.inner.bias, "attn.0.bias"),
            (model.scorer.outer.weight, "attn.2.weight"),
            (dot.scorer.weight.weight, "dot.weight"),
            (output.weight, "out.weight"),
            (output.bias, "out.bias"),
        ):
            ours.copy_(case.params[theirs])

    def loss(logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], label.detach())

    scores = model.scores(h)
    clean = model.from_scores(h, scores, mask)
    (g,) = torch.autograd.grad(loss(clean.logits), scores, retain_graph=True)
    found = {
        "score": scores,
        "attention": clean.weights,
        "logit": clean.logits[:, 0],
        "loss": loss(clean.logits)[None],
        "attention_dot": dot.from_scores(h, dot.scores(h), mask).weights,
    }
    for name, r in (("at", at_perturbation(g, eps, mask)), ("iat_code", iat_code_perturbation(g, eps, mask))):
        moved = model.from_scores(h, scores + r, mask)
        found |= {
            f"{name}_grad": g,
            f"{name}_attention_adv": moved.weights,
            f"{name}_loss_adv": loss(moved.logits)[None],
        }
    return found
