"""How probes are trained: one standard recipe for all methods, so that only the pooling differs."""

from __future__ import annotations

from dataclasses import dataclass

from cenote.core.requirements import require_all_positive, require_at_least


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

    def __post_init__(self) -> None:
        require_all_positive(learning_rates=self.learning_rates)
        require_at_least(1, epochs=self.epochs, least_steps=self.least_steps, patience=self.patience)
        require_at_least(1, batch_size=self.batch_size, tokens_at_once=self.tokens_at_once)

    def items_per_step(self, items: int) -> int:
        """Batch size for so many training items.

        >>> [Recipe().items_per_step(n) for n in (50, 400, 5000)]
        [16, 50, 128]
        """
        return min(self.batch_size, max(16, items // 8))
