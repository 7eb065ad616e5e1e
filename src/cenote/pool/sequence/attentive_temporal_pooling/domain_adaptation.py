"""Adapt a trained classifier to another domain by its scores alone; the model itself stays as it is.

Source: the abstract of Wang et al., "Attentive Temporal Pooling for Conformer-based Streaming Language Identification in
Long-form Speech", Odyssey 2022, which names two ways of adapting without retraining.

Note: the abstract does not spell the two ways out; these are the two textbook ways that fit its words.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least


def adapt_logits(
    logits: Float[Tensor, "*rows classes"],
    prior: Float[Tensor, "classes"],
    trained_prior: Float[Tensor, "classes"] | None = None,
) -> Float[Tensor, "*rows classes"]:
    """Log posteriors under other class frequencies: `log p'(c|x) = log p(c|x) + log p'(c) - log p(c) + const`.

    Exact where only the frequencies of the classes changed, and not what each class looks like.

    Args:
        logits: of a classifier, any constant per row free.
        prior: frequencies of the classes in the new domain; a class with 0 can no longer be chosen.
        trained_prior: frequencies in training; `None`: all alike.

    Returns:
        Log posteriors; each row sums to one after `exp`.

    Raises:
        InputError: where a prior is negative, all zero or of another size, or the trained prior has a zero.

    Example:
        >>> adapt_logits(torch.zeros(2), torch.tensor([0.25, 0.75])).exp()
        tensor([0.2500, 0.7500])
    """
    shift = _log_frequencies("prior", prior, logits)
    if trained_prior is not None:
        trained = _log_frequencies("trained_prior", trained_prior, logits)
        if bool(trained.isinf().any()):
            raise InputError("trained_prior: a class with frequency 0 in training has no usable logit; leave it out")
        shift = shift - trained
    return (logits + shift).log_softmax(-1)


def _log_frequencies(
    name: str, prior: Float[Tensor, "classes"], logits: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "classes"]:
    if prior.shape != logits.shape[-1:]:
        raise InputError(
            f"{name}: expected one frequency for each of {logits.shape[-1]} classes, got {tuple(prior.shape)}"
        )
    if not bool((prior >= 0).all()) or not float(prior.sum()) > 0:
        raise InputError(f"{name}: expected frequencies that are not negative and not all zero, got {prior.tolist()}")
    return (prior / prior.sum()).log().to(logits)


class LinearCalibration(nn.Module):
    """A linear map of logits or pooled vectors, trained on little data of the new domain: `y = A x + b`, first `A = I, b = 0`.

    Args:
        dim: number of classes, or width of the pooled vectors.
        diagonal: whether `A` is one scale per channel, `dim` numbers in place of `dim^2`.

    Example:
        >>> LinearCalibration(3)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 2., 3.], grad_fn=<AddBackward0>)
    """

    def __init__(self, dim: int, diagonal: bool = False) -> None:
        super().__init__()
        require_at_least(1, dim=dim)
        self.diagonal = diagonal
        self.scale = nn.Parameter(torch.ones(dim) if diagonal else torch.eye(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The calibrated logits or vectors."""
        return (x * self.scale if self.diagonal else x @ self.scale.T) + self.bias
