"""Train a classifier whose attention leaves marked tokens alone while it goes on using them.

Source: Pruthi et al. (2020), arXiv 1909.07913.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain.deceptive_attention.penalty import Reduce, attention_mass_penalty, distance_reward, entropy_reward
from cenote.explain.fitting import Fitted, Texts, cross_entropy, fit
from cenote.explain.input_gradients import chosen_targets, logits_of
from cenote.explain.shown_attention import shown


def deceptive_loss(
    model: nn.Module,
    texts: Texts,
    lam: float = 1.0,
    *,
    reduce: Reduce = "mean",
    beta: float = 0.0,
    coef: float = 0.0,
    stored: Float[Tensor, "items tokens"] | None = None,
    keep_apart: bool = False,
) -> Float[Tensor, ""]:
    """`CE - lam log(1 - mass on the marked tokens) - beta H(a) - coef KL(a, stored)`.

    What has no weight is not computed, so that with `lam`, `beta` and `coef` 0 training is that of cross-entropy to the bit.

    Args:
        model: an `AttentionClassifier`, or a classifier of transformers; see `shown` for the attention that is looked at.
        texts: whose marked tokens are those that may not be read.
        lam: strength of the penalty; 0.1 and 1 in the paper.
        reduce: over heads, see `attention_mass_penalty`.
        beta: reward of even attention, mean over the heads.
        coef, stored: reward of attention far from this one, mean over the heads.
        keep_apart: of a transformer: marked tokens and others do not read each other.
    """
    if bool(coef) != (stored is not None):
        raise InputError(
            "stored: expected the attention to be pushed away from where coef is not 0, and none elsewhere"
        )
    if not (lam or beta or coef or keep_apart):
        return cross_entropy(logits_of(model(**texts.inputs)), texts.labels)
    found = shown(model, texts.inputs, apart=texts.marked if keep_apart else None)
    loss = cross_entropy(found.logits, texts.labels)
    if lam:
        loss = loss + attention_mass_penalty(found.weights, texts.marked, lam, reduce, texts.mask).loss
    if beta:
        loss = loss + entropy_reward(found.weights.mean(1), beta, texts.mask)
    if stored is not None:
        loss = loss + distance_reward(found.weights.mean(1), stored, coef, texts.mask)
    return loss


def train_deceptive(
    model: nn.Module,
    train: Texts,
    dev: Texts | None = None,
    lam: float = 1.0,
    *,
    reduce: Reduce = "mean",
    beta: float = 0.0,
    coef: float = 0.0,
    stored: Float[Tensor, "items tokens"] | None = None,
    keep_apart: bool = False,
    epochs: int = 15,
    batch: int = 1,
    lr: float = 1e-3,
    random_state: int = 0,
) -> Fitted:
    """Train by `deceptive_loss` with Adam, and keep the epoch that is best on `dev` by accuracy.

    The defaults are the paper's for small models: one sentence at a time, 15 epochs, 1e-3. For BERT: `epochs=4, batch=16,
    lr=2e-5`.

    Args:
        model: to train.
        train, dev: texts; without `dev` the last epoch is kept.
        lam, reduce, beta, coef, stored, keep_apart: see `deceptive_loss`; `stored` is of the training texts.
        epochs, batch, lr: of the training.
        random_state: of the order of the texts and of dropout.
    """

    def loss(chosen: Int[Tensor, "chosen"]) -> Tensor:
        far = None if stored is None else stored[chosen]
        return deceptive_loss(
            model, train.select(chosen), lam, reduce=reduce, beta=beta, coef=coef, stored=far, keep_apart=keep_apart
        )

    score = None if dev is None else partial(accuracy, model, dev)
    return fit(
        model, len(train.labels), loss, epochs=epochs, batch=batch, lr=lr, score=score, random_state=random_state
    )


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """Share of the texts whose class the model names."""
    return float((chosen_targets(logits_of(model(**texts.inputs)), None) == texts.labels).double().mean())
