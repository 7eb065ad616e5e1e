"""The classic rivals (gradients, occlusion, LIME, Shapley values), as captum has them, behind one adapter."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.base import Attribution, Explainer
from cenote.explain.embedded import Embedded, embedded

Method = Literal[
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "GradientShap",
    "FeatureAblation",
    "Lime",
    "KernelShap",
    "ShapleyValueSampling",
]
Baseline = Literal["mean", "zero"]
GRADIENTS = ("Saliency", "InputXGradient", "IntegratedGradients", "GradientShap")
DRAWN = ("GradientShap", "Lime", "KernelShap", "ShapleyValueSampling")
COMPLETE = ("IntegratedGradients", "GradientShap", "KernelShap", "ShapleyValueSampling")
"""Whose scores are to sum to what the whole input has over the baseline."""
ROWS = 32


class Captum(Explainer):
    """An attribution method of captum, on the embeddings of tokens or on pixels.

    Each item is explained by itself, without its padding. Gradients are summed over a token's channels; what perturbs takes
    tokens (or patches) as they are away, a whole one at a time. The logit of the target is explained.

    Args:
        method: name of captum's class. `FeatureAblation` takes away one token after the other (occlusion).
        baseline: what stands for a token that is taken away, where the method asks: `"mean"`, the mean of all embeddings, or
            `"zero"`. Of pixels it is always zero.
        random_state: of methods that draw.
        patch: side of the squares of pixels that are scored together.
        settings: further arguments of its `attribute`, such as `n_steps` or `n_samples`.

    Raises:
        InputError: where captum is not installed, or has no such method.

    Source: Kokhlikyan et al., "Captum: A unified and generic model interpretability library for PyTorch" (2020), arXiv
    2009.07896.
    """

    def __init__(
        self, method: Method, baseline: Baseline = "mean", random_state: int = 0, patch: int = 1, **settings: Any
    ) -> None:
        require_one_of(get_args(Method), method=method)
        require_one_of(get_args(Baseline), baseline=baseline)
        require_at_least(1, patch=patch)
        self.method, self.baseline, self.random_state, self.patch = method, baseline, random_state, patch
        self.settings = settings
        self.draws = method in DRAWN
        self.family = "gradients" if method in GRADIENTS else "perturbation"
        known = inspect.signature(_captum(method).attribute).parameters
        if odd := sorted(set(settings) - set(known)):
            raise InputError(f"settings: captum's {method} takes no {odd[0]!r}; it takes {', '.join(list(known)[2:])}")
        self._takes = frozenset(known)

    def explain(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Int[Tensor, "batch"] | None = None
    ) -> Attribution:
        """Explain, see `Explainer.explain`."""
        sizes = {len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim()}
        if len(sizes) != 1:
            raise InputError(f"inputs: expected tensors of one batch, got {sorted(sizes)} items")
        given = inputs.get("attention_mask")
        items = []
        for number in range(sizes.pop()):
            real = None if given is None else given[number] != 0
            items.append(self._item(model, _one(inputs, number, real), None if target is None else int(target[number])))
        rows = [scores for scores, *_ in items]
        if given is None:
            mask = torch.ones(len(rows), max(map(len, rows)), dtype=torch.bool, device=rows[0].device)
        else:
            mask = given != 0
        scores = torch.zeros(mask.shape, dtype=rows[0].dtype, device=rows[0].device)
        scores[mask] = torch.cat(rows)
        kind = (
            "tokens"
            if "attention_mask" in inputs or "input_ids" in inputs
            else "pixels"
            if self.patch == 1
            else "patches"
        )
        chosen = torch.tensor([t for _, t, _ in items], device=scores.device)
        errors = [error for *_, error in items]
        off = None if None in errors else torch.tensor(errors, device=scores.device)
        return Attribution(scores, mask, kind, chosen, self.method != "Saliency", off)

    def _item(
        self, model: nn.Module, inputs: Mapping[str, Any], target: int | None
    ) -> tuple[Float[Tensor, "units"], int, float | None]:
        item = embedded(model, inputs)
        with torch.no_grad():
            whole = item.logits(item.x)[0]
        target = int(whole.argmax()) if target is None else target
        if not 0 <= target < len(whole):
            raise InputError(f"target: expected 0 to {len(whole) - 1}, got {target}")
        baseline = torch.zeros_like(item.x) if self.baseline == "zero" else item.centre
        with _seeded(self.random_state), _undisturbed(model):
            found = self._attributed(item, baseline, target).detach()
        units = _units(item.x, self.patch)
        flat, count = found.flatten(), int(units.max()) + 1
        scores = flat.new_zeros(count).index_add_(0, units.expand_as(item.x).flatten(), flat)
        if self.method not in GRADIENTS:
            # each number of a unit was given the unit's score
            scores = scores / (flat.numel() / count)
        error = None
        if self.method in COMPLETE:
            with torch.no_grad():
                error = abs(float(scores.sum() - (whole[target] - item.logits(baseline)[0, target])))
        return scores.to(torch.promote_types(scores.dtype, torch.float32)), target, error

    def _attributed(self, item: Embedded, baseline: Tensor, target: int) -> Tensor:
        settings: dict[str, Any] = {"target": target, **self.settings}
        if "baselines" in self._takes:
            settings["baselines"] = baseline
        if "feature_mask" in self._takes:
            settings["feature_mask"] = _units(item.x, self.patch)
        if "perturbations_per_eval" in self._takes:
            settings.setdefault("perturbations_per_eval", ROWS)
        if "internal_batch_size" in self._takes:
            settings.setdefault("internal_batch_size", ROWS)
        differentiates = self.method in GRADIENTS
        x = item.x.clone().requires_grad_(differentiates)
        with torch.set_grad_enabled(differentiates):
            return _captum(self.method)(item.logits).attribute(x, **settings)


def _captum(method: str) -> Any:
    try:
        import captum.attr
    except ImportError:
        raise InputError(f"method: {method} needs captum; pip install 'cenote[explain]'") from None
    return getattr(captum.attr, method)


def _units(x: Tensor, patch: int) -> Int[Tensor, "1 *shape"]:
    """The unit of each number: its token, or its square of pixels."""
    if x.dim() == 3:
        return torch.arange(x.shape[1], device=x.device)[None, :, None].expand_as(x).contiguous()
    height, width = x.shape[-2:]
    across = -(-width // patch)
    rows, columns = (torch.arange(n, device=x.device) // patch for n in (height, width))
    grid = rows[:, None] * across + columns
    return grid.expand(1, *x.shape[1:]).contiguous()


def _one(inputs: Mapping[str, Any], number: int, real: Tensor | None) -> dict[str, Any]:
    """One item without its padding."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        own = value[number : number + 1]
        return own[:, real] if real is not None and own.dim() > 1 and own.shape[1] == len(real) else own

    return {name: cut(value) for name, value in inputs.items()}


@contextmanager
def _seeded(random_state: int) -> Iterator[None]:
    """captum draws from the global generators."""
    numbers, words = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        np.random.seed(random_state % 2**32)
        random.seed(random_state)
        try:
            yield
        finally:
            np.random.set_state(numbers)
            random.setstate(words)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient, nor is one computed for it."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
