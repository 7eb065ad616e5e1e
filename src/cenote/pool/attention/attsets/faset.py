"""FASet: the network learns from single elements only, the attention from whole sets only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from cenote.core.errors import InputError
from cenote.core.masks import real_tokens

ADAM = partial(Adam, lr=1e-4)


class Batch(NamedTuple):
    """Sets `x [batch, tokens, ...]`, one target per set, and which slots are real (`None`: all)."""

    x: Float[Tensor, "batch tokens *features"]
    target: Tensor
    mask: Bool[Tensor, "batch tokens"] | None = None


class FASet:
    """Feature-attention separate training of a model that pools sets with attention.

    With `theta_att` the parameters of the attention and `theta_base` all others:
    stage 1 cuts every set of `N` elements into `N` sets of one (the target repeated) and steps `theta_base`;
    stage 2 shows whole sets and steps `theta_att`. Whichever is not stepped stays the same bit for bit, its buffers included:
    it runs in eval mode and gets no gradient. So the model serves sets of one, and of any number.

    Args:
        model: `model(x)`, or `model(x, mask)` where a batch has a mask, from `[batch, tokens, ...]` to predictions.
        attention: the part of `model` that weighs the elements, such as its `AttSets`; with a single element it must pass
            that element on.
        loss: `loss(prediction, target)`, a mean over its items.
        optimizer: makes the optimiser of a list of parameters; each of the two groups gets its own. Default: Adam
            at rate 1e-4, as the authors.

    Raises:
        InputError: where the attention is no part of the model, or nothing is left to train beside it.

    Example:
        >>> from cenote.pool.attention.attsets.pool import AttSets
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), AttSets(8), torch.nn.Linear(8, 1))
        >>> trainer = FASet(model, model[1], torch.nn.functional.mse_loss)
        >>> batch = Batch(torch.randn(4, 6, 3), torch.randn(4, 1))
        >>> losses = trainer.fit([batch], base_epochs=2, attention_epochs=1)
        >>> len(losses.base), len(losses.attention)
        (2, 1)

    Source: Yang et al., "Robust Attentional Aggregation of Deep Feature Sets for Multi-view 3D Reconstruction", IJCV 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[[list[nn.Parameter]], Optimizer] = ADAM,
    ) -> None:
        if not any(module is attention for module in model.modules()):
            raise InputError("attention: is no part of the model; give the very module that the model calls")
        own = {id(p) for p in attention.parameters()}
        self._attention_parameters = [p for p in attention.parameters() if p.requires_grad]
        self._base_parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        for name, group in (("attention", self._attention_parameters), ("model", self._base_parameters)):
            if not group:
                raise InputError(f"{name}: has no parameter to train apart from the other's; check requires_grad")
        self.model = model
        self.attention = attention
        self.loss = loss
        self.base_optimizer = optimizer(self._base_parameters)
        self.attention_optimizer = optimizer(self._attention_parameters)

    def base_step(self, batch: Batch) -> float:
        """Stage 1: one step of all but the attention, on the single elements; the loss before it."""
        x, target, mask = batch
        real = real_tokens(x, mask)
        owner = real.nonzero()[:, 0]
        with self._frozen(self._attention_parameters):
            self.model.train()
            self.attention.eval()
            return self._step(self.base_optimizer, self.model(x[real].unsqueeze(1)), target[owner])

    def attention_step(self, batch: Batch) -> float:
        """Stage 2: one step of the attention alone, on the whole sets; the loss before it."""
        x, target, mask = batch
        with self._frozen(self._base_parameters):
            self.model.eval()
            self.attention.train()
            return self._step(self.attention_optimizer, self.model(x) if mask is None else self.model(x, mask), target)

    def fit(
        self,
        batches: Iterable[Batch | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]],
        base_epochs: int = 31,
        attention_epochs: int = 19,
        alternate: bool = False,
    ) -> Losses:
        """Train: `base_epochs` passes of stage 1, then `attention_epochs` of stage 2.

        Args:
            batches: what is passed over in every epoch, a list or a `DataLoader`; tuples as in `Batch` will do.
            base_epochs, attention_epochs: lengths of the stages; the defaults are the authors'.
            alternate: step both on every batch, stage 1 first, for `base_epochs + attention_epochs` epochs.

        Returns:
            The mean loss of each epoch, per stage.
        """
        losses = Losses([], [])
        stage_1 = (self.base_step, losses.base)
        stage_2 = (self.attention_step, losses.attention)
        for epoch in range(base_epochs + attention_epochs):
            stages = [stage_1, stage_2] if alternate else [stage_1] if epoch < base_epochs else [stage_2]
            sums = [0.0] * len(stages)
            count = 0
            for batch in batches:
                for i, (step, _) in enumerate(stages):
                    sums[i] += step(Batch(*batch))
                count += 1
            if not count:
                raise InputError("batches: gave nothing in an epoch; an iterator is spent after one, give a list")
            for (_, history), total in zip(stages, sums, strict=True):
                history.append(total / count)
        return losses

    def _step(self, optimizer: Optimizer, prediction: Tensor, target: Tensor) -> float:
        loss = self.loss(prediction, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @contextmanager
    def _frozen(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        for p in parameters:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in parameters:
                p.requires_grad_(True)
            for module, training in modes:
                module.training = training


class Losses(NamedTuple):
    """The mean loss of each epoch in which a stage ran."""

    base: list[float]
    attention: list[float]
