"""How well a pool keeps the signal of a set and leaves out its noise.

Source: Brothers, "Robust Noise Attenuation via Adaptive Pooling of Transformer Outputs", ICML 2025.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.pool.attention.adaptive_noise_pooling.pool import attenuation_bound


class Attenuation(NamedTuple):
    """What given scores do to the noise of one set.

    Attributes:
        noise_mass: the weight that noise takes.
        spread: width of the interval of the signal's scores.
        margin: by how much the lowest signal exceeds the highest noise; negative where it does not, infinite without noise.
        bound: `attenuation_bound` of these, in units of the longest token.
    """

    noise_mass: float
    spread: float
    margin: float
    bound: float


def attenuation(scores: Float[Tensor, "tokens"], signal: Bool[Tensor, "tokens"]) -> Attenuation:
    """The noise that is left under `softmax(scores)`, and how far the average can lie from the mean of the signal.

    Args:
        scores: before the softmax, of one set and head.
        signal: True on the tokens that matter, of which there is at least one.

    Example:
        >>> found = attenuation(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, True, False]))
        >>> round(found.noise_mass, 4), found.spread, found.margin, round(found.bound, 4)
        (0.1554, 0.0, 1.0, 0.3679)

    Source: Brothers, "Robust Noise Attenuation via Adaptive Pooling of Transformer Outputs", ICML 2025, as `attenuation_bound`.
    """
    _check(signal, scores.shape)
    wanted, noise = scores[signal], scores[~signal]
    spread = float(wanted.max() - wanted.min())
    margin = float(wanted.min() - noise.max()) if len(noise) else float("inf")
    mass = float(scores.softmax(0)[~signal].sum())
    return Attenuation(mass, spread, margin, attenuation_bound(len(scores), len(wanted), spread, margin))


def noise_mass(
    weights: Float[Tensor, "batch heads tokens"], signal: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch heads"]:
    """The weight that each head gives to what is not signal.

    Args:
        weights: from a pool's `attend`; padded tokens weigh nothing.
        signal: True on the tokens that matter, of which every set has at least one.

    Example:
        >>> noise_mass(torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[True, False, False]])).tolist()
        [[0.5]]
    """
    _check(signal, (weights.shape[0], weights.shape[2]))
    return weights.masked_fill(signal.unsqueeze(1), 0).sum(-1)


def signal_loss(
    output: Float[Tensor, "batch dim"], x: Float[Tensor, "batch tokens dim"], signal: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch"]:
    """`(1/k) sum_{signal} |x_n - y|^2` of each set: least where `y` is the mean of its `k` signal tokens.

    Args:
        output: `y`, what a pool made of each set.
        x: the tokens.
        signal: as in `noise_mass`.

    Example:
        >>> signal_loss(torch.tensor([[1.0]]), torch.tensor([[[0.0], [2.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([1.])
    """
    _check(signal, x.shape[:2])
    distance = (x - output.unsqueeze(1)).square().sum(-1).masked_fill(~signal, 0)
    return distance.sum(1) / signal.sum(1)


def regret(errors: Float[Tensor, "methods settings"]) -> Float[Tensor, "methods settings"]:
    """What each method's error exceeds that of the best method by, setting by setting.

    >>> regret(torch.tensor([[1.0, 5.0], [3.0, 2.0]])).tolist()
    [[0.0, 3.0], [2.0, 0.0]]
    """
    return errors - errors.amin(0)


def _check(signal: Tensor, shape: tuple[int, ...]) -> None:
    if signal.shape != shape or not bool(signal.any(-1).all()):
        raise InputError(
            f"signal: expected shape {tuple(shape)} with a token that matters in every set, got shape "
            f"{tuple(signal.shape)} with {signal.sum(-1).tolist()}"
        )
