"""How selector, predictor and detector are trained against each other.

Source: Zhang, Lee and Wang (2024), arXiv 2407.19308.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.explain.comprehensive_attribution.model import Comet
from cenote.explain.fitting import Fitted, fit

Objective = Literal["hinge", "paper"]
Players = Literal[1, 2, 3]


@dataclass(frozen=True)
class LossWeights:
    """What the selector is trained on; the defaults are those of the authors' code, `IMAGENET9` those of their experiment.

    Attributes:
        objective: `"hinge"`: `m L_P + a max(0, L_P - L_D + gap) + b R`; `"paper"`: `m L_P - a L_D + b R`, which has no bound.
        m, a, b: weights of the prediction, of the detector, of the area.
        area: `R = mean max(0, mean(s) - area)` over the images.
        gap: by how much the detector's loss must be above the predictor's.
    """

    objective: Objective = "hinge"
    m: float = 1.0
    a: float = 1.0
    b: float = 100.0
    area: float = 0.2
    gap: float = 1.0

    def __post_init__(self) -> None:
        require_one_of(get_args(Objective), objective=self.objective)
        require_at_least(0, m=self.m, a=self.a, b=self.b, area=self.area)


IMAGENET9 = LossWeights(a=4.0, b=100.0, area=0.6, gap=2.0)


class Played(NamedTuple):
    """The losses of a training, step by step: of predictor, of detector on what is left (NaN without one), of selector."""

    predictor: tuple[float, ...]
    detector: tuple[float, ...]
    selector: tuple[float, ...]


def selector_objective(
    predicted: Float[Tensor, ""],
    detected: Float[Tensor, ""] | None,
    mask: Float[Tensor, "batch 1 height width"],
    terms: LossWeights | None = None,
) -> Float[Tensor, ""]:
    """The selector's loss, see `LossWeights`.

    Args:
        predicted: `L_P`, mean cross-entropy of the masked images.
        detected: `L_D`, of what is left; `None`: no detector, as with `a = 0`.
        mask: s.
        terms: weights and bounds.

    >>> mask = torch.full((1, 1, 2, 2), 0.5)
    >>> float(selector_objective(torch.tensor(0.25), torch.tensor(2.0), mask, LossWeights(area=0.5)))
    0.25
    """
    t = LossWeights() if terms is None else terms
    loss = t.m * predicted
    if t.a and detected is not None:
        against = (predicted - detected + t.gap).clamp(min=0) if t.objective == "hinge" else -detected
        loss = loss + t.a * against
    if t.b:
        loss = loss + t.b * (mask.mean((1, 2, 3)) - t.area).clamp(min=0).mean()
    return loss


def pretrain_detector(
    detector: nn.Module,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    *,
    epochs: int = 5,
    batch: int = 64,
    lr: float = 1e-3,
    held_out: float = 0.2,
    random_state: int = 0,
) -> tuple[float, Fitted]:
    """Train a detector (or a predictor, or a black box) on whole images.

    Args:
        detector: images to scores of the classes; trained in place.
        images: all of them; the last share is held out.
        labels: their classes.
        epochs, batch, lr: of Adam.
        held_out: share of the images that is not trained on.
        random_state: of the order of the images.

    Returns:
        Its accuracy on the held-out share, and how the training went.

    Raises:
        InputError: where it is no better than naming the most frequent class: such a detector finds nothing left over.
    """
    train = max(1, round(len(labels) * (1 - held_out)))
    x, y = images[:train], labels[:train]
    found = fit(
        detector,
        train,
        lambda chosen: F.cross_entropy(detector(x[chosen]), y[chosen]),
        epochs=epochs,
        batch=batch,
        lr=lr,
        random_state=random_state,
    )
    test = slice(train, None) if train < len(labels) else slice(None)
    right = accuracy_of(detector, images[test], labels[test])
    level = float(labels[test].bincount().max() / len(labels[test]))
    if right <= level:
        raise InputError(
            f"detector: names {right:.0%} of held-out images rightly, the most frequent class alone {level:.0%}; "
            f"train longer"
        )
    return right, found


def train_comet(
    comet: Comet,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    terms: LossWeights | None = None,
    players: Players = 2,
    *,
    epochs: int = 200,
    batch: int = 128,
    lr: float = 5e-4,
    warm_up: int = 2,
    milestones: Sequence[int] = (80, 120, 160),
    random_state: int = 0,
) -> Played:
    """Train batch by batch: the predictor on the masked images; then, with it frozen, the selector; both step. Left in eval
    mode.

    Args:
        comet: its detector is trained already (`pretrain_detector`), and stays as it is to the bit but with 3 players.
        images, labels: to train on.
        terms: of the selector's loss.
        players: 1: the detector is the predictor, and all is trained by the selector's loss; 2; 3: the detector is trained
            on what is left, too.
        epochs, batch, lr: of Adam.
        warm_up: epochs in which the rate rises to `lr`.
        milestones: epochs at which the rate falls to a tenth.
        random_state: of the order.

    Raises:
        InputError: where the detector does not fit the number of players.
    """
    t = LossWeights() if terms is None else terms
    require_one_of(get_args(Players), players=players)
    require_at_least(1, epochs=epochs, batch=batch)
    require_positive(lr=lr)
    shared = comet.detector is comet.predictor
    if shared != (players == 1) or (comet.detector is None and (t.a or players == 3)):
        kind = "the predictor itself" if players == 1 else "one of its own" if t.a or players == 3 else "one or none"
        raise InputError(f"detector: expected {kind} with players={players} and a={t.a}")
    if not t.b:
        warnings.warn("b: without the area's term the mask fills the image", UserWarning, stacklevel=2)
    own = list(comet.selector.parameters()) + (list(comet.predictor.parameters()) if shared else [])
    selecting = torch.optim.Adam(own, lr=lr)
    steppers = [selecting]
    predicting = detecting = None
    if not shared:
        predicting = torch.optim.Adam(comet.predictor.parameters(), lr=lr)
        steppers.append(predicting)
    if players == 3:
        assert comet.detector is not None
        detecting = torch.optim.Adam(comet.detector.parameters(), lr=lr)
        steppers.append(detecting)
    order = torch.Generator().manual_seed(random_state)
    played: list[tuple[float, float, float]] = []
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        for epoch in range(epochs):
            rate = lr * min(1.0, (epoch + 1) / (warm_up + 1)) * 0.1 ** sum(epoch >= m for m in milestones)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = rate
            comet.train()
            if players != 3 and not shared and comet.detector is not None:
                comet.detector.eval()
            for chosen in torch.randperm(len(labels), generator=order).split(batch):
                played.append(_step(comet, images[chosen], labels[chosen], t, selecting, predicting, detecting))
    comet.eval()
    return Played(*map(tuple, zip(*played, strict=True)))


def _step(
    comet: Comet,
    x: Tensor,
    y: Tensor,
    terms: LossWeights,
    selecting: torch.optim.Optimizer,
    predicting: torch.optim.Optimizer | None,
    detecting: torch.optim.Optimizer | None,
) -> tuple[float, float, float]:
    mask = comet.mask_of(x)
    pair = comet.masked(x, mask)
    if predicting is not None:
        predicting.zero_grad(set_to_none=True)
        F.cross_entropy(comet.predictor(pair.selected.detach()), y).backward()
    frozen = [comet.predictor] if predicting is not None else []
    if comet.detector is not None and predicting is not None:
        frozen.append(comet.detector)
    selecting.zero_grad(set_to_none=True)
    with _frozen(*frozen):
        predicted = F.cross_entropy(comet.predictor(pair.selected), y)
        detected = None
        if comet.detector is not None and terms.a:
            detected = F.cross_entropy(comet.detector(pair.left), y)
        loss = selector_objective(predicted, detected, mask, terms)
        loss.backward()
    if detecting is not None:
        assert comet.detector is not None
        detecting.zero_grad(set_to_none=True)
        F.cross_entropy(comet.detector(pair.left.detach()), y).backward()
        detecting.step()
    if predicting is not None:
        predicting.step()
    selecting.step()
    found = (
        predicted.detach(),
        predicted.new_tensor(torch.nan) if detected is None else detected.detach(),
        loss.detach(),
    )
    return float(found[0]), float(found[1]), float(found[2])


@torch.no_grad()
def accuracy_of(
    classifier: nn.Module, images: Float[Tensor, "items channels height width"], labels: Int[Tensor, "items"]
) -> float:
    """Share of images whose class is named."""
    return float((classifier(images).argmax(1) == labels).double().mean())


@contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """Their parameters gather no gradient, which still flows through them."""
    held = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)
