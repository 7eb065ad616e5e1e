"""Whether a stack of blocks can go on with fewer tokens; where not, why, and what would work."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from torch import nn

from cenote.core import InputError
from cenote.models.live import places, transformers
from cenote.models.live.calls import Place
from cenote.models.live.shortening import MASKS, Cut

PLACEHOLDER = re.compile("(image|video|audio)_token_(id|index)$")
OWN_POSITIONS = re.compile("rotary|(^|[._])rope|rel_pos|relative|distance|position|bias_table", re.IGNORECASE)
UNKNOWN = ("relative_pos", "sinusoidal_pos", "per_layer_input")
"""Told of all tokens in forms of their own: as in DeBERTa, RoFormer, Gemma 3n."""


def checked(model: nn.Module, cut: Cut) -> tuple[nn.Module, list[Place], list[Place], list[Place]]:
    """The stack, its blocks, its attention, and the attention of others that may read what comes out of it."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    everywhere = places.attentions(model)
    by_stack: dict[str, list[Place]] = {}
    for place in places.blocks(model, everywhere):
        by_stack.setdefault(place.stack, []).append(place)
    path = next(iter(by_stack)) if cut.stack is None and len(by_stack) == 1 else cut.stack
    if path is None or path not in by_stack:
        raise InputError(f"stack: {path!r} is none of {', '.join(map(repr, by_stack)) or 'the model, which has none'}")
    blocks, here = by_stack[path], [place for place in everywhere if place.stack == path]
    last = len(blocks) - 1
    if not 0 <= cut.block <= last:
        raise InputError(f"block: expected one of 0 to {last} of {path}, got {cut.block}")
    if cut.restore is not None and not (cut.restore == -1 or cut.block <= cut.restore <= last):
        raise InputError(f"restore: expected -1 or a block of {cut.block} to {last}, got {cut.restore}")
    until = len(blocks) if cut.restore is None else cut.restore % len(blocks) + 1
    crossed = [place for place in everywhere if place.kind == "cross" and place.stack != path]
    why = _why_not(model, cut, blocks, here, until)
    if why:
        raise InputError(f"model: {path} cannot be shortened: {why}")
    return model.get_submodule(path), blocks, here, crossed


def _why_not(model: nn.Module, cut: Cut, blocks: Sequence[Place], here: Sequence[Place], until: int) -> str | None:
    """What stands against it, and what would work, in words."""
    causal = any(getattr(place.module, "is_causal", False) for place in here)
    for place in blocks:
        if any(hasattr(module, "window_size") for module in place.module.modules()):
            return f"{place.path} attends in windows of a grid; reduce what comes out of the model"
    for place in here:
        name = place.path
        if place.kind != "self":
            return f"{name} is {place.kind} attention, whose tokens come from elsewhere too; give the stack that makes these"
        if getattr(getattr(place.module, "config", None), "attention_chunk_size", None):
            return (
                f"{name} attends in chunks of tokens that it counts itself; reduce before the model, or in another one"
            )
        implementation = transformers.implementation_of(place.module)
        if "flash" in implementation or "flex" in implementation or "paged" in implementation:
            return f"{implementation!r} is told no positions of single keys; load it with attn_implementation='sdpa' or 'eager'"
        if isinstance(place.module, nn.MultiheadAttention) and not place.module.batch_first:
            return f"{name} reads [tokens, batch, dim]; make it with batch_first=True"
    config = getattr(model, "config", None)
    if len(blocks) == 1 and getattr(config, "num_hidden_layers", 1) > 1:
        return "its one block runs several times, and there is no block behind it"
    parameters = [inspect.signature(place.module.forward).parameters for place in blocks]
    if any("cu_seqlens" in taken for taken in parameters):
        return "it packs several images into one row of tokens; shorten the text's stack, in the span of the image"
    unknown = next((name for taken in parameters for name in taken if name in UNKNOWN), None)
    if unknown:
        return f"its blocks are given {unknown}, of which nobody knows how it goes with fewer tokens; reduce before the model"
    if any(p.kind is p.VAR_POSITIONAL for taken in parameters for p in taken.values()):
        return "its blocks don't name their arguments, so that masks and positions cannot be told apart"
    named = vars(config) if config is not None else {}
    placeholder = next((name for name in named if PLACEHOLDER.match(name)), None)
    if placeholder and not causal and cut.restore is None:
        return (
            f"its features take the places of the text's tokens of config.{placeholder}, one each; shorten the text's stack, "
            f"in the span of the image, or put tokens back (restore=-1)"
        )
    above = inspect.unwrap(type(model.get_submodule(blocks[0].stack.rpartition(".")[0])).forward).__code__
    if cut.restore is None and "output_shape" in above.co_varnames:
        return "what comes out of it is given the shape of what went in; put tokens back (restore=-1)"
    for place in blocks[cut.block + 1 : until]:
        if not any(other.block == place.block for other in here):
            return f"{place.path} has no attention, and nobody knows what it makes of fewer tokens; cut behind it"
        own = own_positions(place.module)
        if own:
            return (
                f"{place.path}.{own} knows positions or neighbours by itself, by counting tokens; cut behind the last such "
                f"block, or reduce what comes out of the model"
            )
    if cut.proportional and not any(name in taken for taken in parameters for name in MASKS):
        return "its blocks take no mask, through which keys could weigh by their sizes; give proportional=False"
    return None


def own_positions(block: nn.Module) -> str | None:
    """The part of a block that knows where tokens stand without being told."""
    for path, module in block.named_modules():
        own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        named = next((name for name in own if OWN_POSITIONS.search(name)), None)
        if named:
            return f"{path}.{named}" if path else named
        last = path.rpartition(".")[2]
        wide = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and any(size > 1 for size in module.kernel_size)
        if path and (wide or OWN_POSITIONS.search(last) or OWN_POSITIONS.search(type(module).__name__)):
            return path
    return None
