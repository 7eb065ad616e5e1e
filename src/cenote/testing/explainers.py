"""The contract of explainers, as a check that anybody can run on their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.redrawn import STILL_ALIKE, rank_correlation, redrawn
from cenote.testing.as_found import AsFound
from cenote.testing.contract import difference, run_rules

CLOSE = 1e-5
REDRAWS = 3
UNLIKELY_SEED = 739_204_117


@runtime_checkable
class Explaining(Protocol):
    """What is checked: an explainer, of `cenote.explain` or your own."""

    class_agnostic: bool

    def explain(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor | None = None) -> Any:
        """From a model and inputs to something with `scores`, `mask` and `units`."""


class _Trial:
    def __init__(self, explainer: Explaining, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.explainer, self.model, self.inputs = explainer, model, dict(inputs)
        self.mask: Tensor | None = self.inputs.get("attention_mask")
        first = _images(self.inputs) if self.mask is None else self.mask
        self.items = 0 if first is None else len(first)
        # of images every unit is real
        self.lengths: list[int | None] = [None] * self.items if self.mask is None else self.mask.sum(1).tolist()

    def explained(self, **changes: Any) -> Any:
        return self.explainer.explain(self.model, {**self.inputs, **changes})

    def item(self, number: int) -> dict[str, Any]:
        """One item without its padding."""
        real = None if self.mask is None else self.mask[number].bool()
        return {name: _cut(v[number : number + 1], real) for name, v in self.inputs.items()}


def check_explainer(
    explainer: Explaining,
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    leave_out: Collection[str] = (),
) -> None:
    """Check that an explainer keeps what is promised of every explainer.

    Scores are finite and zero in padding. Batch mates change nothing, nor does padding on either side, where it does not change
    the model's own output; the same call gives the same
    numbers, and global random generators stay as they are. Two targets are told apart, unless the class says that it speaks of
    none. With other weights in the model the ranks change. The model is left as it was.

    Args:
        explainer: to check.
        model: in eval mode, with parameters.
        inputs: a batch of at least two items of different lengths, padded on the right: `input_ids` and `attention_mask`; or
            at least two images `[batch, channels, height, width]` under the name that the model has for them.
        leave_out: names of rules that are not checked.

    Raises:
        ContractError: with one line per broken rule.
        InputError: for inputs that cannot show it, and where `leave_out` names a rule that there is not.
    """
    mask, images = inputs.get("attention_mask"), _images(inputs)
    uneven = isinstance(mask, Tensor) and mask.dim() == 2 and len(set(mask.sum(1).tolist())) > 1
    if not (uneven if mask is not None else images is not None and len(images) > 1):
        raise InputError(
            "inputs: expected input_ids and attention_mask of at least two items of different lengths, padded on the right, "
            "or at least two images"
        )
    if model.training or not any(True for _ in model.parameters()):
        raise InputError("model: expected one in eval mode, with parameters")
    run_rules(explainer, _RULES, _Trial(explainer, model, inputs), leave_out=leave_out, first=(_rule_form,))


def _rule_form(trial: _Trial) -> str | None:
    found = trial.explained()
    if not all(hasattr(found, name) for name in ("scores", "mask", "units")):
        return f"form: explain gave {type(found).__name__}, expected an Attribution"
    if not bool(found.scores.isfinite().all()):
        return "form: scores are NaN or infinite"
    if trial.mask is None and not bool(found.mask.all()):
        return "form: the mask leaves units of an image out"
    if trial.mask is not None and found.units == "tokens" and not torch.equal(found.mask, trial.mask.bool()):
        return "form: the mask is not that of the tokens"
    return None


def _rule_batch_mates(trial: _Trial) -> str | None:
    found = trial.explained()
    for number, length in enumerate(trial.lengths):
        alone = trial.explainer.explain(trial.model, trial.item(number)).scores
        if (off := difference(found.scores[number : number + 1, :length], alone)) > CLOSE:
            return f"batch mates: item {number} alone differs by {off:.1e}; its padding or its batch mates change it"
    return None


def _rule_left_padding(trial: _Trial) -> str | None:
    if trial.mask is None:
        return None
    found = trial.explained()
    longest = int(trial.mask.shape[1])
    for number, length in enumerate(trial.lengths):
        if length is None or length == longest:
            continue
        item = trial.item(number)
        left = {n: nn.functional.pad(v, (longest - length, 0)) if v.dim() == 2 else v for n, v in item.items()}
        left.setdefault("position_ids", (left["attention_mask"].cumsum(1) - 1).clamp(min=0))
        # of a model that reads its first token, left padding is another input
        if difference(*(_output(trial.model, given, length) for given in (item, left))) > CLOSE:
            continue
        scores = trial.explainer.explain(trial.model, left).scores[:, longest - length :]
        if (off := difference(found.scores[number : number + 1, :length], scores)) > CLOSE:
            return f"left padding: item {number} padded on the left differs by {off:.1e}"
    return None


def _rule_determinism(trial: _Trial) -> str | None:
    with torch.random.fork_rng():
        # a state that nobody seeds
        torch.manual_seed(UNLIKELY_SEED)
        before = torch.get_rng_state()
        first, second = trial.explained(), trial.explained()
        after = torch.get_rng_state()
    if not torch.equal(before, after):
        return "determinism: the global random generator was used; take a random_state"
    if not torch.equal(first.scores, second.scores):
        return "determinism: the same call gave other scores"
    return None


def _rule_target(trial: _Trial) -> str | None:
    zero = torch.zeros(trial.items, dtype=torch.long)
    first, second = (trial.explainer.explain(trial.model, trial.inputs, t).scores for t in (zero, zero + 1))
    same = torch.equal(first, second)
    if trial.explainer.class_agnostic and not same:
        return "target: two targets got different scores, though class_agnostic is True"
    if not trial.explainer.class_agnostic and same:
        return "target: two targets got the same scores; heed the target, or say class_agnostic = True"
    return None


def _rule_reacts_to_the_model(trial: _Trial) -> str | None:
    """The weakest form of the parameter randomisation test (Adebayo et al. 2018)."""
    scores = trial.explained().scores
    if all(bool((s[:n] == s[0]).all()) for s, n in zip(scores, trial.lengths, strict=True)):
        return "reacts to the model: all units of every item have one score"
    alike = []
    for seed in range(REDRAWS):
        found = trial.explainer.explain(redrawn(trial.model, seed), trial.inputs).scores
        both = ((a[:n], b[:n]) for a, b, n in zip(scores, found, trial.lengths, strict=True))
        alike += [rank_correlation(a, b) for a, b in both if len(a) > 2]
    if alike and sum(alike) / len(alike) > STILL_ALIKE:
        return f"reacts to the model: with random weights ranks agree by {sum(alike) / len(alike):.2f} still"
    return None


def _rule_model_as_found(trial: _Trial) -> str | None:
    found = AsFound(trial.model, lambda: trial.model(**trial.inputs))
    gradients = _gradients(trial.model)
    trial.explained()
    if changed := found.changed():
        return f"model as found: {changed}"
    if more := sorted(_gradients(trial.model) - gradients):
        return f"model as found: {more[0]} has a gradient; take torch.autograd.grad of what is asked"
    return None


def _gradients(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def _output(model: nn.Module, inputs: Mapping[str, Any], length: int) -> Tensor:
    """What it gives for the last tokens, or for the whole."""
    found = model(**inputs)
    first = found if isinstance(found, Tensor) else found[0]
    return first[:, -length:] if first.dim() > 2 else first


def _cut(value: Tensor, real: Tensor | None) -> Tensor:
    return value[:, real] if real is not None and value.dim() > 1 and value.shape[1] == len(real) else value


def _images(inputs: Mapping[str, Any]) -> Tensor | None:
    """The one batch of images among them."""
    found = [v for v in inputs.values() if isinstance(v, Tensor) and v.dim() == 4]
    return found[0] if len(found) == 1 else None


_RULES = (
    _rule_batch_mates,
    _rule_left_padding,
    _rule_determinism,
    _rule_target,
    _rule_reacts_to_the_model,
    _rule_model_as_found,
)
