"""The features that enter a classifier's last linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain.images import require_eval
from cenote.models.live.passing import passing

CLOSE = 1e-4


class Tapped(NamedTuple):
    """What enters the last layer, and the layer.

    Attributes:
        features: of the items.
        weight, bias: of the layer.
        logits: of the model.
        path: of the layer.
    """

    features: Float[Tensor, "items dim"]
    weight: Float[Tensor, "classes dim"]
    bias: Float[Tensor, "classes"]
    logits: Float[Tensor, "items classes"]
    path: str


@torch.no_grad()
def tap(model: nn.Module, inputs: Mapping[str, Any], layer: str | None = None) -> Tapped:
    """Run a classifier and keep what enters its last linear layer: the pooled map of a CNN, the [CLS] of a ViT.

    Args:
        model: in eval mode.
        inputs: of its forward.
        layer: path of the layer; the last `torch.nn.Linear` of the model by default.

    Raises:
        InputError: where `W f + b` are not the model's logits, so that the layer is not the last one.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> found = tap(model, {"input": torch.randn(5, 3)})
        >>> found.path, found.features.shape
        ('2', torch.Size([5, 4]))
    """
    require_eval(model)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    path = layer if layer is not None else (linear[-1] if linear else None)
    if path is None:
        raise InputError("model: has no torch.nn.Linear, so that nothing attenuates its features")
    with passing(model, {path: None}) as seen:
        given = model(**inputs)
    last = model.get_submodule(path)
    if not isinstance(last, nn.Linear):
        raise InputError(f"layer: {path!r} is {type(last).__name__}, expected a torch.nn.Linear")
    found = getattr(given, "logits", None)
    logits = found if found is not None else given if isinstance(given, Tensor) else given[0]
    if path not in seen:
        raise InputError(f"layer: {path!r} did not run")
    features = seen[path].given
    bias = last.bias if last.bias is not None else last.weight.new_zeros(last.out_features)
    own = features @ last.weight.T + bias if features.dim() == 2 else None
    if own is None or own.shape != logits.shape or float((own - logits).abs().max()) > CLOSE:
        raise InputError(
            f"layer: {path!r} times what enters it is not what the model gives; the scores are not those of one linear "
            "layer of [items, dim] features, or name another layer"
        )
    return Tapped(features, last.weight.detach(), bias.detach(), logits, path)
