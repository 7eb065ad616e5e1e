"""The loop with which small models of this room are trained, and the labelled texts that they are trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive


class Texts(NamedTuple):
    """Labelled texts as tokens, some of which are marked.

    Attributes:
        input_ids: padded anywhere.
        mask: True on real tokens.
        labels: classes.
        marked: tokens that a method is about: those that may not be read, or those that decide the class.
    """

    input_ids: Int[Tensor, "items tokens"]
    mask: Bool[Tensor, "items tokens"]
    labels: Int[Tensor, "items"]
    marked: Bool[Tensor, "items tokens"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """As a model of texts is called."""
        return {"input_ids": self.input_ids, "attention_mask": self.mask.long()}

    def select(self, chosen: Int[Tensor, "chosen"] | slice) -> Self:
        """Those of these numbers."""
        return type(self)(*(part[chosen] for part in self))

    def without_marked(self) -> Self:
        """The same texts with the marked tokens taken out and the others moved up; a text of nothing else stays as it is.

        >>> ids, real = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
        >>> shorter = Texts(ids, real, torch.tensor([0]), ids == 6).without_marked()
        >>> shorter.input_ids.tolist(), shorter.mask.tolist()
        ([[5, 7, 0]], [[True, True, False]])
        """
        left = self.mask & ~self.marked
        left = torch.where(left.any(1, keepdim=True), left, self.mask)
        order = (~left).to(torch.uint8).argsort(dim=1, stable=True)
        mask = left.gather(1, order)
        ids = self.input_ids.gather(1, order).masked_fill(~mask, 0)
        return type(self)(ids, mask, self.labels, self.marked.gather(1, order) & mask)


@dataclass(frozen=True)
class Fitted:
    """How a training went.

    Attributes:
        losses: step by step.
        scores: of each epoch, where a score was given.
        best: the epoch whose parameters the model has, from 0; the last without a score.
    """

    losses: tuple[float, ...]
    scores: tuple[float, ...]
    best: int


def fit(
    model: nn.Module,
    items: int,
    loss: Callable[[Int[Tensor, "chosen"]], Tensor],
    *,
    epochs: int,
    batch: int,
    lr: float = 1e-3,
    groups: Sequence[Mapping[str, Any]] | None = None,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    score: Callable[[], float] | None = None,
    random_state: int = 0,
) -> Fitted:
    """Train a model on losses of its batches, and keep the epoch with the best score; it is left in eval mode.

    Args:
        model: to train.
        items: how many there are.
        loss: of the items of these numbers, with the model as it then is.
        epochs, batch, lr: as usual.
        groups: of parameters, with settings of their own, see `torch.optim`; all parameters of the model by default.
        optimiser: its class, or a partial of it.
        score: after each epoch, in eval mode; the first of the best epochs is kept. `None`: the last.
        random_state: of the order of the items and of dropout; global generators are left as they were.

    Raises:
        InputError: where there are no items, or a loss is not finite.
    """
    require_at_least(1, items=items, epochs=epochs, batch=batch)
    require_positive(lr=lr)
    stepper = cast(Any, optimiser)(list(groups) if groups is not None else _trained(model), lr=lr)
    order = torch.Generator().manual_seed(random_state)
    losses: list[float] = []
    scores: list[float] = []
    kept: dict[str, Tensor] | None = None
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        for _ in range(epochs):
            model.train()
            for chosen in torch.randperm(items, generator=order).split(batch):
                value = loss(chosen)
                if not bool(value.isfinite()):
                    raise InputError(f"loss: is {float(value)} at step {len(losses)}; try a smaller lr than {lr}")
                stepper.zero_grad(set_to_none=True)
                value.backward()
                stepper.step()
                losses.append(float(value.detach()))
            model.eval()
            if score is not None:
                with torch.no_grad():
                    scores.append(score())
                if scores[-1] > max(scores[:-1], default=-float("inf")):
                    kept = copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    stepper.zero_grad(set_to_none=True)
    return Fitted(tuple(losses), tuple(scores), scores.index(max(scores)) if scores else epochs - 1)


def cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    class_weights: Float[Tensor, "labels"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the items; of one logit the binary one, where `class_weights` are of both classes."""
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, labels, class_weights)
    weights = None if class_weights is None else class_weights[labels]
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), weights)


def _trained(model: nn.Module) -> Iterable[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
