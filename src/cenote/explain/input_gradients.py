"""What the gradient at the embeddings says of each token, of any model that has input embeddings.

Source: Simonyan et al. (2014), arXiv 1312.6034; integrated: Sundararajan et al. (2017), arXiv 1703.01365.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.base import Attribution, Explainer
from cenote.explain.embedded import given_embeddings

Form = Literal["times input", "norm", "integrated"]


def logits_of(output: Any) -> Float[Tensor, "batch classes"]:
    """Of what a classifier gave: its `logits`, or itself."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise InputError("model: expected a classifier, whose output has logits [batch, classes]")
    return found


def chosen_targets(logits: Float[Tensor, "batch classes"], target: Int[Tensor, "batch"] | None) -> Int[Tensor, "batch"]:
    """The given targets, or the model's own; of one logit, 1 is the class it speaks for and 0 the other."""
    if target is None:
        return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    classes = max(2, logits.shape[1])
    if target.shape != logits.shape[:1] or bool(((target < 0) | (target >= classes)).any()):
        raise InputError(f"target: expected {len(logits)} classes below {classes}, got {target.tolist()}")
    return target


def target_logits(logits: Float[Tensor, "batch classes"], target: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """The logit of each target; of one logit, its sign turned for class 0."""
    if logits.shape[1] == 1:
        return logits[:, 0] * (2 * target - 1)
    return logits.gather(1, target[:, None])[:, 0]


def real_of(inputs: Mapping[str, Any]) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are real."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        raise InputError("inputs: expected input_ids [batch, tokens], with a token")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    if real.shape != ids.shape or not bool(real.any(1).all()):
        raise InputError("attention_mask: expected one for each of input_ids, with a real token in every item")
    return real


def input_gradients(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Int[Tensor, "batch"] | None = None,
    *,
    form: Form = "times input",
    steps: int = 32,
    baseline: int | None = None,
    create_graph: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """A number for each token: `sum_d g_td x_td`, `sum_d |g_td|`, or `sum_d (x - x0)_td int_0^1 g_td(x0 + c (x - x0)) dc`.

    `g` is the gradient of the target's logit at the embeddings x. Zero in padding.

    Args:
        model: a classifier with `get_input_embeddings`.
        inputs: of its forward.
        target: classes; the model's own choice by default.
        form: `"times input"`, `"norm"` or `"integrated"` (by the midpoint rule).
        steps: of `"integrated"`.
        baseline: the token whose embedding is `x0`; zeros by default.
        create_graph: whether the result can be differentiated again, as a loss on explanations needs it.

    Raises:
        InputError: where the model or the inputs are of another kind.
    """
    require_one_of(get_args(Form), form=form)
    require_at_least(1, steps=steps)
    real = real_of(inputs)
    x = token_embeddings(model, inputs)
    with torch.enable_grad():
        if form != "integrated":
            x, g = _gradient(model, x, inputs, target, create_graph)
            scores = (g * x).sum(-1) if form == "times input" else g.abs().sum(-1)
        else:
            x0 = _empty(model, x, baseline)
            if target is None:
                target = chosen_targets(_logits(model, inputs, x).detach(), None)
            total = torch.zeros_like(x)
            for step in range(steps):
                share = (step + 0.5) / steps
                total = total + _gradient(model, x0 + share * (x - x0), inputs, target, create_graph)[1]
            scores = ((x - x0) * total / steps).sum(-1)
    scores = scores.masked_fill(~real, 0.0)
    return scores if create_graph else scores.detach()


def token_embeddings(model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "batch tokens dim"]:
    """What the model's table gives for the tokens."""
    return _table(model)(inputs["input_ids"])


def _table(model: nn.Module) -> nn.Module:
    look_up = getattr(model, "get_input_embeddings", None)
    if look_up is None:
        raise InputError(f"model: {type(model).__name__} has no get_input_embeddings, so no gradient at them")
    return cast(nn.Module, look_up())


def _logits(model: nn.Module, inputs: Mapping[str, Any], x: Float[Tensor, "batch tokens dim"]) -> Tensor:
    """With these embeddings of the tokens."""
    with given_embeddings(_table(model), x):
        return logits_of(model(**inputs))


def _gradient(
    model: nn.Module, x: Tensor, inputs: Mapping[str, Any], target: Tensor | None, create_graph: bool
) -> tuple[Tensor, Tensor]:
    x = x if create_graph and x.requires_grad else x.detach().requires_grad_()
    logits = _logits(model, inputs, x)
    wanted = target_logits(logits, chosen_targets(logits.detach(), target)).sum()
    (g,) = torch.autograd.grad(wanted, x, create_graph=create_graph)
    return x, g


def _empty(model: nn.Module, x: Tensor, baseline: int | None) -> Tensor:
    """Where a path of integrated gradients begins."""
    if baseline is None:
        return torch.zeros_like(x)
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight[baseline].expand_as(x)


class InputGradients(Explainer):
    """What the gradient at the embeddings says of each token, see `input_gradients`.

    Args:
        form: `"times input"` (signed), `"norm"`, or `"integrated"` (signed; its completeness error is told).
        steps, baseline: of `"integrated"`.

    Example:
        >>> from cenote.explain import attention_classifier
        >>> model = attention_classifier(vocabulary=20, classes=2, dim=8, random_state=0).eval()
        >>> InputGradients().explain(model, {"input_ids": torch.tensor([[5, 6, 7]])}).scores.shape
        torch.Size([1, 3])

    Source: Simonyan et al. (2014), arXiv 1312.6034; Sundararajan et al. (2017), arXiv 1703.01365.
    """

    family = "gradients"

    def __init__(self, form: Form = "times input", steps: int = 32, baseline: int | None = None) -> None:
        require_one_of(get_args(Form), form=form)
        require_at_least(1, steps=steps)
        self.form, self.steps, self.baseline = form, steps, baseline

    def explain(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Int[Tensor, "batch"] | None = None
    ) -> Attribution:
        """Explain, see `Explainer.explain`."""
        real = real_of(inputs)
        with torch.no_grad():
            logits = logits_of(model(**inputs))
        target = chosen_targets(logits, target)
        scores = input_gradients(model, inputs, target, form=self.form, steps=self.steps, baseline=self.baseline)
        error = None
        if self.form == "integrated":
            x = token_embeddings(model, inputs)
            with torch.no_grad():
                nothing = _empty(model, x, self.baseline)
                before = target_logits(_logits(model, inputs, nothing), target)
            error = (scores.sum(1) - (target_logits(logits, target) - before)).abs()
        return Attribution(scores, real, target=target, signed=self.form != "norm", completeness_error=error)
