"""How probes are trained: one standard recipe for all methods, so that only the pooling differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_at_least, require_one_of


@dataclass(frozen=True)
class Recipe:
    """The standard recipe: AdamW, cosine decay, early stop and the learning rate chosen on validation.

    Attributes:
        learning_rates: the grid; the one with the best mean validation metric over the seeds is kept.
        epochs: at most so many; validation stands at the end of each.
        least_steps: of an epoch: it is one pass over the training items, or as many as make so many steps.
        patience: a method stops when what decides, the best mean validation metric of a learning rate, has not risen for so
            many epochs.
        batch_size: items per step, at most; of few training items an eighth, but not less than 16.
        weight_decay: of AdamW, decoupled.
        optimiser: `"adamw"` or `"lars"`, see `cenote.jobs.probe.optimiser`.
        warmup_epochs: in which learning rates rise from zero.
        tokens_at_once: padded tokens that go through a pool in one piece, times the probes that train side by side;
            larger batches are cut.
    """

    learning_rates: tuple[float, ...] = (1e-3, 5e-3, 2e-2)
    epochs: int = 40
    least_steps: int = 10
    patience: int = 8
    batch_size: int = 128
    weight_decay: float = 0.01
    tokens_at_once: int = 32768
    optimiser: Literal["adamw", "lars"] = "adamw"
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        require_all_positive(learning_rates=self.learning_rates)
        require_at_least(1, epochs=self.epochs, least_steps=self.least_steps, patience=self.patience)
        require_at_least(1, batch_size=self.batch_size, tokens_at_once=self.tokens_at_once)
        require_one_of(("adamw", "lars"), optimiser=self.optimiser)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise InputError(
                f"warmup_epochs: expected fewer than the {self.epochs} epochs, and at least 0, got {self.warmup_epochs}"
            )

    @classmethod
    def lars(cls, items: int, batch_size: int = 4096, base_rate: float = 0.1, epochs: int = 90) -> Recipe:
        """The recipe by which probes of masked autoencoders are published, for so many training items.

        LARS without weight decay, 10 epochs of warm-up (a ninth of `epochs`), no early stop, one learning rate: `base_rate` for
        each 256 items of a step. The best epoch is that of the validation items. Tokens are read as they were extracted, while
        the published probes see each image cropped and mirrored anew in every epoch.

        >>> recipe = Recipe.lars(50_000)
        >>> recipe.learning_rates, recipe.warmup_epochs, recipe.items_per_step(50_000)
        ((1.6,), 10, 4096)

        Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling", 2025.
        """
        require_at_least(1, items=items, epochs=epochs)
        size = cls(batch_size=batch_size).items_per_step(items)
        return cls(
            learning_rates=(base_rate * size / 256,),
            epochs=epochs,
            least_steps=1,
            patience=epochs,
            batch_size=batch_size,
            weight_decay=0.0,
            optimiser="lars",
            warmup_epochs=epochs // 9,
        )

    def items_per_step(self, items: int) -> int:
        """Batch size for so many training items.

        >>> [Recipe().items_per_step(n) for n in (50, 400, 5000)]
        [16, 50, 128]
        """
        return min(self.batch_size, max(16, items // 8))
