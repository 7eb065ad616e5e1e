"""Train a student whose own attribution is pulled towards a prior of words.

Source: Zhang et al. (2025), arXiv 2512.14719; what is more concrete than "cross-entropy plus alignment" is reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.deceptive_attention.training import accuracy
from cenote.explain.fitting import Fitted, Texts, cross_entropy, fit
from cenote.explain.input_gradients import input_gradients, logits_of, real_of
from cenote.explain.shown_attention import shown

Form = Literal["gradient", "attention", "integrated"]
Distance = Literal["kl", "mse", "cosine"]
LEAST = 1e-8


class EncodedWords(NamedTuple):
    """Texts of words as tokens.

    Attributes:
        input_ids, mask: padded behind.
        word: the number of the word of each token; -1 of special tokens and padding.
    """

    input_ids: Int[Tensor, "texts tokens"]
    mask: Bool[Tensor, "texts tokens"]
    word: Int[Tensor, "texts tokens"]


def encode_words(
    texts: Sequence[Sequence[str]],
    tokens_of: Callable[[str], Sequence[int]],
    first: Sequence[int] = (),
    last: Sequence[int] = (),
    pad: int = 0,
) -> EncodedWords:
    """Cut words into tokens, and remember which word each token is of.

    Args:
        texts: their words.
        tokens_of: of a word, such as `lambda w: tokenizer.encode(w, add_special_tokens=False)`.
        first, last: special tokens around each text, such as [CLS] and [SEP].
        pad: token.

    >>> encode_words([["so", "thin"]], {"so": [5], "thin": [6, 7]}.get, first=[1]).word.tolist()
    [[-1, 0, 1, 1]]
    """
    rows, numbers = [], []
    for words in texts:
        cut = [list(tokens_of(w)) for w in words]
        rows.append([*first, *(t for of in cut for t in of), *last])
        numbers.append([-1] * len(first) + [n for n, of in enumerate(cut) for _ in of] + [-1] * len(last))
    longest = max(map(len, rows), default=0)
    if not longest:
        raise InputError("texts: expected at least one token")
    ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows])
    word = torch.tensor([n + [-1] * (longest - len(n)) for n in numbers])
    mask = torch.arange(longest) < torch.tensor([[len(r)] for r in rows])
    return EncodedWords(ids, mask, word)


def prior_of_tokens(
    priors: Sequence[Float[Tensor, "_words"]], word: Int[Tensor, "texts tokens"]
) -> Float[Tensor, "texts tokens"]:
    """A prior of words as one of tokens: each word's is spread equally over its tokens, words that were cut off are left out.

    >>> prior_of_tokens([torch.tensor([0.5, 0.5])], torch.tensor([[-1, 0, 1, 1]])).tolist()
    [[0.0, 0.5, 0.25, 0.25]]
    """
    if len(priors) != len(word):
        raise InputError(f"priors: expected one for each of {len(word)} texts, got {len(priors)}")
    found = torch.zeros(word.shape)
    for row, p, of in zip(found, priors, word, strict=True):
        at = of >= 0
        if bool(at.any()) and int(of.max()) >= len(p):
            raise InputError(f"priors: expected {int(of.max()) + 1} words at least, got {len(p)}")
        counts = of[at].bincount(minlength=len(p))
        row[at] = (p / counts.clamp(min=1).to(p))[of[at]].to(row)
    return _shares(found, word >= 0)


def self_attribution(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "batch"],
    form: Form = "gradient",
    content: Bool[Tensor, "batch tokens"] | None = None,
    steps: int = 8,
) -> Float[Tensor, "batch tokens"]:
    """What the student itself says of each token, not below 0, sum 1; it can be differentiated.

    Args:
        model: a classifier with `get_input_embeddings`.
        inputs: of its forward.
        labels: the true classes.
        form: `"gradient"`: `|sum_d g_td x_td|` of the true class's logit; `"integrated"`, likewise over a path;
            `"attention"`: what the model shows, see `shown`, at the cost of no gradient.
        content: tokens that count: not special ones; all real ones by default.
        steps: of `"integrated"`.
    """
    require_one_of(get_args(Form), form=form)
    real = real_of(inputs)
    counted = real if content is None else content & real
    if form == "attention":
        return _shares(shown(model, inputs).weights.mean(1), counted)
    gradients = "times input" if form == "gradient" else "integrated"
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        scores = input_gradients(model, inputs, labels, form=gradients, steps=steps, create_graph=True)  # type: ignore[arg-type]
    return _shares(scores.abs(), counted)


def alignment_loss(
    prior: Float[Tensor, "batch tokens"],
    attribution: Float[Tensor, "batch tokens"],
    distance: Distance = "kl",
) -> Float[Tensor, ""]:
    """How far an attribution is from a prior, mean over the texts: `KL(prior, attribution)`, squared, or `1 - cosine`.

    Args:
        prior: of each text, its scores sum to one; zeros in padding.
        attribution: likewise, of the model.
        distance: `"kl"`, `"mse"` or `"cosine"`.

    Raises:
        InputError: for two shapes, or another distance.

    Example:
        >>> p = torch.tensor([[0.25, 0.75]])
        >>> [round(float(alignment_loss(p, p, d)), 6) + 0.0 for d in ("kl", "mse", "cosine")]
        [0.0, 0.0, 0.0]
    """
    require_one_of(get_args(Distance), distance=distance)
    if prior.shape != attribution.shape:
        raise InputError(f"attribution: expected {list(prior.shape)} as the prior, got {list(attribution.shape)}")
    if distance == "mse":
        return (prior - attribution).square().sum(1).mean()
    if distance == "cosine":
        return (1 - F.cosine_similarity(prior, attribution, dim=1)).mean()
    ratio = prior.clamp(min=LEAST).log() - attribution.clamp(min=LEAST).log()
    return (prior * ratio).sum(1).mean()


def prior_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "batch"],
    prior: Float[Tensor, "batch tokens"] | None,
    lam: float = 0.5,
    *,
    distance: Distance = "kl",
    form: Form = "gradient",
    content: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """`CE + lam D(prior, attribution)`; with `lam` 0, or no prior, nothing but cross-entropy is computed.

    Args:
        model, inputs, labels: of the task.
        prior: of the tokens, see `prior_of_tokens`.
        lam: weight of the alignment.
        distance, form, content: see `alignment_loss` and `self_attribution`.
    """
    require_at_least(0, lam=lam)
    task = cross_entropy(logits_of(model(**inputs)), labels)
    if prior is None or not lam:
        return task
    return task + lam * alignment_loss(prior, self_attribution(model, inputs, labels, form, content), distance)


def train_with_priors(
    model: nn.Module,
    train: Texts,
    prior: Float[Tensor, "items tokens"] | None,
    dev: Texts | None = None,
    lam: float = 0.5,
    *,
    distance: Distance = "kl",
    form: Form = "gradient",
    content: Bool[Tensor, "items tokens"] | None = None,
    epochs: int = 20,
    batch: int = 16,
    lr: float = 1e-3,
    random_state: int = 0,
) -> Fitted:
    """Train a student with Adam; what comes out is an ordinary classifier, with no prior and no parameter more.

    Args:
        model: the student: an encoder of transformers with a head, an `AttentionClassifier`, ...
        train, dev: texts; the epoch with the best accuracy on `dev` is kept, without it the last.
        prior: of the training texts' tokens.
        lam, distance, form, content: see `prior_loss`.
        epochs, batch, lr: of the training.
        random_state: of the order of the texts and of dropout.
    """

    def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
        part = train.select(chosen)
        of = None if prior is None else prior[chosen]
        counted = None if content is None else content[chosen]
        return prior_loss(model, part.inputs, part.labels, of, lam, distance=distance, form=form, content=counted)

    score = None if dev is None else partial(accuracy, model, dev)
    return fit(
        model, len(train.labels), loss, epochs=epochs, batch=batch, lr=lr, score=score, random_state=random_state
    )


def attribution_mass(model: nn.Module, texts: Texts, form: Form = "gradient") -> Float[Tensor, "items"]:
    """Share of the student's own attribution that lies on the marked tokens, of each text."""
    found = self_attribution(model, texts.inputs, texts.labels, form).detach()
    return (found * texts.marked).sum(1)


def prior_overlap(one: Float[Tensor, "words"], other: Float[Tensor, "words"]) -> float:
    """`sum_w min(p_w, q_w)` of two priors over the same vocabulary: 1 where confusable classes are marked by the same words.

    >>> prior_overlap(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.5]))
    0.5
    """
    return float(torch.minimum(one / one.sum(), other / other.sum()).sum())


def _shares(
    scores: Float[Tensor, "batch tokens"], counted: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Made to sum to 1; where all are zero, the same for all that count."""
    kept = scores.masked_fill(~counted, 0.0)
    total = kept.sum(1, keepdim=True)
    alike = counted.to(kept) / counted.sum(1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, kept / total.masked_fill(total == 0, 1.0), alike)
