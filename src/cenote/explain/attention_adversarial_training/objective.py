"""The loss of adversarial training on attention, of a classifier and of any module whose scores can be moved.

Source: Kitada and Iyatomi (2021), arXiv 2009.12064.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import roc_auc_score
from torch import Tensor

from cenote.core import InputError, PaddedTokens
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.attention_adversarial_training.perturbations import (
    at_perturbation,
    iat_code_perturbation,
    iat_perturbation,
    random_perturbation,
    word_iat_perturbation,
    word_perturbation,
)
from cenote.explain.attention_classifiers import AttentionClassifier, Classified
from cenote.explain.fitting import Fitted, Texts, cross_entropy, fit
from cenote.explain.input_gradients import logits_of

OnScores = Literal["at", "iat", "iat per token", "random", "iat_code"]
Training = Literal["vanilla", "at", "iat", "iat per token", "random", "iat_code", "word at", "word iat"]
Loss = Callable[[Float[Tensor, "batch classes"], Int[Tensor, "batch"]], Tensor]


class Adversarial(NamedTuple):
    """What an adversarial step sees.

    Attributes:
        total: `clean + lam * perturbed`.
        clean: the loss of the scores as they are.
        perturbed: the loss with `delta`.
        delta: what was added to the scores, or to the embeddings; without a graph.
    """

    total: Float[Tensor, ""]
    clean: Float[Tensor, ""]
    perturbed: Float[Tensor, ""]
    delta: Float[Tensor, "batch tokens *dim"]


class MovedTokens(PaddedTokens):
    """Padded sets whose scores are moved before the softmax: a pool that reads these attends otherwise.

    Args:
        values, mask: as of `PaddedTokens`.
        delta: added to every head's scores.

    Example:
        >>> from cenote.pool import ABMIL
        >>> x, delta = torch.randn(2, 5, 8), torch.zeros(2, 5, requires_grad=True)
        >>> ABMIL(8).pool(MovedTokens(x, None, delta)).output.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        values: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None,
        delta: Float[Tensor, "batch tokens"],
    ) -> None:
        super().__init__(values, mask)
        self.delta = delta

    def softmax(self, scores: Float[Tensor, "batch tokens heads"]) -> Float[Tensor, "batch tokens heads"]:
        """Of the moved scores."""
        return super().softmax(scores + self.delta[..., None])


def perturbed_scores(
    scores: Float[Tensor, "batch tokens"],
    gradient: Float[Tensor, "batch tokens"],
    kind: OnScores = "at",
    eps: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch tokens"]:
    """What is added to the scores: of one of these kinds, with norm `eps`."""
    require_one_of(get_args(OnScores), kind=kind)
    if kind == "at":
        return at_perturbation(gradient, eps, mask)
    if kind == "random":
        return random_perturbation(gradient, eps, mask, generator)
    if kind == "iat_code":
        return iat_code_perturbation(gradient, eps, mask)
    return iat_perturbation(scores, gradient, eps, mask, "matrix" if kind == "iat" else "token")


def adversarial_objective(
    loss_at: Callable[[Tensor], Tensor],
    like: Float[Tensor, "batch tokens"],
    kind: OnScores = "at",
    eps: float = 1.0,
    lam: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    generator: torch.Generator | None = None,
) -> Adversarial:
    """`L(0) + lam L(r)`, with no gradient through `r`: of any module whose scores can be moved by a `delta`.

    Two forward passes. Nothing is wrapped: the module is called as `loss_at` calls it, and without a delta it is what it was.

    Args:
        loss_at: from a delta `[batch, tokens]`, which is added to the scores before the softmax, to the mean loss: of a module
            that offers `forward_from_scores`, or takes a delta; of a pool of `cenote.pool` by `MovedTokens`.
        like: of the scores' shape, dtype and device; of `"iat"` the scores themselves.
        kind: of perturbation.
        eps: its norm.
        lam: weight of the perturbed loss; with 0 it is not computed.
        mask: True on real tokens.
        generator: of `"random"`.

    Example:
        >>> from cenote.pool import ABMIL
        >>> pool, x = ABMIL(8), torch.randn(2, 5, 8)
        >>> found = adversarial_objective(lambda d: pool.pool(MovedTokens(x, None, d)).output.square().mean(), x[..., 0])
        >>> bool(found.perturbed > found.clean)
        True
    """
    require_at_least(0, eps=eps, lam=lam)
    delta = torch.zeros_like(like).requires_grad_()
    clean = loss_at(delta)
    if not lam:
        return Adversarial(clean, clean, clean, torch.zeros_like(like))
    (g,) = torch.autograd.grad(clean, delta, retain_graph=True)
    r = perturbed_scores(like, g, kind, eps, mask, generator)
    perturbed = loss_at(r)
    return Adversarial(clean + lam * perturbed, clean, perturbed, r)


def adversarial_loss(
    model: AttentionClassifier,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "batch"],
    kind: Training = "at",
    eps: float = 1.0,
    lam: float = 1.0,
    *,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
) -> Adversarial:
    """One step's loss of an `AttentionClassifier`; its encoder runs once where scores are perturbed, twice where words are.

    Args:
        model: to train.
        inputs: of its forward: the second text too, where there is one.
        labels: classes.
        kind: `"vanilla"`; on attention `"at"`, `"iat"` (which is the same, see `iat_perturbation`), `"iat per token"`,
            `"random"` (no adversary) and `"iat_code"` (for reproduction only); on embeddings `"word at"`, `"word iat"`.
        eps, lam: norm of the perturbation, and weight of its loss.
        loss: from logits and labels to a mean; by default cross-entropy, of one logit the binary one.
        generator: of `"random"`.
    """
    require_one_of(get_args(Training), kind=kind)
    require_at_least(0, eps=eps, lam=lam)
    of = cross_entropy if loss is None else loss
    if kind == "word at" or kind == "word iat":
        return _on_words(model, inputs, labels, kind == "word iat", eps, lam, of)
    h, mask, scores = _scored(model, inputs)
    clean = of(model.from_scores(h, scores, mask).logits, labels)
    if kind == "vanilla" or not lam:
        return Adversarial(clean, clean, clean, torch.zeros_like(scores))
    (g,) = torch.autograd.grad(clean, scores, retain_graph=True)
    r = perturbed_scores(scores, g, kind, eps, mask, generator)
    perturbed = of(model.from_scores(h, scores + r, mask).logits, labels)
    return Adversarial(clean + lam * perturbed, clean, perturbed, r)


def balanced(labels: Int[Tensor, "items"]) -> Float[Tensor, "classes"]:
    """A weight for each class: items per class, were all alike, over those that there are.

    >>> balanced(torch.tensor([0, 0, 0, 1])).tolist()
    [0.6666666865348816, 2.0]
    """
    counts = labels.bincount()
    if not bool(counts.all()):
        raise InputError(f"labels: class {int((counts == 0).nonzero()[0, 0])} has no item")
    return len(labels) / (len(counts) * counts.float())


def train_adversarial(
    model: AttentionClassifier,
    train: Texts,
    dev: Texts | None = None,
    kind: Training = "at",
    eps: float = 1.0,
    lam: float = 1.0,
    *,
    epochs: int = 8,
    batch: int = 32,
    lr: float = 1e-3,
    decay: float = 1e-5,
    class_weights: bool = True,
    random_state: int = 0,
) -> Fitted:
    """Train with Adam (amsgrad), weight decay on all but the scorer; the epoch with the best area under ROC on `dev` is kept.

    With `"word at"` and `"word iat"` the embeddings are first given mean 0 and deviation 1, which the norm `eps` is about.

    Args:
        model: to train.
        train, dev: texts; without `dev` the last epoch is kept.
        kind, eps, lam: see `adversarial_loss`.
        epochs, batch, lr, decay: of the training; the defaults are the authors'.
        class_weights: whether classes count alike however many items they have.
        random_state: of the order of the texts, of dropout and of `"random"`.
    """
    if kind in ("word at", "word iat"):
        with torch.no_grad():
            w = model.embedding.weight
            w.sub_(w.mean(0)).div_(w.std(0).clamp(min=1e-6))
    weights = balanced(train.labels) if class_weights else None
    drawn = torch.Generator().manual_seed(random_state)

    def step(chosen: Int[Tensor, "chosen"]) -> Tensor:
        part = train.select(chosen)
        of = partial(cross_entropy, class_weights=weights)
        return adversarial_loss(model, part.inputs, part.labels, kind, eps, lam, loss=of, generator=drawn).total

    scorer = [] if model.scorer is None else list(model.scorer.parameters())
    apart = {id(p) for p in scorer}
    groups = [{"params": [p for p in model.parameters() if id(p) not in apart], "weight_decay": decay}]
    if scorer:
        groups.append({"params": scorer, "weight_decay": 0.0})
    return fit(
        model,
        len(train.labels),
        step,
        epochs=epochs,
        batch=batch,
        lr=lr,
        groups=groups,
        optimiser=partial(torch.optim.Adam, amsgrad=True),
        score=None if dev is None else partial(area_under_roc, model, dev),
        random_state=random_state,
    )


@torch.no_grad()
def area_under_roc(model: AttentionClassifier, texts: Texts) -> float:
    """Of the second of two classes; of more, the mean over pairs of classes."""
    logits = logits_of(model(**texts.inputs)).double().cpu()
    labels = texts.labels.cpu().numpy()
    if logits.shape[1] == 1:
        return float(roc_auc_score(labels, logits[:, 0].numpy()))
    if logits.shape[1] == 2:
        return float(roc_auc_score(labels, (logits[:, 1] - logits[:, 0]).numpy()))
    return float(roc_auc_score(labels, logits.softmax(1).numpy(), multi_class="ovo", labels=range(logits.shape[1])))


def _scored(model: AttentionClassifier, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    h, mask = model.states(inputs["input_ids"], inputs.get("attention_mask"))
    scores = model.scores(h, inputs.get("condition_ids"), inputs.get("condition_mask"))
    if not scores.requires_grad:
        scores = scores.requires_grad_()
    return h, mask, scores


def _on_words(
    model: AttentionClassifier,
    inputs: Mapping[str, Any],
    labels: Tensor,
    towards_words: bool,
    eps: float,
    lam: float,
    of: Loss,
) -> Adversarial:
    x = model.embedding(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}

    def run(embeds: Tensor) -> Classified:
        return model(inputs_embeds=embeds, **rest)

    clean = of(run(x).logits, labels)
    if not lam:
        return Adversarial(clean, clean, clean, torch.zeros_like(x))
    (g,) = torch.autograd.grad(clean, x, retain_graph=True)
    mask = None if rest.get("attention_mask") is None else rest["attention_mask"] != 0
    r = (
        word_iat_perturbation(x, g, model.embedding.weight, eps, mask)
        if towards_words
        else word_perturbation(g, eps, mask)
    )
    perturbed = of(run(x + r).logits, labels)
    return Adversarial(clean + lam * perturbed, clean, perturbed, r)
