"""The contract of a window pool, as a check that anybody can run on their own class."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.testing import rules
from cenote.testing.contract import difference as _difference
from cenote.testing.contract import run_rules

_AVERAGE: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_BATCH = 2


def check_spatial_pool(
    pool: nn.Module,
    *,
    channels: int | None = None,
    size: Sequence[int] | None = None,
    seed: int = 0,
    leave_out: Collection[str] = (),
) -> None:
    """Check everything that cenote promises of a window pool.

    The output has the shape that `torch.nn.AvgPool2d` gives for the same window, with a batch and without. Each output depends
    on its own window alone, and so do batch mates on theirs. Where declared, a constant map gives its constant. Values of any
    magnitude stay finite, with their gradients. Gradients agree with finite differences in float64 and reach every parameter.
    Half precision is finite and close. The module compiles in one graph, exports, deep-copies, survives safetensors, repeats
    itself, and takes channels-last and non-contiguous input. `attend`, where there is one, agrees with calling, and its
    weights give the output. A wrong input is named.

    The pool given is not changed. Parameters are shaken in a copy, because zeros at initialisation hide mistakes.

    Args:
        pool: with `dims`, `kernel_size`, `stride`, `padding`, `ceil_mode` as in `torch.nn.AvgPool2d`, `keeps_constants`, and
            `channels` where each channel has parameters of its own.
        channels: of the trial maps; default what the pool says, else 3.
        size: of the trial maps, for a pool that is built for one size; default a few windows and a remainder.
        seed: of the trial inputs.
        leave_out: names of rules that are not checked; a broken rule's name stands at the end of its line.

    Raises:
        ContractError: with one line per broken rule.
        InputError: where `leave_out` names a rule that there is not.

    Example:
        >>> check_spatial_pool(cenote.pool.SoftPool2d(2))
    """
    run_rules(pool, _RULES, _Trial(pool, channels, size, seed), leave_out=leave_out)


class _Trial(rules.Trial):
    """Inputs and copies that the rules share."""

    def __init__(self, pool: nn.Module, channels: int | None, size: Sequence[int] | None, seed: int) -> None:
        super().__init__(pool, seed)
        given: Any = pool
        self.dims: int = given.dims
        self.kernel = self.per_dimension(given.kernel_size)
        self.stride = self.per_dimension(given.stride)
        self.padding = self.per_dimension(given.padding)
        self.ceil_mode = bool(given.ceil_mode)
        self.keeps_constants = bool(getattr(pool, "keeps_constants", True))
        own = getattr(pool, "channels", None)
        self.channels: int = channels or own or 3
        windows = zip(self.kernel, self.stride, strict=True)
        self.size = tuple(size) if size is not None else tuple(k + (3 - i) * s + 1 for i, (k, s) in enumerate(windows))
        self.x = self.randn(_BATCH, self.channels, *self.size)

    def per_dimension(self, given: Any) -> tuple[int, ...]:
        return (given,) * self.dims if isinstance(given, int) else tuple(given)

    def average(self, x: Tensor) -> Tensor:
        return _AVERAGE[self.dims](x, self.kernel, self.stride, self.padding, self.ceil_mode)


def _rule_output_shape(t: _Trial) -> str | None:
    for x, name in ((t.x, "a batch"), (t.x[0], "a single map")):
        y, expected = t.pool(x), t.average(x)
        if y.shape != expected.shape:
            return f"output shape: got {tuple(y.shape)} for {name} of {tuple(x.shape)}, AvgPool gives {tuple(expected.shape)}"
    return None


def _rule_single_map(t: _Trial) -> str | None:
    if (difference := _difference(t.pool(t.x)[0], t.pool(t.x[0]))) > 1e-10:
        return f"single map: without a batch the output differs by {difference:.3g}"
    return None


def _rule_window(t: _Trial) -> str | None:
    x = t.x[:1].clone().requires_grad_()
    y, average = t.pool(x), t.average(x)
    windows = math.prod(y.shape[2:])
    for i in {0, windows // 2, windows - 1}:
        reads, inside = (
            torch.autograd.grad(out.flatten(2)[..., i].sum(), x, retain_graph=True)[0].abs().sum(1) > 0
            for out in (y, average)
        )
        if bool((reads & ~inside).any()):
            return f"window: output {i} depends on cells outside of its window"
        if not bool((reads & inside).any()):
            return f"window: output {i} does not depend on its window"
    return None


def _rule_batch_mates(t: _Trial) -> str | None:
    alone = torch.cat([t.pool(t.x[i : i + 1]) for i in range(_BATCH)])
    if (difference := _difference(t.pool(t.x), alone)) > 1e-10:
        return f"batch: a map's output changes by {difference:.3g} when its batch mates are taken away"
    return None


def _rule_constant_map(t: _Trial) -> str | None:
    if not t.keeps_constants:
        return None
    for constant in (-2.5, 0.0, 4.0):
        x = torch.full_like(t.x, constant).requires_grad_()
        y = t.pool(x)
        if (difference := _difference(y, torch.full_like(y, constant))) > 1e-10:
            return (
                f"constant map: {constant} everywhere gives an output that differs from it by {difference:.3g}, but "
                f"keeps_constants is declared True; leave out cells outside of the map"
            )
        if not bool(torch.autograd.grad(y.sum(), x)[0].isfinite().all()):
            return f"constant map: {constant} everywhere makes gradients NaN or infinite"
    return None


def _rule_any_magnitude(t: _Trial) -> str | None:
    pool = copy.deepcopy(t.pool).float()
    for scale in (1e-30, 1e4, 1e30):
        x = (t.x * scale).float().requires_grad_()
        y = pool(x)
        if not bool(y.isfinite().all()):
            return f"magnitude: values around {scale:.0e} in float32 give NaN or infinity"
        if not bool(torch.autograd.grad(y.sum(), x)[0].isfinite().all()):
            return f"magnitude: values around {scale:.0e} in float32 make gradients NaN or infinite"
    return None


def _rule_gradients_are_right(t: _Trial) -> str | None:
    return rules.gradient_error(t.pool, t.output, t.x[:1])


def _rule_half_precision(t: _Trial) -> str | None:
    return rules.half_precision_error(t.pool, t.output, t.x, 0.05, 0.01)


def _rule_torch_compile_in_one_graph(t: _Trial) -> str | None:
    x = t.x.clone().requires_grad_()
    y, expected = rules.compiled(t.pool)(x), t.pool(x)
    if (difference := _difference(expected, y)) > 1e-10:
        return f"compile: torch.compile(fullgraph=True) changes the output by {difference:.3g}"
    got, true = (torch.autograd.grad(out.sum(), x)[0] for out in (y, expected))
    if (difference := _difference(true, got)) > 1e-10:
        return f"compile: torch.compile(fullgraph=True) changes the gradient by {difference:.3g}"
    return None


def _rule_torch_export(t: _Trial) -> str | None:
    return rules.export_error(t.pool, t.x)


def _rule_memory_layout(t: _Trial) -> str | None:
    layouts = [("other strides", t.x.transpose(1, -1).contiguous().transpose(1, -1))]
    if t.x.dim() in _CHANNELS_LAST:
        layouts.append(("channels last", t.x.contiguous(memory_format=_CHANNELS_LAST[t.x.dim()])))
    for name, x in layouts:
        if (difference := _difference(t.pool(t.x), t.pool(x))) > 1e-10:
            return f"memory layout: the same numbers with {name} change the output by {difference:.3g}"
    return None


def _rule_attend(t: _Trial) -> str | None:
    attend = getattr(t.pool, "attend", None)
    if attend is None:
        return None
    output, weights = attend(t.x)
    if (difference := _difference(output, t.pool(t.x))) > 1e-10:
        return f"attend: its output differs from the call's by {difference:.3g}"
    if weights is None:
        return None
    expected = (*output.shape, *t.kernel)
    if weights.shape != expected:
        return f"attend: weights have shape {tuple(weights.shape)}, expected {expected}: [batch, channels, *windows, *kernel]"
    flat = weights.flatten(-t.dims)
    if bool((flat < 0).any()) or _difference(flat.sum(-1), torch.ones_like(output)) > 1e-10:
        return "attend: the weights of a window are negative or do not sum to 1"
    if (difference := _difference(output, (flat * _cells(t)).sum(-1))) > 1e-10:
        return f"attend: the weighted sum of a window's cells differs from the output by {difference:.3g}"
    return None


def _cells(t: _Trial) -> Tensor:
    """`[batch, channels, *windows, cells]`: the cells of each window, 0 outside of the map."""
    x = t.x
    windows = t.average(x).shape[2:]
    pads = [n for k, p in zip(reversed(t.kernel), reversed(t.padding), strict=True) for n in (p, p + k)]
    x = F.pad(x, pads)
    for axis, (k, s, n) in enumerate(zip(t.kernel, t.stride, windows, strict=True), start=2):
        x = x.unfold(axis, k, s).narrow(axis, 0, n)
    return x.flatten(-t.dims)


def _rule_wrong_input_is_named(t: _Trial) -> str | None:
    tiny = (1,) * t.dims
    wrong: list[tuple[str, Tensor]] = [
        ("a tensor without channels", t.x[0, 0]),
        ("a tensor with one dimension too many", t.x.unsqueeze(0)),
        ("integers", t.x.long()),
    ]
    if any(k - 2 * p > 1 for k, p in zip(t.kernel, t.padding, strict=True)):
        wrong.append(("a map smaller than a window", t.randn(1, t.channels, *tiny)))
    return rules.unnamed_input({name: functools.partial(t.pool, x) for name, x in wrong})


_RULES: tuple[Callable[[_Trial], str | None], ...] = (
    _rule_output_shape,
    _rule_single_map,
    _rule_window,
    rules._rule_determinism,
    _rule_batch_mates,
    _rule_constant_map,
    _rule_any_magnitude,
    _rule_gradients_are_right,
    rules._rule_gradient_reaches_every_parameter,
    _rule_half_precision,
    _rule_torch_compile_in_one_graph,
    _rule_torch_export,
    rules._rule_deepcopy,
    rules._rule_safetensors_round_trip,
    _rule_memory_layout,
    _rule_attend,
    _rule_wrong_input_is_named,
)
