import torch
from torch import Tensor

from cenote.core.sets import PaddedTokens
from cenote.pool import AttentiveMimicking
from tests.golden.cases import Case, adapter, load_parameters

COMBINATORS = {"gated": "gated", "single_parameter": "single", "form_only": "form", "context_only": "context"}
# kernels are [in, out]
NAMES = {
    "ngram_embeddings": "ngrams.weight",
    "vectors_avg_linear/kernel": "agreement.map.weight",
    "context_embedding_linear/kernel": "to_out.weight",
    "alpha_kernel": "gate.weight",
    "alpha_bias": "gate.bias",
    "alpha_intra": "share",
    "distance_embeddings": "distances.weight",
}


class TheirScores(AttentiveMimicking):
    """The authors guard the means that are scored against contexts without words, which shortens them by a billionth."""

    def context_weights(self, words: Tensor, word_mask: Tensor) -> Tensor:
        assert self.agreement is not None
        means = words.sum(2) / (word_mask.sum(2, keepdim=True).to(words.dtype) + 1e-9)
        return self.agreement.agreement(PaddedTokens(means, word_mask.any(2))).squeeze(-1)


@adapter("attentive-mimicking", "FormContextModel")
def form_context_model(case: Case) -> dict[str, Tensor]:
    i, config = case.inputs, case.config
    attentive = config.get("sent_weights", "clustering") == "clustering"
    model = TheirScores(
        config["emb_dim"],
        ngrams=case.params["ngram_embeddings"].shape[0] if "ngram_embeddings" in case.params else 1,
        combinator=COMBINATORS[config.get("combinator", "gated")],
        attentive=attentive,
        distances=config.get("distance_embedding", False),
        safe=False,
    )
    params = {NAMES[k]: v.T if "kernel" in k else v for k, v in case.params.items() if k in NAMES}
    own = model.state_dict()
    load_parameters(model, {k: v for k, v in params.items() if k in own})
    words = i["context_vectors"]
    word_mask = torch.arange(words.shape[2]) < i["words_per_context"].unsqueeze(-1)
    word_mask &= (torch.arange(words.shape[1]) < i["context_lengths"].unsqueeze(-1)).unsqueeze(-1)
    ngrams = i.get("ngrams", torch.zeros(words.shape[0], 0, dtype=torch.int64))
    lengths = i.get("ngram_lengths", torch.zeros(words.shape[0], dtype=torch.int64))
    distances = i.get("distances")
    made = model.attend(ngrams, words, torch.arange(ngrams.shape[1]) < lengths.unsqueeze(-1), word_mask, distances)
    outputs = {
        "embedding": made.embedding,
        "context_embedding_before_linear": made.context,
        "form_embedding": made.form,
    }
    return outputs | ({} if made.weights is None else {"context_weights": made.weights})
