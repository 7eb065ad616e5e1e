"""The input of a model as real numbers, and the model as a function of it: what perturbs or differentiates needs both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError


@dataclass(frozen=True, eq=False)
class Embedded:
    """One item, as real numbers: the embeddings of its tokens, or its pixels.

    Attributes:
        x: `[1, tokens, dim]`, or an image.
        centre: what stands for nothing: the mean of all embeddings; black of images, see `zero`.
        logits: from any number of such inputs to the model's outputs.
    """

    x: Float[Tensor, "1 *shape"]
    centre: Float[Tensor, "1 *shape"]
    logits: Callable[[Float[Tensor, "rows *shape"]], Float[Tensor, "rows outputs"]]


def output_of(found: Any) -> Float[Tensor, "rows outputs"]:
    """The logits of what a model gave.

    Raises:
        InputError: where they are not one row per input.
    """
    given = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    if given is None and isinstance(found, tuple | list) and found and isinstance(found[0], Tensor):
        given = found[0]
    if given is None or given.dim() != 2:
        told = type(found).__name__ if given is None else list(given.shape)
        raise InputError(f"model: expected logits [batch, outputs], as a classifier gives them, got {told}")
    return given


def embedded(model: nn.Module, inputs: Mapping[str, Any]) -> Embedded:
    """The one item of `inputs` as real numbers.

    Raises:
        InputError: where no embedding reads the numbers of tokens, and there are no real numbers either.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    ids = next((v for v in tensors.values() if not v.is_floating_point() and v.dim() == 2), None)
    real = next((name for name, v in tensors.items() if v.is_floating_point() and v.dim() > 1), None)
    if real is not None:
        x = tensors[real]
        if x.dim() not in (3, 4):
            raise InputError(
                f"inputs: expected {real} of [batch, tokens, dim] or [batch, channels, height, width], got {list(x.shape)}"
            )

        def of_pixels(rows: Tensor) -> Tensor:
            return output_of(model(**{**_repeated(inputs, len(rows)), real: rows}))

        return Embedded(x, torch.zeros_like(x), of_pixels)
    named = inputs.get("input_ids", ids)
    if named is None:
        raise InputError(f"inputs: expected numbers of tokens or pixels, got {', '.join(inputs) or 'nothing'}")
    table, x = _looked_up(model, inputs, named)

    def of_embeddings(rows: Tensor) -> Tensor:
        with _given(table, rows):
            return output_of(model(**_repeated(inputs, len(rows))))

    centre = table.weight.detach().mean(0).expand_as(x).clone()
    return Embedded(x, centre, of_embeddings)


@torch.no_grad()
def _looked_up(
    model: nn.Module, inputs: Mapping[str, Any], ids: Int[Tensor, "1 tokens"]
) -> tuple[nn.Embedding, Tensor]:
    """The table that reads the numbers of the tokens, and what it gives for them."""
    found: list[tuple[nn.Embedding, Tensor]] = []

    def look(module: nn.Module, given: tuple[Any, ...], gave: Any) -> None:
        if given and isinstance(given[0], Tensor) and given[0].shape == ids.shape and torch.equal(given[0], ids):
            found.append((module, gave))  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise InputError(
            f"model: no embedding of {type(model).__name__} reads the numbers of the tokens; it has no gradient there"
        )
    # positions are numbers too; the table of words is the larger
    table, gave = max(found, key=lambda pair: pair[0].num_embeddings)
    return table, gave.detach()


@contextmanager
def _given(table: nn.Embedding, rows: Tensor) -> Iterator[None]:
    def give(_module: nn.Module, _given: tuple[Any, ...], gave: Tensor) -> Tensor:
        return rows if gave.shape == rows.shape else gave

    hook = table.register_forward_hook(give)
    try:
        yield
    finally:
        hook.remove()


def _repeated(inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {n: v.expand(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v for n, v in inputs.items()}
