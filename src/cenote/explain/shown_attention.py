"""The attention that a classifier shows: of an `AttentionClassifier`, or of the first token in a transformer's last block.

Source: Pruthi et al. (2020), arXiv 1909.07913.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import first_tokens
from cenote.core.requirements import require_one_of
from cenote.explain.attention_classifiers import AttentionClassifier
from cenote.explain.base import Attribution, Explainer
from cenote.explain.input_gradients import logits_of, real_of
from cenote.models.live import AttentionCall, AttentionEdit, Edit, RowEdit, RowRecorder, Where, attentions, edited

By = Literal["weights", "norms"]
SHOWN, BLOCKED, MARKED, OTHERS = "shown", "blocked", "marked", "others"


class Shown(NamedTuple):
    """`logits [batch, classes]` and the attention behind them, `[batch, heads, tokens]`."""

    logits: Float[Tensor, "batch classes"]
    weights: Float[Tensor, "batch heads tokens"]


class Blocked(RowEdit):
    """Takes the weights of marked tokens from the first token's row of the last block; the others stay as they are."""

    asks = (SHOWN, BLOCKED)

    def __init__(self, at: Where) -> None:
        self.at = at

    def queries(self, call: AttentionCall) -> Bool[Tensor, "batch queries"]:
        """The first token's."""
        return call.queries_in(SHOWN)

    def rows(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        """Without the marked tokens'."""
        return weights.masked_fill(call.keys_in(BLOCKED)[:, None, None], 0.0)


class KeptApart(AttentionEdit):
    """Marked tokens read marked ones alone, the others the others alone; what is in neither span ([CLS]) reads all.

    Give `edited` the spans `"marked"` and `"others"`. Without it what marked tokens say leaks into the others, and attention
    can leave them alone.
    """

    asks = (MARKED, OTHERS)

    def __init__(self, at: Where | None = None) -> None:
        self.at = Where(kinds=["self"]) if at is None else at

    def inputs(self, call: AttentionCall) -> AttentionCall:
        """With fewer pairs that may be read."""
        before, marked, others = call.allowed, call.keys_in(MARKED), call.keys_in(OTHERS)

        def allowed(rows: Int[Tensor, "batch rows"]) -> Bool[Tensor, "_batch _heads _rows keys"]:
            hidden = marked.gather(1, rows)[:, :, None] & ~marked[:, None]
            may = ~(hidden | (others.gather(1, rows)[:, :, None] & ~others[:, None]))[:, None]
            return may if before is None else may & before(rows)

        return call.replace(allowed=allowed)


def shown(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    blocked: Bool[Tensor, "batch tokens"] | None = None,
    apart: Bool[Tensor, "batch tokens"] | None = None,
) -> Shown:
    """Run a classifier and look at its attention, with a graph where gradients are on; the model is left as it was.

    Args:
        model: an `AttentionClassifier`, or a classifier of transformers whose last block has self-attention.
        inputs: of its forward.
        blocked: tokens whose weight is set to 0 after the softmax, and what is left not made to sum to 1.
        apart: of a transformer: these tokens read each other alone in every block, and the others each other; the first
            token reads all.

    Raises:
        InputError: where the model's attention cannot be reached.
    """
    real = real_of(inputs)
    if isinstance(model, AttentionClassifier):
        found = model(**inputs, blocked=blocked)
        return Shown(found.logits, found.weights[:, None])
    first, at = first_tokens(real), _last(model)
    recorder = RowRecorder(SHOWN, at, detach=not torch.is_grad_enabled())
    edits: list[Edit] = [recorder]
    spans = {SHOWN: first}
    if blocked is not None:
        edits.insert(0, Blocked(at))
        spans[BLOCKED] = blocked & real
    if apart is not None:
        edits.insert(0, KeptApart())
        spans |= {MARKED: apart & real & ~first, OTHERS: real & ~apart & ~first}
    with edited(model, *edits, spans=spans):
        logits = logits_of(model(**inputs))
    (rows,) = recorder.found.values()
    if blocked is not None and len(rows) > 1:
        raise InputError(
            f"blocked: the last block of {type(model).__name__} runs {len(rows)} times in one forward, and would be blocked "
            f"each time; expected once"
        )
    return Shown(logits, rows[-1][:, :, 0])


class ClassifierAttention(Explainer):
    """The attention that a classifier shows, mean over the heads: as an explanation, what can be made to deceive.

    Args:
        by: `"weights"`; of an `AttentionClassifier` also `"norms"`, `||a_t h_t||`: what a token adds to the pooled vector,
            which finds out a small weight on a large vector.

    Example:
        >>> from cenote.explain import attention_classifier
        >>> model = attention_classifier(vocabulary=20, classes=2, dim=8, random_state=0).eval()
        >>> found = ClassifierAttention().explain(model, {"input_ids": torch.tensor([[5, 6, 7]])})
        >>> round(float(found.scores.sum()), 4)
        1.0

    Source: Pruthi et al. (2020), arXiv 1909.07913; norms: Kobayashi et al. (2020), arXiv 2004.10102.
    """

    class_agnostic = True
    family = "attention"

    def __init__(self, by: By = "weights") -> None:
        require_one_of(get_args(By), by=by)
        self.by = by

    @torch.no_grad()
    def explain(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Int[Tensor, "batch"] | None = None,  # noqa: ARG002
    ) -> Attribution:
        """Explain; it speaks of no target, see `Explainer.explain`."""
        real = real_of(inputs)
        scores = shown(model, inputs).weights.mean(1)
        if self.by == "norms":
            if not isinstance(model, AttentionClassifier):
                raise InputError(
                    f"by: 'norms' takes the states of an AttentionClassifier, got {type(model).__name__}; for transformers use "
                    f"norm-based attribution"
                )
            h, _ = model.states(inputs["input_ids"], inputs.get("attention_mask"))
            scores = scores * h.norm(dim=-1)
        return Attribution(scores.masked_fill(~real, 0.0), real)


def _last(model: nn.Module) -> Where:
    """The last block with self-attention."""
    found = [place for place in attentions(model) if place.kind == "self"]
    if not found:
        raise InputError("model: expected an AttentionClassifier, or a transformer with self-attention in blocks")
    last = found[-1]
    return Where(blocks=[last.block], kinds=["self"], stack=last.stack)
