from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_rate
from cenote.pool.attention.slotcon.lars import LARS
from cenote.pool.attention.slotcon.model import SlotCon, SlotConLosses
from cenote.pool.attention.slotcon.views import TwoCrops
from cenote.pool.training import cosine_schedule


class SlotConTrainer:
    """Train a `SlotCon` on images without labels.

    Each step draws two crops per image, moves the teacher, and steps the student; the learning rate rises linearly during the
    warm-up and falls along a cosine, whose last step is short but not 0.

    Args:
        model: what is trained.
        views: draws the two crops.
        steps: length of the training.
        warm_up: share of the steps during which the learning rate rises.
        optimizer: makes the optimiser of a list of parameters; default LARS at 1.0 per 256 images, as the authors, of
            which `batch` says how many a step shows.
        batch: images in a step; only the default optimiser asks.

    Raises:
        InputError: where steps or warm-up make no schedule, or more steps are taken than were planned.

    Example:
        >>> encoder = torch.nn.Conv2d(1, 8, 3, stride=2, padding=1)
        >>> model = SlotCon(encoder, features=8, slots=4, dim=6, hidden=8)
        >>> trainer = SlotConTrainer(model, TwoCrops(8), steps=4, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
        >>> history = trainer.fit([torch.rand(4, 1, 12, 12)], epochs=4)
        >>> len(history)
        4

    Source: Wen et al., "Self-Supervised Visual Representation Learning with Semantic Grouping", NeurIPS 2022.
    """

    def __init__(
        self,
        model: SlotCon,
        views: TwoCrops,
        steps: int,
        warm_up: float = 5 / 800,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        batch: int = 512,
    ) -> None:
        require_at_least(1, steps=steps)
        require_rate(warm_up=warm_up)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.model = model
        self.views = views
        self.steps = steps
        self.done = 0
        self.optimizer = LARS(parameters, lr=batch / 256) if optimizer is None else optimizer(parameters)
        self.schedule = cosine_schedule(self.optimizer, steps, int(warm_up * steps))

    def step(self, images: Float[Tensor, "batch channels height width"]) -> SlotConLosses:
        """One step on a batch of images; the losses before it."""
        if self.done >= self.steps:
            raise InputError(f"steps: all {self.steps} steps of this training are done; plan more of them")
        self.model.train()
        self.model.update_teacher(self.done / self.steps)
        losses = self.model(*self.views(images))
        self.optimizer.zero_grad()
        losses.total.backward()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return losses

    def fit(
        self, batches: Iterable[Float[Tensor, "batch channels height width"]], epochs: int | None = None
    ) -> list[float]:
        """Pass over the batches until all steps are done, or `epochs` times; the mean loss of each pass."""
        history: list[float] = []
        while self.done < self.steps and (epochs is None or len(history) < epochs):
            total, count = 0.0, 0
            for images in batches:
                if self.done >= self.steps:
                    break
                total += float(self.step(images).total.detach())
                count += 1
            if not count:
                raise InputError("batches: gave nothing in an epoch; an iterator is spent after one, give a list")
            history.append(total / count)
        return history

    def state_dict(self) -> dict[str, Any]:
        """All that a later `SlotConTrainer` needs to go on: model with teacher and center, optimiser, schedule, step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a training of the same length.

        Raises:
            InputError: where more steps are done than are planned here.
        """
        if state["done"] > self.steps:
            raise InputError(f"state: {state['done']} steps are done, more than the {self.steps} planned here")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.done = state["done"]
