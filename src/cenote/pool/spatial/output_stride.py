"""Keep the feature maps of a trained net dense: strides become dilations, weights stay."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least

Net = TypeVar("Net", bound=nn.Module)
Steps = tuple[int, int]

_DILATED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_PADS: Any = {nn.MaxPool1d: nn.ConstantPad1d, nn.MaxPool2d: nn.ConstantPad2d, nn.MaxPool3d: nn.ConstantPad3d}
_UNDILATED = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def to_output_stride(net: Net, output_stride: int, example: Float[Tensor, "batch channels *map"]) -> Net:
    """A copy of `net` whose map has at most the stride `output_stride`, with the same weights.

    A stride that would lead beyond `output_stride` becomes 1, and everything after it is dilated by as much, its padding too:
    the dense map at every `n`-th position is what the strided net gives, exactly.

    Args:
        net: a trunk of convolutions and poolings (no classifier), in any arrangement, branches included.
        output_stride: 8 or 16 in the papers; a product of the net's first strides.
        example: an input, to see in which order the modules work.

    Returns:
        The copy, in eval mode.

    Raises:
        InputError: where `output_stride` lies between two strides of the net, or a module changes the size of the map and
            cannot be dilated.

    Example:
        >>> net = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, stride, 1) for stride in (2, 2, 1)))
        >>> dense, x = to_output_stride(net, 2, torch.randn(1, 3, 16, 16)), torch.randn(1, 3, 17, 20)
        >>> [layer.dilation for layer in dense]
        [(1, 1), (1, 1), (2, 2)]
        >>> torch.allclose(dense(x)[..., ::2, ::2], net(x), atol=1e-6)
        True

    Source: Chen et al., "DeepLab", TPAMI 2018.

    Note:
        A maximum pooling may become a padding and a pooling. Strides are followed through the net's own modules; a strided
        pooling that is called as a function is not seen, and an average pooling that would have to be dilated has no module
        in PyTorch.
    """
    require_at_least(1, output_stride=output_stride)
    net = copy.deepcopy(net).eval()
    factors = _factors(net, output_stride, example)
    modules = dict(net.named_modules())
    for name, factor in factors.items():
        _convert(name, modules[name], *factor)
    return _padded_outside(net)


def upsampled(
    maps: Float[Tensor, "batch channels h w"], output_stride: int, size: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Bilinear enlargement in which cell `i` of the map lies on pixel `output_stride * i`.

    That is where strided convolutions that pad to the same size take it from. Pixels beyond the last cell repeat it.

    >>> upsampled(torch.tensor([[[[0.0, 4.0]]]]), 4, (1, 6)).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    """
    reached = [output_stride * (n - 1) + 1 for n in maps.shape[2:]]
    y = F.interpolate(maps, reached, mode="bilinear", align_corners=True)[..., : size[0], : size[1]]
    missing = [max(0, n - have) for n, have in zip(size, y.shape[2:], strict=True)]
    return F.pad(y, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else y


class _Followed(Tensor):
    """A tensor that knows the stride that it would have, and the one that is kept."""

    steps: Steps

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        given = [
            t.steps for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, _Followed) and hasattr(t, "steps")
        ]
        if given:
            for t in pytree.tree_leaves(out):
                if isinstance(t, _Followed):
                    t.steps = max(given)
        return out


def _factors(net: nn.Module, output_stride: int, example: Tensor) -> dict[str, tuple[int, int]]:
    """By name: stride to keep, and dilation."""
    found: dict[str, tuple[int, int]] = {}
    names = {module: name for name, module in net.named_modules()}

    def after(module: Any, inputs: tuple[Any, ...], out: Any) -> None:
        if not inputs or not isinstance(inputs[0], _Followed) or not isinstance(out, _Followed):
            return
        x, name = inputs[0], names[module]
        wanted, kept = x.steps
        stride = 1
        if isinstance(module, (*_DILATED, *_UNDILATED)):
            strides = set(_all(module.stride))
            if len(strides) > 1:
                raise InputError(f"net: {name} has strides {module.stride}; they must be the same along all axes")
            stride = strides.pop()
        elif x.dim() == out.dim() > 2 and x.shape[2:] != out.shape[2:]:
            raise InputError(
                f"net: {name} ({type(module).__name__}) changes the size of the map and cannot be dilated; give the trunk "
                f"alone, with convolutions and maximum poolings"
            )
        keeps = wanted * stride <= output_stride
        if not keeps and kept < output_stride:
            raise InputError(
                f"output_stride: the net's strides go from {kept} to {wanted * stride} at {name}, {output_stride} lies between"
            )
        factor = (stride if keeps else 1, wanted // kept)
        if found.setdefault(name, factor) != factor:
            raise InputError(f"net: {name} is used at several strides, and cannot have a dilation for each")
        out.steps = (wanted * stride, kept * stride if keeps else kept)

    leaves = [m for m in net.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(after) for m in leaves]
    x = example.detach().as_subclass(_Followed)
    x.steps = (1, 1)
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _convert(name: str, module: nn.Module, stride: int, dilation: int) -> None:
    if not isinstance(module, (*_DILATED, *_UNDILATED)):
        return
    layer: Any = module
    layer.stride = _like(layer.stride, (stride,) * len(_all(layer.stride)))
    if isinstance(module, _DILATED):
        dilate(module, dilation, name)
    elif dilation > 1:
        raise InputError(f"net: {name}, an average pooling, would have to be dilated by {dilation}, which it cannot be")


def _padded_outside(net: Net) -> Net:
    """Give maximum poolings that pad more than half of their kernel, which PyTorch refuses, a layer that pads for them."""
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, _MAXIMA) and max(_all(module.padding)) * 2 > min(_all(module.kernel_size)):
            pads = _all(module.padding) * (1 if isinstance(module.padding, tuple) else _axes(module))
            inner = copy.copy(module)
            inner.padding = _like(module.padding, (0,) * len(_all(module.padding)))  # type: ignore[assignment]
            outside = _PADS[type(module)]([p for p in reversed(pads) for _ in range(2)], float("-inf"))
            if not name:
                raise InputError("net: is one pooling; give the trunk that it belongs to")
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, nn.Sequential(outside, inner))
    return net


def _axes(module: nn.Module) -> int:
    return next(i for i, kind in enumerate(_MAXIMA, start=1) if isinstance(module, kind))


def dilate(module: Any, rate: int, name: str = "module") -> None:
    """Multiply the dilation of a convolution or maximum pooling, and its padding as much.

    >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    >>> dilate(layer, 4); layer.dilation, layer.padding
    ((4, 4), (4, 4))
    """
    if isinstance(module.padding, str):
        if module.padding == "same" and any(k % 2 == 0 for k in _all(module.kernel_size)) and rate > 1:
            raise InputError(f"net: {name} pads an even kernel to the same size, which has no dilated form")
    else:
        module.padding = _like(module.padding, tuple(rate * p for p in _all(module.padding)))
    if max(_all(module.kernel_size)) > 1:
        module.dilation = _like(module.dilation, tuple(rate * d for d in _all(module.dilation)))
    if hasattr(module, "_reversed_padding_repeated_twice") and not isinstance(module.padding, str):
        module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]


def _all(given: int | tuple[int, ...]) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)


def _like(old: int | tuple[int, ...], new: tuple[int, ...]) -> int | tuple[int, ...]:
    return new[0] if isinstance(old, int) else new
