"""Blocks and attention of a model, found by structure: no name of an architecture is known here.

A module is attention where its own forward (with its helpers, without its submodules) calls an attention function. A block is a
member of a list of modules of one class that hold attention.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from cenote.core import InputError
from cenote.models.live.calls import Kind, Place

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
FUSED = ("scaled_dot_product_attention", "multi_head_attention_forward", "dispatch_attention_fn")
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "@")
DEPTH = 3
CROSS = re.compile(r"cross|enc|memory|multihead_attn|attn2|kv_attn", re.IGNORECASE)
NORM = re.compile(r"norm|^ln_|layernorm", re.IGNORECASE)


def attentions(model: nn.Module) -> list[Place]:
    """Where attention happens in the model's blocks, in order; outside of blocks only where there are none."""
    return in_blocks(ways(model))


def in_blocks(found: Iterable[Place]) -> list[Place]:
    """Those of the places that are in blocks; all of them where none is."""
    everywhere = list(found)
    return [place for place in everywhere if place.stack] or everywhere


def blocks(model: nn.Module, attention: Iterable[Place] | None = None) -> list[Place]:
    """The blocks that hold attention, and their neighbours in the same list.

    Args:
        model: any module.
        attention: where it happens, if that is known.
    """
    stacks = dict.fromkeys(place.stack for place in attention or attentions(model) if place.stack)
    return [
        Place(number, "block", stack, f"{stack}.{name}", block)
        for stack in stacks
        for number, (name, block) in enumerate(model.get_submodule(stack).named_children())
    ]


def stacks(model: nn.Module) -> dict[str, int]:
    """Paths of the lists of blocks, and how many blocks each has."""
    counts: dict[str, int] = {}
    for place in blocks(model):
        counts[place.stack] = counts.get(place.stack, 0) + 1
    return counts


def embeddings(model: nn.Module, stack: str | None = None) -> nn.Module:
    """What makes state 0 of a stack (of the longest by default): its neighbour that holds an embedding or a convolution.

    Raises:
        InputError: where there is none, or no such stack.
    """
    before, _ = _neighbours(model, stack)
    for module in before:
        if any(isinstance(m, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in module.modules()):
            return module
    raise InputError(f"model: nothing before the blocks of {type(model).__name__} holds an embedding")


def final_norm(model: nn.Module, stack: str | None = None) -> nn.Module | None:
    """The normalisation that stands behind a stack (the longest by default), where there is one."""
    _, behind = _neighbours(model, stack)
    return next((m for m in behind if NORM.search(type(m).__name__)), None)


def _neighbours(model: nn.Module, stack: str | None) -> tuple[list[nn.Module], list[nn.Module]]:
    counts = stacks(model)
    if not counts:
        raise InputError(f"model: found no list of blocks with attention in {type(model).__name__}")
    path = stack if stack is not None else max(counts, key=lambda name: counts[name])
    if path not in counts:
        raise InputError(f"stack: {path!r} is none of {', '.join(counts)}")
    before: list[nn.Module] = []
    behind: list[nn.Module] = []
    while path:
        path, _, name = path.rpartition(".")
        names, children = zip(*model.get_submodule(path).named_children(), strict=True)
        at = names.index(name)
        before += children[:at]
        behind += children[at + 1 :]
        # some keep the norm before the blocks in the order of definition
        behind += [child for n, child in zip(names[:at], children[:at], strict=True) if re.search("final|post", n)]
    return before, behind


def how(module: nn.Module) -> str | None:
    """What its forward computes attention by: "registry", "fused", "written out", "elsewhere" (in a processor of diffusers that
    calls none of these), or None where it's no attention."""
    names: set[str] = set()
    for function in _functions(module):
        names |= set(_names(function.__code__))
        if REGISTRY in names:
            return "registry"
    if names & set(FUSED):
        return "fused"
    if "softmax" in {name.lower() for name in names} and names & set(PRODUCTS):
        return "written out"
    if hasattr(module, "processor") and hasattr(module, "to_q"):
        return "elsewhere"
    return None


def ways(model: nn.Module) -> dict[Place, str]:
    """Where attention happens, in order, and how it is computed there: see `how`."""
    by_path: dict[str, str] = {}
    by_class: dict[type, str | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        # a class is looked at once, except where an instance holds what computes attention
        if type(module) not in by_class or hasattr(module, "processor"):
            by_class[type(module)] = how(module)
        way = by_class[type(module)]
        if way is not None:
            by_path[path] = way
    inner = {
        path
        for path in by_path
        if not any(other.startswith(f"{path}." if path else "") and other != path for other in by_path)
    }
    found: list[tuple[Place, str]] = []
    firsts: dict[tuple[str, int], str] = {}
    reached: set[tuple[str, int]] = set()
    for path in by_path:
        if path not in inner:
            continue
        stack, number, rest = _block(model, path)
        module = model.get_submodule(path)
        first = firsts.setdefault((stack, number), path)
        place = Place(number, _kind(module, rest, first == path or not stack), stack, path, module)
        found.append((place, by_path[path]))
        if by_path[path] != "written out":
            reached.add((stack, number))
    # a softmax beside attention that can be reached is a router or a gate
    return {p: way for p, way in found if way != "written out" or (p.stack and (p.stack, p.block) not in reached)}


def _kind(module: nn.Module, rest: str, first: bool) -> Kind:
    if getattr(module, "add_k_proj", None) is not None or getattr(module, "added_kv_proj_dim", None):
        return "joint"
    if getattr(module, "is_cross_attention", False) or (not first and CROSS.search(rest)):
        return "cross"
    return "self"


def _block(model: nn.Module, path: str) -> tuple[str, int, str]:
    """The list that holds it as one of its blocks, the number in it, and the path inside of the block.

    Of nested lists it's the innermost whose members are all of one class: the layers of a block differ from each other, the
    stages of a network and the blocks of a stage don't. Where no list is like this, it's the outermost.
    """
    parts = path.split(".")
    lists = []
    for i in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:i]))
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            alike = len({type(child) for child in parent.children()}) == 1
            number = [name for name, _ in parent.named_children()].index(parts[i])
            lists.append((alike, ".".join(parts[:i]), number, ".".join(parts[i + 1 :])))
    if not lists:
        return "", 0, path
    _, stack, number, rest = next((found for found in reversed(lists) if found[0]), lists[0])
    return stack, number, rest


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """Its forward and the helpers that this calls: methods, functions of the same file, callables that it holds."""
    todo: list[tuple[Callable[..., Any], object, int]] = [(type(module).forward, module, 0)]
    seen: set[FunctionType] = set()
    while todo:
        call, owner, depth = todo.pop()
        function = inspect.unwrap(call)
        if isinstance(function, MethodType):
            function = function.__func__
        if not isinstance(function, FunctionType) or function in seen:
            continue
        if function.__module__ == "torch.nn.modules.module":
            continue
        seen.add(function)
        yield function
        if depth == DEPTH:
            continue
        for name in _names(function.__code__):
            beside = function.__globals__.get(name)
            if isinstance(beside, FunctionType) and beside.__module__ == function.__module__:
                todo.append((beside, owner, depth + 1))
            own = inspect.getattr_static(owner, name, None)
            if isinstance(own, (FunctionType, staticmethod)):
                todo.append((getattr(owner, name), owner, depth + 1))
            elif not isinstance(own, (nn.Module, type)) and name in getattr(owner, "__dict__", {}) and callable(own):
                todo.append((type(own).__call__, own, depth + 1))


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """What a function's body names; read once, as a model has many modules of one class."""
    names = set(code.co_names)
    if any(
        step.opname in ("BINARY_OP", "BINARY_MATRIX_MULTIPLY") and step.argrepr == "@"
        for step in dis.get_instructions(code)
    ):
        names.add("@")
    return frozenset(names).union(*(_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)))
