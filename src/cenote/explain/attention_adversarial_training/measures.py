"""Whether attention agrees with gradients, and how much an attack on its scores costs.

Source: Kitada and Iyatomi (2021), arXiv 2009.12064; Jain and Wallace (2019), arXiv 1902.10186.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.requirements import require_one_of
from cenote.explain.attention_adversarial_training.perturbations import at_perturbation
from cenote.explain.attention_classifiers import AttentionClassifier
from cenote.explain.fitting import Texts, cross_entropy
from cenote.explain.input_gradients import chosen_targets, input_gradients

Correlation = Literal["pearson", "kendall"]


def attention_gradient_correlation(
    model: AttentionClassifier, texts: Texts, by: Correlation = "pearson"
) -> Float[Tensor, "items"]:
    """Of each text: correlation over its tokens of the attention and `sum_d |dL / dx_td|`.

    NaN of a text of one token, or of constant numbers; `torch.nanmean` passes them over.

    Args:
        model: in eval mode.
        texts: any.
        by: `"pearson"` as in the paper, or `"kendall"`.
    """
    import scipy.stats

    require_one_of(get_args(Correlation), by=by)
    importance = input_gradients(model, texts.inputs, texts.labels, form="norm")
    with torch.no_grad():
        weights = model(**texts.inputs).weights
    found = []
    for a, g, real in zip(weights.double(), importance.double(), texts.mask, strict=True):
        pair = a[real].cpu(), g[real].cpu()
        if any(bool((x == x[0]).all()) for x in pair):
            found.append(float("nan"))
        elif by == "kendall":
            found.append(float(scipy.stats.kendalltau(*(x.numpy() for x in pair)).statistic))
        else:
            found.append(float(torch.corrcoef(torch.stack(pair))[0, 1]))
    return torch.tensor(found, dtype=torch.float64)


def attacked_accuracy(
    model: AttentionClassifier, texts: Texts, eps: Sequence[float], in_deviations: bool = False, steps: int = 1
) -> tuple[float, ...]:
    """Accuracy while the scores of each text are moved by `eps` in the direction that hurts its loss most.

    A model with larger scores looks more robust than it is; `in_deviations` takes this out.

    Args:
        model: in eval mode.
        texts: any.
        eps: norms of the perturbation, the curve's places.
        in_deviations: `eps` counts the standard deviation of the text's own scores over its real tokens.
        steps: how often the direction is looked for anew; 1 is the first-order attack of the training.
    """
    with torch.enable_grad():
        h, mask = model.states(texts.input_ids, texts.mask)
        h = h.detach()
        scores = model.scores(h).detach()
        count = mask.sum(1, keepdim=True)
        mean = scores.masked_fill(~mask, 0.0).sum(1, keepdim=True) / count
        spread = ((scores - mean).masked_fill(~mask, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        unit = spread if in_deviations else torch.ones_like(spread)
        found = []
        for size in eps:
            r = torch.zeros_like(scores)
            for _ in range(steps):
                delta = r.clone().requires_grad_()
                loss = cross_entropy(model.from_scores(h, scores + delta, mask).logits, texts.labels)
                (g,) = torch.autograd.grad(loss, delta)
                r = size * unit * at_perturbation(r + size * unit * at_perturbation(g, 1.0, mask), 1.0, mask)
            logits = model.from_scores(h, scores + r, mask).logits
            found.append(_right(logits, texts.labels))
    return tuple(found)


def _right(logits: Float[Tensor, "items classes"], labels: Int[Tensor, "items"]) -> float:
    return float((chosen_targets(logits.detach(), None) == labels).double().mean())
