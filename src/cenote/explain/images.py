"""What explanations of image classifiers share: which input is the image, and what the model makes of others in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError

Scores = Callable[[Float[Tensor, "items channels height width"]], Float[Tensor, "items classes"]]


def image_in(inputs: Mapping[str, Any]) -> str:
    """The name of the one input that is a batch of images.

    >>> image_in({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)})
    'pixel_values'
    """
    found = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.dim() == 4 and v.is_floating_point()]
    if len(found) != 1:
        named = ", ".join(found) or "none"
        raise InputError(f"inputs: expected one batch of images [batch, channels, height, width], got {named}")
    return found[0]


def class_scores(model: nn.Module, inputs: Mapping[str, Any], item: int | None = None) -> Scores:
    """The model as a function of images alone.

    Args:
        model: an image classifier; where it scores every place of a map, the mean over places counts.
        inputs: of its forward.
        item: the item whose other inputs stay beside any number of images; `None` where images are those of the batch.
    """
    name = image_in(inputs)
    others = {n: v for n, v in inputs.items() if n != name}

    def scores(images: Float[Tensor, "items channels height width"]) -> Float[Tensor, "items classes"]:
        beside = others if item is None else {n: _repeated(v, item, len(images)) for n, v in others.items()}
        return scored(model(**{name: images}, **beside))

    return scores


def scored(output: Any) -> Float[Tensor, "items classes"]:
    """Scores of classes from what a model gave: a tensor, something with `logits`, or a tuple that begins with them."""
    found = getattr(output, "logits", None)
    if found is None:
        found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor) or found.dim() not in (2, 4):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"model: expected scores [batch, classes], or [batch, classes, height, width], got {shape}")
    return found.mean((2, 3)) if found.dim() == 4 else found


def chosen(scores: Float[Tensor, "items classes"], target: Int[Tensor, "items"] | None) -> Int[Tensor, "items"]:
    """The classes that are explained: those asked for, or the model's own choice."""
    items, classes = scores.shape
    if target is None:
        return scores.argmax(1)
    if target.shape != (items,) or bool(((target < 0) | (target >= classes)).any()):
        raise InputError(f"target: expected {items} numbers of classes from 0 to {classes - 1}, got {target.tolist()}")
    return target.to(scores.device)


def require_eval(model: nn.Module) -> None:
    """Raise `InputError` for a model in training, whose answers change from call to call."""
    if model.training:
        raise InputError("model: expected one in eval mode; call model.eval() before")


def _repeated(value: Any, item: int, times: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0:
        return value[item : item + 1].expand(times, *value.shape[1:])
    return value
