"""Keys and values that a decoder keeps between two calls, taken out of its cache and put into a new one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError

ARGUMENTS = ("cache", "past_key_values")
"""What the cache is called, in one version of transformers or another."""


class KeysValues(NamedTuple):
    """Of one block, after positions."""

    keys: Float[Tensor, "batch kv_heads tokens width"]
    values: Float[Tensor, "batch kv_heads tokens value_width"]


def held(output: Any) -> list[KeysValues]:
    """What the cache of a model's output holds, block by block.

    Raises:
        InputError: where it holds no keys of every token.
    """
    found = next((getattr(output, name) for name in ARGUMENTS if getattr(output, name, None) is not None), None)
    layers = getattr(found, "layers", None)
    if not layers:
        raise InputError(
            "model: gave no cache of keys and values; it must be a causal decoder that takes use_cache=True"
        )
    if any(getattr(layer, "is_sliding", False) or not hasattr(layer, "keys") for layer in layers):
        raise InputError(
            "model: some of its layers keep no keys of all tokens (a sliding window, or a state); take a decoder whose layers "
            "all attend to everything"
        )
    return [KeysValues(layer.keys, layer.values) for layer in layers]


def filled(model: nn.Module, blocks: Sequence[KeysValues]) -> dict[str, Any]:
    """A new cache that holds these, as the argument that this model takes; nothing where there are no blocks.

    Raises:
        InputError: where the model takes none.
    """
    from transformers import DynamicCache

    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ARGUMENTS if name in parameters), None)
    if name is None:
        raise InputError(f"model: {type(model).__name__} takes no cache; give a causal decoder")
    cache = DynamicCache()
    for number, (keys, values) in enumerate(blocks):
        cache.update(keys, values, number)
    return {name: cache}
