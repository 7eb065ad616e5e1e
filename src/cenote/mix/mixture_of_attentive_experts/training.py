"""Block coordinate training of gates and experts, and its rivals.

Source: Peng et al. (2020), arXiv 2005.06537.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.fitting import Fitted, fit
from cenote.mix.mixture_of_attentive_experts.attention import Mixture, MixtureAttention
from cenote.mix.mixture_of_attentive_experts.experts import ExpertGate
from cenote.mix.mixture_of_attentive_experts.live import LiveMixture

Scheme = Literal["alternating", "even", "joint", "attention"]
"""MAE: gates and experts by turns; UNI-MAE: gates stay even, so that heads drop out at random; NoBCD: all at once by the soft
mixture; plain attention."""


def mixtures(*models: nn.Module) -> list[MixtureAttention | LiveMixture]:
    """The layers, or mixtures of running models, that are told how to mix."""
    found = [m for model in models for m in model.modules() if isinstance(m, (MixtureAttention, LiveMixture))]
    if not found:
        raise InputError("model: has no mixture layer; build it of MixtureAttention, or give a LiveMixture beside it")
    return found


def gate_parameters(*models: nn.Module) -> list[nn.Parameter]:
    """Those of the gates, `phi`; all others are the experts', `theta`."""
    gates = [m for model in models for m in model.modules() if isinstance(m, ExpertGate)]
    return list(dict.fromkeys(p for gate in gates for p in gate.parameters()))


def mix_all(mixture: Mixture, *models: nn.Module) -> None:
    """Every layer mixes experts this way from now on."""
    for layer in mixtures(*models):
        layer.use(mixture)


def train_mixture(
    model: nn.Module,
    items: int,
    loss: Callable[[Int[Tensor, "chosen"]], Tensor],
    scheme: Scheme = "alternating",
    *,
    live: LiveMixture | None = None,
    epochs: int = 20,
    batch: int = 32,
    lr: float = 1e-3,
    gate_lr: float | None = None,
    gate_every: int = 5,
    score: Callable[[], float] | None = None,
    random_state: int = 0,
) -> Fitted:
    """Train by the task's loss: F epochs of the experts, one drawn for each item; each fifth is a G epoch of the gates.

    A G epoch trains the gates alone, by the soft mixture; an F epoch the experts alone. G epochs count among the epochs, so
    that all schemes take as many steps. The model is left in eval mode, with the soft mixture (plain attention by that scheme).

    Args:
        model: trained in place; of mixture layers, or a running model with `live`, whose context the loss enters itself.
        items: how many there are.
        loss: of the items of these numbers, with the model as it then is.
        scheme: see `Scheme`.
        live: gates of a running model.
        epochs, batch, lr: as usual; of Adam.
        gate_lr: of the gates; `lr` by default.
        gate_every: a G epoch stands in every so many (inferred).
        score: after each epoch, in eval mode; see `fit`.
        random_state: of order, dropout and drawn experts.

    Example:
        >>> from cenote.mix import MAEClassifier
        >>> model = MAEClassifier(9, 2, dim=8, hidden=8, layers=1, heads=2, gate_hidden=4)
        >>> tokens, labels = torch.tensor([[3, 4], [5, 6]]), torch.tensor([0, 1])
        >>> def loss(chosen):
        ...     return torch.nn.functional.cross_entropy(model(tokens[chosen]), labels[chosen])
        >>> len(train_mixture(model, 2, loss, epochs=5, batch=2).losses)
        5
    """
    require_one_of(get_args(Scheme), scheme=scheme)
    require_at_least(2, gate_every=gate_every)
    require_positive(lr=lr)
    models = (model,) if live is None else (model, live)
    mixtures(*models)
    phi = gate_parameters(*models)
    known = set(phi)
    theta = [p for p in model.parameters() if p not in known and p.requires_grad]
    experts = torch.optim.Adam(theta, lr=lr)
    gates = torch.optim.Adam(phi, lr=lr if gate_lr is None else gate_lr)

    def epoch_of(number: int) -> list[torch.optim.Optimizer]:
        if scheme == "joint":
            mix_all("soft", *models)
            return [experts, gates]
        if scheme == "attention":
            mix_all("even", *models)
            return [experts]
        if scheme == "alternating" and number % gate_every == gate_every - 1:
            mix_all("soft", *models)
            return [gates]
        mix_all("sampled", *models)
        return [experts]

    whole: Mixture = "even" if scheme in ("attention", "even") else "soft"

    def scored() -> float:
        mix_all(whole, *models)
        assert score is not None
        return score()

    try:
        return fit(
            nn.ModuleList(models),
            items,
            loss,
            epoch_of,
            epochs=epochs,
            batch=batch,
            score=None if score is None else scored,
            random_state=random_state,
        )
    finally:
        mix_all(whole, *models)


def adapt_gates(
    model: nn.Module,
    items: int,
    loss: Callable[[Int[Tensor, "chosen"]], Tensor],
    *,
    live: LiveMixture | None = None,
    epochs: int = 5,
    batch: int = 32,
    lr: float = 1e-3,
    random_state: int = 0,
) -> Fitted:
    """Tune the gates alone on another domain, experts as they are: the use of few parameters that the paper names.

    Args:
        model, items, loss, live: as of `train_mixture`.
        epochs, batch, lr: of Adam.
        random_state: of order and dropout.
    """
    require_positive(lr=lr)
    models = (model,) if live is None else (model, live)
    mix_all("soft", *models)
    stepper = torch.optim.Adam(gate_parameters(*models), lr=lr)
    return fit(nn.ModuleList(models), items, loss, [stepper], epochs=epochs, batch=batch, random_state=random_state)


def parameters_of(modules: Iterable[nn.Module]) -> int:
    """How many parameters they have, each counted once."""
    return sum(p.numel() for p in dict.fromkeys(p for m in modules for p in m.parameters()))
